"""Name an lse that is wrong by itself: of another base or sum, without a part of it, of other rows, or rounded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import torch

from flashcore.bisection.diagnosis.behaviour import Behaviour, LseKind, mask_of, simulate
from flashcore.bisection.diagnosis.hypotheses import TILES, Hypothesis, head_of
from flashcore.bisection.diagnosis.pages import Loop
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.measure import check
from flashcore.numerics import ambient
from flashcore.problem import Problem

FITS = 0.98
"""Share of the wrong elements that a name has to predict."""
WORDS: dict[str, str] = {
    "log2": "lse is a logarithm of base 2 where the natural one is meant",
    "log2 of the sum": "the logarithm in lse is of base 2 where the natural one is meant",
    "row_max alone": "lse is the row's maximum alone: the logarithm of the sum is missing",
    "row_sum alone": "lse is the sum itself: its logarithm and the maximum are missing",
    "without row_max": "lse is the logarithm of the sum alone: the maximum is not added back",
    "negative": "lse has the wrong sign",
    "scaled": "lse is multiplied by the scale once more",
    "row_max plus row_sum": "lse is the maximum plus the sum: the logarithm is missing",
    "row_max unscaled": "the maximum in lse lacks the scale, which its sum has",
    "log1p": "lse has log(1 + sum) where log(sum) is meant",
}
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@ambient.judging
def name_lse(got: torch.Tensor, case: check.Case, problem: Problem, state: Behaviour) -> Hypothesis | None:
    """A name for a wrong lse; None where none predicts nearly all of its wrong elements.

    Parameters
    ----------
    got
        float64 ``[B, Hq, Sq]``.
    case
        The inputs of the call, what is right, and how far off it may be.
    state
        What was found of the output: an lse that follows from it needs no name (`follows`).
    """
    given = case.q, case.k, case.v
    bad = wrong_elements(got, case)
    for kind in get_args(LseKind):
        if _fits(got, simulate(*given, problem, state.with_(lse=kind))[1], case, bad):
            return Hypothesis(f"lse of another kind: {kind}", WORDS[kind], ("lse",), {"lse": kind})
    for name, words, wanted in _others(case, problem, state):
        if _fits(got, wanted, case, bad):
            return Hypothesis(name, words, ("lse",))
    return _rounded(got, case, bad) or _mixed(got, given, problem, state, case, bad) or _of_heads(got, case, problem)


def follows(got: torch.Tensor, case: check.Case, problem: Problem, state: Behaviour) -> bool:
    """Whether an lse is what a function that behaves so gives."""
    wanted = simulate(case.q, case.k, case.v, problem, state)[1]
    return _fits(got, wanted, case, wrong_elements(got, case))


def wrong_elements(got: torch.Tensor, case: check.Case) -> torch.Tensor:
    """bool ``[B, Hq, Sq]``: beyond the bounds of the case."""
    return ~((got - case.lse).abs() <= case.lse_atol + case.lse_rtol * case.lse.abs()) & (got != case.lse)


def _fits(got: torch.Tensor, wanted: torch.Tensor, case: check.Case, bad: torch.Tensor) -> bool:
    same = ((got - wanted).abs() <= 4 * case.lse_atol + 1e-5 * wanted.abs()) | (got == wanted)
    same |= got.isnan() & wanted.isnan()
    return bool(bad.any()) and float(same[bad].double().mean()) >= FITS


def _others(case: check.Case, problem: Problem, state: Behaviour) -> Iterator[tuple[str, str, torch.Tensor]]:
    """What else an lse may be: a name, its sentence, and what it would hold."""
    given = case.q, case.k, case.v
    right = simulate(*given, problem, state)[1]
    if problem.scale:
        unscaled = state.with_(scale_factor=state.scale_factor / problem.scale)
        yield (
            "lse of unscaled scores",
            "lse is that of scores without the scale",
            simulate(*given, problem, unscaled)[1],
        )
    if problem.causal:
        whole = problem.with_(causal=False)
        yield "lse without the mask", "lse counts keys that the mask hides", simulate(*given, whole, state)[1]
    for by in (1, -1, 2, -2, 8, -8, 16, -16, 32, -32, 64, -64, 128, -128):
        if abs(by) < problem.seqlen_q:
            words = f"lse of each row is that of the row {abs(by)} {'before' if by > 0 else 'after'} it"
            yield "lse of another row", words, right.roll(by, dims=2)
    words = "lse is written as [B, S, H] into memory that is read as [B, H, S]"
    yield "lse in another order", words, right.transpose(1, 2).contiguous().view(right.shape)
    words = "lse lies in memory as [B, H, S] and is read as [B, S, H]"
    yield "lse in another order", words, right.view(right.shape[0], right.shape[2], -1).transpose(1, 2)
    mask = mask_of(problem, case.q.device)
    for tile in (t for t in TILES if t < problem.seqlen_k):
        not_rescaled = state.with_(loop=Loop("row_sum not rescaled", tile))
        words = f"the sum in lse is not rescaled when the maximum moves, on every page of {tile} keys"
        yield "lse of a sum not rescaled", words, simulate(*given, problem, not_rescaled)[1]
        last = (problem.seqlen_k - 1) // tile * tile
        alone = mask.clone()
        alone[:, :last] = 0.0
        words = f"lse is that of the last page of {tile} keys alone"
        yield "lse of the last page", words, simulate(*given, problem, state.with_(counts=alone))[1]


def _rounded(got: torch.Tensor, case: check.Case, bad: torch.Tensor) -> Hypothesis | None:
    """An lse of 16 bits: each number is one of theirs, and no further off than their rounding."""
    finite = got.isfinite()
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        near = (got - case.lse).abs() <= 2.0**-bits * case.lse.abs() + case.lse_atol
        if bool(finite.any()) and bool((got == got.to(dtype).double())[finite].all()) and bool(near[bad].all()):
            word = str(dtype).removeprefix("torch.")
            return Hypothesis("lse in 16 bits", f"lse is rounded to {word}", ("lse",), by_rounding=True)
    return None


def _mixed(got, given: Parts, problem: Problem, state: Behaviour, case: check.Case, bad) -> Hypothesis | None:
    """An lse that is a times the maximum plus b times the logarithm of the sum plus c, by least squares."""
    kinds = ("row_max alone", "without row_max")
    top, log = (simulate(*given, problem, state.with_(lse=kind))[1] for kind in kinds)
    known = got.isfinite() & top.isfinite() & log.isfinite()
    if int(known.sum()) < 8:
        return None
    columns = torch.stack([top[known], log[known], torch.ones_like(top[known])], dim=-1)
    if float(columns[:, 0].std()) < 1e-3 or float(columns[:, 1].std()) < 1e-3:
        return None
    a, b, c = torch.linalg.lstsq(columns, got[known][:, None]).solution.flatten().tolist()
    if not _fits(got, a * top + b * log + c, case, bad) or not all(math.isfinite(x) for x in (a, b, c)):
        return None
    c = 0.0 if abs(c) < 0.01 else c
    if abs(a - b) < 2e-3 * abs(a) and not c:
        natural = {math.log(2): ": ln 2", 1 / math.log(2): ": log2(e)"}
        why = next((word for value, word in natural.items() if abs(a / value - 1) < 2e-3), "")
        return Hypothesis("lse multiplied", f"lse is {a:.4g} times what it should be{why}", ("lse",))
    if abs(a - 1) < 2e-3 and abs(b - 1) < 2e-3:
        return Hypothesis("lse shifted", f"{c:.4g} is added to lse", ("lse",))
    more = f" and {c:.4g} more" if c else ""
    return Hypothesis("lse of other parts", f"lse is {a:.4g} times the maximum plus {b:.4g} times the logarithm of the "
                      f"sum{more}", ("lse",))  # fmt: skip


def _of_heads(got: torch.Tensor, case: check.Case, problem: Problem) -> Hypothesis | None:
    """An lse whose heads stand at other places."""
    mine, right = got.flatten(0, 1), case.lse.flatten(0, 1)
    if not bool(mine.isfinite().all()) or not bool(right.isfinite().all()) or right.shape[1] < 4:
        return None
    distance, nearest = torch.cdist(mine, right).min(dim=-1)
    off = (nearest != torch.arange(len(nearest), device=nearest.device)).nonzero().flatten().tolist()
    if not off or bool((distance > 4 * case.lse_atol * math.sqrt(right.shape[1])).any()):
        return None
    first, source = divmod(off[0], problem.num_heads_q), divmod(int(nearest[off[0]]), problem.num_heads_q)
    words = f"lse of batch {source[0]}, head {source[1]} stands at batch {first[0]}, head {first[1]}"
    return Hypothesis("lse of another head", words, ("lse",), place=head_of(off[0], problem))


def lse(inquiry: Inquiry) -> str | None:
    wrong = [s for s in inquiry.failing if s.lse is not None and not s.lse.passed and s.answer is not None]
    for one in sorted(wrong, key=lambda s: s.inputs.pattern != "normal"):
        case, problem = one.inputs.case(inquiry.candidate, again=True), one.inputs.problem
        if follows(one.answer.lse, case, problem, inquiry.state):
            continue
        if one.lse_alone or inquiry.fits_shape(problem):
            named = name_lse(one.answer.lse, case, problem, inquiry.state)
            if named:
                return inquiry.add(named)
        if one.lse_alone or not (inquiry.suspicions or inquiry.found):
            words = f"lse is wrong: {one.lse.sentence()}"
            stages = ("lse",) if one.lse_alone else ("row_sum", "lse")
            return inquiry.suspect(stages, words, dict(one.lse.first_bad or {}))
        return "lse follows the wrong output"
    return None
