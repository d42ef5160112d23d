"""Prove that timed calls compute attention: their buffers get values that nobody has seen, and results are compared.

A check before the timing says that a backend can be right, and the timing says that it can be fast. Only this says that
it is both at once. The values of each call are those of one secret case, turned around: the columns of Q and K are
rolled, which leaves the scores as they are, and those of V are rolled and may change their sign, as `out` then does. So
no two calls have the same inputs, and each has a known answer. The float64 reference is computed once, after all calls.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashcore.measure.check import Case, changed_inputs, expected, wrong_form
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.tolerance import TANH_ERROR, Comparison, compare
from flashcore.problem import Problem

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Turn:
    """How the values of one call differ from those of the secret case."""

    columns: int
    """How far Q and K are rolled along head_dim."""
    columns_v: int
    """How far V, and so `out`, is rolled along head_dim."""
    sign: int
    """What V, and so `out`, is multiplied by."""

    def of(self, values: Tensors) -> Tensors:
        """Q, K and V of this call."""
        q, k, v = values
        return q.roll(self.columns, -1), k.roll(self.columns, -1), self.of_out(v)

    def of_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """V, or what `out` becomes with it."""
        return tensor.roll(self.columns_v, -1) * self.sign


@dataclass(frozen=True)
class _Taken:
    """What one call returned, copied before anything else ran."""

    turn: Turn
    out: torch.Tensor | None
    lse: torch.Tensor | None
    wrong: str | None
    """What is wrong besides its values, as a clause."""


class Proof:
    """The values and the results of the calls that are timed together.

    Parameters
    ----------
    problem
        What they compute.
    buffers
        The tensors that they read, one triple an input set; they are overwritten.
    masks
        Where the masks of the problem need tensors: those that all calls are given.
    tanh_error
        The largest `Backend.tanh_error` of the backends that are timed.
    """

    def __init__(
        self, problem: Problem, buffers: Sequence[Tensors], masks: MaskTensors | None = None,
        tanh_error: float = TANH_ERROR,
    ):  # fmt: skip
        self.problem, self.buffers, self.masks, self.tanh_error = problem, list(buffers), masks, tanh_error
        self.seed = secrets.randbits(48)
        """Of the values: drawn when the timing begins, so that no backend can have prepared for them."""
        q = buffers[0][0]
        spare = q.shape[2] - int(masks.cu_seqlens_q[-1]) if problem.lengths == "ragged" else None
        self._values = make_inputs(problem, seed=self.seed, device=q.device, masks=masks, spare=spare)
        self._laid: Tensors = self._values
        self._turns: set[Turn] = set()
        self._taken: dict[str, list[_Taken]] = {}
        self._cases: dict[bool, Case] = {}

    def next_turn(self) -> Turn:
        """A turn that was not used before, as long as there are any."""
        d = self.problem.head_dim
        for _ in range(64):
            turn = Turn(secrets.randbelow(d), secrets.randbelow(d), secrets.choice((1, -1)))
            if turn not in self._turns:
                break
        self._turns.add(turn)
        return turn

    def lay(self, turn: Turn, number: int = 0) -> None:
        """Put the values of a turn into input set `number`, in place: the addresses stay what they were."""
        self._laid = turn.of(self._values)
        for buffer, value in zip(self.buffers[number], self._laid, strict=True):
            buffer.copy_(value)

    def take(self, name: str, turn: Turn, results, number: int = 0) -> None:
        """Keep what a call returned for a turn: a copy made at once, so that nothing that comes later is in it."""
        given = self.buffers[number][0]
        wrong = wrong_form(results, self.problem, given.device, given.shape)
        out, lse = (None, None) if wrong else (None if t is None else t.clone() for t in results)
        if not wrong and (names := changed_inputs(self.buffers[number], self._laid)):
            wrong = f"it changed its inputs ({names})"
        self._taken.setdefault(name, []).append(_Taken(turn, out, lse, wrong))

    def fault(self, name: str, *, round_scores: bool = False) -> tuple[str, Comparison | None] | None:
        """What was wrong in the calls of one backend: a clause, and the comparison that shows it; None for nothing."""
        taken = self._taken.pop(name, [])
        for call, one in enumerate(taken, start=1):
            of = f"in timed call {call} of {len(taken)}" if len(taken) > 1 else "in a timed call"
            if one.wrong:
                return f"{of} {one.wrong}", None
            case = self._case(round_scores)
            found = compare(one.out, one.turn.of_out(case.out), atol=case.out_atol, rtol=case.out_rtol)
            if not found.passed:
                return f"{of} on values it had not seen, out: {found.sentence()}", found
            if one.lse is None:
                continue
            found = compare(one.lse, case.lse, atol=case.lse_atol, rtol=case.lse_rtol)
            if not found.passed:
                return f"{of} on values it had not seen, lse: {found.sentence()}", found
        return None

    def _case(self, round_scores: bool) -> Case:
        """What is expected of the secret case: computed when every call is over, so that nobody can copy it."""
        if round_scores not in self._cases:
            self._cases[round_scores] = expected(
                *self._values, self.problem, round_scores=round_scores, masks=self.masks, tanh_error=self.tanh_error
            )
        return self._cases[round_scores]
