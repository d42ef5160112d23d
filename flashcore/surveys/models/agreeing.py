"""Whether two ways give the same greedy tokens, wherever more than the noise of torch's own attention decides them.

Two right implementations of attention give logits that differ a little, since they round at other places. How much is
measured on torch itself: the noise is the largest difference of a logit between `scaled_dot_product_attention` as torch
chooses it and attention with its scores in float32 (`attending.EXACT`), over all tokens of the step. It is at least one
rounding of the largest logit. A token is decided where the best logit leads the second by more than twice the noise:
each of the two may move by as much. At a decided place every right way gives the same token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MOST_NOISE = 4.0
"""Times the noise by which a logit may lie off, so that what is wrong where no token is decided is seen as well."""
ROWS = 4096
"""Rows of logits that are compared at once, in float32."""


@dataclass(frozen=True)
class Expected:
    """What logits ``[N, vocab]`` have to agree with."""

    logits: torch.Tensor
    noise: float
    tokens: torch.Tensor
    decided: torch.Tensor
    """bool ``[N]``: where the margin of the best two is above twice the noise."""


@dataclass(frozen=True)
class Agreement:
    """How one way's logits compare with what is expected."""

    positions: int
    decided: int
    """Of the positions, where more than noise decides."""
    agreed: int
    """Of the decided ones, where the token is the same."""
    worst: float
    """The largest difference of a logit; NaN where one is none."""
    noise: float

    @property
    def wrong(self) -> str | None:
        """What is wrong, as a clause; None for agreement."""
        if self.agreed < self.decided:
            return f"{self.decided - self.agreed} of {self.decided} decided tokens are others"
        if not self.worst <= MOST_NOISE * self.noise:
            return f"a logit lies {self.worst:.3g} off, and the noise of torch's own attention is {self.noise:.3g}"
        return None

    def data(self) -> dict[str, float | int]:
        """For a record."""
        return {
            "positions": self.positions, "decided": self.decided, "agreed": self.agreed,
            "worst_logit": float(self.worst), "noise": float(self.noise),
        }  # fmt: skip


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Over all of two tensors ``[N, vocab]``, in float32; NaN where one of them holds one."""
    parts = zip(a.split(ROWS), b.split(ROWS), strict=True)
    return float(torch.stack([(x.float() - y.float()).abs().amax() for x, y in parts]).amax())


def expected(exact: torch.Tensor, default: torch.Tensor) -> Expected:
    """From logits of `attending.EXACT` and of torch's own choice, both ``[N, vocab]``."""
    largest = float(exact.abs().max())
    noise = max(largest_difference(exact, default), torch.finfo(exact.dtype).eps * largest)
    best = [part.float().topk(2, -1) for part in exact.split(ROWS)]
    margin = torch.cat([found.values[:, 0] - found.values[:, 1] for found in best])
    tokens = torch.cat([found.indices[:, 0] for found in best])
    return Expected(exact, noise, tokens, margin > 2 * noise)


def agreement(wanted: Expected, logits: torch.Tensor) -> Agreement:
    """How logits ``[N, vocab]`` compare."""
    tokens = logits.argmax(-1)
    same = (tokens == wanted.tokens) & wanted.decided
    return Agreement(
        len(tokens), int(wanted.decided.sum()), int(same.sum()), largest_difference(wanted.logits, logits), wanted.noise
    )


def together(parts: list[Agreement]) -> Agreement:
    """Several comparisons as one; `worst` is that which exceeds its noise most."""
    most = max(parts, key=lambda part: math.inf if math.isnan(part.worst) else part.worst / (part.noise or math.inf))
    return Agreement(
        sum(p.positions for p in parts), sum(p.decided for p in parts), sum(p.agreed for p in parts), most.worst,
        most.noise,
    )  # fmt: skip
