"""What a bug is called: its name, a sentence, the stages that it may sit in, and what it changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flashcore.bisection.diagnosis.behaviour import Behaviour
from flashcore.problem import Problem

TILES = (64, 128, 32, 16, 256, 96, 80, 48, 112, 160, 176, 192, 8)
"""Numbers of keys or queries that kernels take at once, the usual ones first."""


@dataclass(frozen=True)
class Hypothesis:
    """A bug that would explain what was seen."""

    name: str
    """A few words, the same for the same kind of bug."""
    sentence: str
    """What the function does, and what it should do."""
    stages: tuple[str, ...]
    """Where it happens; several where no output can tell them apart."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of a `Behaviour`."""
    place: dict[str, Any] = field(default_factory=dict)
    """Where it shows: head, row, keys."""
    by_rounding: bool = False
    """It is a bug of precision: no model predicts its errors to the element."""
    of_calls: bool = False
    """It depends on what was called before: no model predicts one call alone."""
    by_lot: bool = False
    """It is drawn by lot in each call, so none is predicted."""


def under(base: Behaviour, hypotheses: Iterable[Hypothesis], device: str | torch.device) -> Behaviour:
    """The behaviour that is `base` but for what the hypotheses change, with its tables on the device."""
    changes: dict[str, Any] = {}
    for one in hypotheses:
        changes |= {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in one.changes.items()}
    return base.with_(**changes)


def ranges(keys: list[int]) -> str:
    """``0 to 63 and 128`` of a sorted list."""
    parts: list[tuple[int, int]] = []
    for key in keys:
        if parts and key == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], key)
        else:
            parts.append((key, key))
    words = [str(a) if a == b else f"{a} to {b}" for a, b in parts[:4]]
    if len(parts) > 4:
        words.append(f"{len(parts) - 4} more ranges")
    return " and ".join(words)


def first_of(places: torch.Tensor) -> dict[str, int]:
    """The coordinates of the first true element of ``[B, H, Sq]`` or ``[B, H, Sq, D or Sk]``."""
    return dict(zip(("batch", "head", "row", "column"), places.nonzero()[0].tolist(), strict=False))


def head_of(flat: int, problem: Problem) -> dict[str, int]:
    """The batch and the head of a flat query head."""
    return {"batch": flat // problem.num_heads_q, "head": flat % problem.num_heads_q}


def place_of(places: torch.Tensor, problem: Problem) -> dict[str, int]:
    """The coordinates of the first true element of ``[B*Hq, Sq, Sk or D]``; of its first element if none is true."""
    first = int(places.flatten().to(torch.uint8).argmax())
    # Not by torch's own `unravel_index`, which loads sympy for it: half a second of each process.
    head, row, column = (int(at) for at in np.unravel_index(first, tuple(places.shape)))
    return {**head_of(head, problem), "row": row, "column": column}
