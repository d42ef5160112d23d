"""See a wrong answer element by element: the weights that the function gave to the keys, its output and its lse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.calling import Broken, Candidate, Refusal
from flashcore.bisection.diagnosis.diagnosing import READABLE, Diagnosis
from flashcore.bisection.diagnosis.screening import Inputs, Screened
from flashcore.numerics import ambient
from flashcore.numerics.tolerance import UNIT_FLOAT32, coordinates
from flashcore.problem import Problem

CELLS = 12
"""Tiles of keys that a grid has at most."""
_TILES = (16, 32, 64, 128, 256, 512)
_WINDOW, _TILE = (5, 8), (32, 64)
"""Rows and columns of a window of numbers, and of a map of errors."""
_AXES = ("head", "row", "column")


@dataclass(frozen=True)
class Seen:
    """One wrong call: what it gave, what was meant and how far off it may be, each float64 ``[N, Sq, columns]``.

    N counts the heads of all batches. ``weights`` have a column for each key, ``out`` one for each of head_dim, and
    ``lse`` one alone.
    """

    inputs: Inputs
    parts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """By name ``weights`` (where they can be read), ``out`` and ``lse`` (where it gives one): got, expected, bound."""
    why_no_weights: str | None = None
    """Why the weights could not be read, as a clause."""

    @property
    def problem(self) -> Problem:
        return self.inputs.problem

    @property
    def first_bad(self) -> dict[str, Any] | None:
        """`stage`, batch, head, row and column of the first element beyond its bound, `got` and `expected`."""
        for stage, (got, expected, _) in self.parts.items():
            bad = self._shares(stage) > 1
            if bool(bad.any()):
                place = coordinates(int(bad.flatten().to(torch.uint8).argmax()), tuple(bad.shape), _AXES)
                at = place["head"], place["row"], place["column"]
                where = {"batch": at[0] // self.problem.num_heads_q, "head": at[0] % self.problem.num_heads_q}
                found = {"stage": stage, **where, "row": at[1], "column": at[2]}
                return found | {"got": float(got[at]), "expected": float(expected[at])}
        return None

    def grid(self) -> dict[str, Any]:
        """Worst share of the bound by head (down) and tile (across): keys of `weights`, or columns of `out`."""
        stage = next(iter(self.parts))
        shares = self._shares(stage).amax(dim=1)
        tile = next((t for t in _TILES if shares.shape[1] <= CELLS * t), _TILES[-1])
        heads = self.problem.num_heads_q
        rows = {
            f"batch {n // heads}, head {n % heads}": [float(part.max()) for part in row.split(tile)]
            for n, row in enumerate(shares)
        }
        starts = range(0, shares.shape[1], tile)
        return {"stage": stage, "rows": rows, "columns": [f"{c}-{min(c + tile, shares.shape[1]) - 1}" for c in starts],
                "across": "keys" if stage == "weights" else "columns"}  # fmt: skip

    def window(self, element: dict[str, Any]) -> dict[str, Any]:
        """Got and expected around an element, as `flashcore.bisection.zoom.zoom` has them."""
        got, expected, _ = self._plane(element)
        cut = tuple(_around(at, size, n) for at, size, n in zip(_at(element), got.shape, _WINDOW, strict=True))
        return _cut(element, cut) | {"got": got[cut].tolist(), "expected": expected[cut].tolist()}

    def tile(self, element: dict[str, Any]) -> dict[str, Any]:
        """How wrong each element of the tile around one is, as `flashcore.bisection.zoom.tile` has it."""
        shares = self._shares(element["stage"])[self._head(element)]
        cut = tuple(slice(at // n * n, min(at // n * n + n, size))
                    for at, size, n in zip(_at(element), shares.shape, _TILE, strict=True))  # fmt: skip
        return _cut(element, cut) | {"shares": shares[cut].tolist()}

    def _head(self, element: dict[str, Any]) -> int:
        return element["batch"] * self.problem.num_heads_q + element["head"]

    def _plane(self, element: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return tuple(t[self._head(element)] for t in self.parts[element["stage"]])

    def _shares(self, stage: str) -> torch.Tensor:
        got, expected, bound = self.parts[stage]
        same = got == expected
        error = (got - expected).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        return torch.where(same, 0.0, error / bound.nan_to_num(posinf=0.0)).nan_to_num(nan=math.inf, posinf=math.inf)


@ambient.judging
def see(candidate: Candidate, diagnosis: Diagnosis) -> Seen | None:
    """Look at the plainest wrong call of a diagnosis; None where no call gave an answer that is wrong.

    The weights are read by ``ceil(Sk / D)`` more calls. Bound of a weight: `reading.tolerance` of it, what rounding of
    the scores adds (as in `check.expected`), and the smallest normal number of the dtype. Those of `out` and `lse` are
    those that the call was judged by.
    """
    with ambient.alone:
        return _seen(candidate, diagnosis)


def _seen(candidate: Candidate, diagnosis: Diagnosis) -> Seen | None:
    wrong = [s for s in diagnosis.screened if s.answer is not None and (s.out_wrong or s.lse_alone)]
    if not wrong:
        return None
    chosen = min(wrong, key=lambda s: _plainness(s, diagnosis.home))
    inputs, problem, answer = chosen.inputs, chosen.inputs.problem, chosen.answer
    case = inputs.case(candidate)

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double().reshape(-1, problem.seqlen_q, tensor.shape[-1])

    parts = {}
    why = _why_not_read(candidate, problem)
    if why is None:
        try:
            got = reading.weights(candidate, case.q, case.k, problem)
            expected = reading.simulated_weights(case.q, case.k, problem)
            longest = [float(t.float().norm(dim=-1).max()) for t in (case.q, case.k)]
            slack = reading.tolerance(problem) + 2 * UNIT_FLOAT32 * abs(problem.scale) * longest[0] * longest[1]
            parts["weights"] = got, expected, slack * expected + torch.finfo(case.q.dtype).tiny
        except (Refusal, Broken) as error:
            why = f"it does not answer for the inputs that show them ({str(error).rstrip('.')})"
    out = flat(case.out)
    parts["out"] = flat(answer.out), out, case.out_atol + case.out_rtol * out.abs()
    if answer.lse is not None:
        lse = flat(case.lse[..., None])
        parts["lse"] = flat(answer.lse[..., None]), lse, case.lse_atol + case.lse_rtol * lse.abs()
    return Seen(inputs, parts, why)


def _why_not_read(candidate: Candidate, problem: Problem) -> str | None:
    size = problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k
    limit = READABLE.get(torch.device(candidate.device).type, READABLE["cpu"])
    return None if size <= limit else f"there are {size:,} of them, and {limit:,} are read at most"


def _plainness(one: Screened, home: Problem | None) -> tuple:
    inputs, problem = one.inputs, one.inputs.problem
    return (problem != home, inputs.pattern != "normal", inputs.strided, inputs.default_scale,
            problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k)  # fmt: skip


def _at(element: dict[str, Any]) -> tuple[int, int]:
    return element["row"], element["column"]


def _around(at: int, size: int, wanted: int) -> slice:
    first = max(0, min(at - wanted // 2, size - wanted))
    return slice(first, min(first + wanted, size))


def _cut(element: dict[str, Any], cut: tuple[slice, ...]) -> dict[str, Any]:
    row, column = _at(element)
    across = "key" if element["stage"] == "weights" else "column"
    return {"stage": element["stage"], "batch": element["batch"], "head": element["head"], "page": None,
            "down": "row", "across": across, "first_down": cut[0].start, "first_across": cut[1].start,
            "at": [row - cut[0].start, column - cut[1].start]}  # fmt: skip
