"""Name what is kept in fewer bits than it should be: weights, sums of a row, V, or the output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import Behaviour, mask_of, simulate
from flashcore.bisection.diagnosis.calling import Candidate
from flashcore.bisection.diagnosis.elements import in_fewer_bits
from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.predicting import EXPLAINED, is_blunt
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.bisection.diagnosis.screening import Inputs, Screened
from flashcore.numerics import ambient
from flashcore.problem import Problem

FAR_OFF = 0.1
"""Share of the largest number in V that no rounding puts a result off by, with ordinary inputs."""
KEPT_BITS = {"bfloat16": 7, "tfloat32": 10, "tfloat32 cut off": 10, "float8_e4m3fn": 3, "float8_e5m2": 2}
"""Bits of a mantissa."""
ROUNDED_SUM = 0.03
"""By how much a row_sum of 16 bits is off at most."""


@ambient.judging
def rounded_weights(found: reading.Scores, problem: Problem, state: Behaviour) -> Hypothesis | None:
    """Weights that are off by as much as fewer bits leave, up and down alike, and by more than their own dtype."""
    wanted = reading.simulated_weights(found.q, found.k, problem, state)
    off = (found.weights / wanted - 1)[wanted > 1e-4]
    if off.numel() < 64 or not bool(off.isfinite().all()):
        return None
    worst, middle, spread = float(off.abs().max()), float(off.median()), float(off.std())
    most = float(off.abs().flatten()[:: max(1, off.numel() // 100_000)].quantile(0.99))
    usual = torch.finfo(reading.dtype_of(problem)).eps / 4
    ahead = (found.weights / wanted - 1).masked_fill(~(wanted > 1e-4), math.nan)
    level = ahead.nanmedian(dim=-1, keepdim=True).values
    pairs = (ahead - level)[..., 1:] * (ahead - level)[..., :-1]
    alike = float(pairs.nanmean() / (ahead - level).square().nanmean().clamp_min(1e-30))
    if alike > 0.3:  # roundings of one key and the next have nothing to do with each other
        return None
    if not 2 * usual < spread or most > 0.08 or worst > 0.5 or abs(middle) > 0.5 * spread:
        return None
    beside = (ahead - level)[wanted > 1e-4]
    if float(beside.std()) < 0.6 * spread:
        if float(level.abs().nan_to_num(0.0).max()) > ROUNDED_SUM:
            return None
        worst = float(level.abs().nan_to_num(0.0).max())
        words = f"row_sum is off by up to {worst:.1e}: it has fewer bits than it should"
        return Hypothesis("row_sum in fewer bits", words, ("row_sum",), by_rounding=True)
    words = f"weights are off by up to {most:.1e}: probabilities or products have fewer bits than they should"
    return Hypothesis("probabilities in fewer bits", words, ("probs", "scores"), by_rounding=True)


@ambient.judging
def rounded_sums(candidate: Candidate, problem: Problem) -> Hypothesis | None:
    """Rows whose weights are right beside each other, and add up to a little more or less than 1."""
    _, got, row = reading.read_columns(candidate, problem)
    rows = mask_of(problem, got.device).sum(dim=-1) > 0
    sums = (got[:, rows] / row).mean(dim=-1) - 1  # of D columns, so that the rounding of each counts for little
    slack = max(torch.finfo(reading.dtype_of(problem)).eps / 3, 1e-4)
    if not bool(sums.isfinite().all()) or float(sums.abs().max()) > ROUNDED_SUM or float(sums.std()) < slack:
        return None
    words = f"row_sum is off by up to {float(sums.abs().max()):.1e}: it has fewer bits than it should"
    return Hypothesis("row_sum in fewer bits", words, ("row_sum",), by_rounding=True)


@ambient.judging
def far_off(candidate: Candidate, failing: Sequence[Screened], state: Behaviour) -> bool:
    """Whether ordinary inputs give results that are further off than any rounding leaves them."""
    for one in failing:
        if one.answer is None or not one.out_wrong or one.inputs.pattern != "normal":
            continue
        case = one.inputs.case(candidate, again=True)
        predicted = simulate(case.q, case.k, case.v, one.inputs.problem, state)[0]
        off = (one.answer.out.double() - predicted).abs().nan_to_num(nan=math.inf)
        if float(off.max()) > FAR_OFF * float(case.v.abs().max()):
            return True
    return False


@ambient.judging
def rounded_output(candidate: Candidate, failing: Sequence[Screened]) -> Hypothesis | None:
    """Outputs that are all numbers of a narrower dtype than their own, and no further off than its rounding."""
    one = next((s for s in failing if s.out_wrong and s.answer is not None and s.inputs.pattern == "normal"), None)
    if one is None:
        return None
    case, out = one.inputs.case(candidate, again=True), one.answer.out
    for narrow, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        if torch.finfo(narrow).eps <= torch.finfo(out.dtype).eps or not bool(out.isfinite().all()):
            continue
        near = (out.double() - case.out).abs() <= 2.0 ** (2 - bits) * float(case.v.abs().max())
        if bool((out == out.to(narrow).to(out.dtype)).all()) and float(near.double().mean()) > EXPLAINED:
            word = str(narrow).removeprefix("torch.")
            words = f"the output has no more bits than {word}: it is rounded to that, or all of it is computed in that"
            return Hypothesis("output in fewer bits", words, ("out",), by_rounding=True)
    return None


@ambient.judging
def rounded_values(candidate: Candidate, problem: Problem) -> Hypothesis | None:
    """V of which every key has the same row comes out as that row; in fewer bits, if V was rounded.

    Where weights are rounded too, they add up to a little more or less than 1, by which the whole row is multiplied.
    """
    device = candidate.device
    q, k, v = Inputs(problem).make(device)
    row = v[0, 0, 0].clone()
    row = torch.where(row == 0, torch.ones_like(row), row)
    out = candidate(torch.zeros_like(q), k, row.expand(v.shape).contiguous(), problem).out
    rows = mask_of(problem, device).sum(dim=-1) > 0
    out, exact = out[:, :, rows].double(), row.double()
    slack = 4 * max(torch.finfo(v.dtype).eps, torch.finfo(torch.float32).eps * math.sqrt(problem.seqlen_k))
    if not bool(out.isfinite().all()):
        return None
    ratio = out / exact
    even = (ratio / ratio.median(dim=-1, keepdim=True).values - 1).abs() <= slack
    if bool(even.all()):
        return None  # V is not rounded, whatever the weights of a row add up to
    for name, bits in KEPT_BITS.items():
        if bits >= -math.log2(torch.finfo(v.dtype).eps):
            continue
        rounded = in_fewer_bits(row, name)
        level = (out / rounded).nanmedian(dim=-1, keepdim=True).values  # what the weights of a row add up to
        if not bool((rounded != 0).any()) or bool((level - 1).abs().max() > 2.0 ** (1 - bits)):
            continue
        if not bool(((out / level - rounded).abs() <= slack * exact.abs() + 1e-7).all()):
            continue
        why = " (or float16, which has as many bits)" if name == "tfloat32" else ""
        if bool(((level - 1).abs() <= slack).all()):
            words = f"V is rounded to {name}{why} before it is summed"
            return Hypothesis("V in fewer bits", words, ("accum",), by_rounding=True)
        words = f"products of {problem.dtype} are computed in {name}{why}: V and the weights are rounded to it first"
        return Hypothesis("products in fewer bits", words, ("accum", "probs", "scores"), by_rounding=True)
    return None


def precision(inquiry: Inquiry) -> str | None:
    """Sums and scores that need more than 16 bits, made so that 32 bits hold them exactly.

    Each has a control of the same kind that 16 bits hold as well: a function that fails it is wrong otherwise.
    """
    if inquiry.suspicions:
        return None
    problem = inquiry.problem
    fitting = [s for s in inquiry.failing if inquiry.fits_shape(s.inputs.problem)]
    if far_off(inquiry.candidate, fitting, inquiry.state) or any(h.by_rounding for h in inquiry.found):
        return None
    said = []
    if problem.seqlen_k >= 32 and _sums_wrong(inquiry, 4096.0) and not _sums_wrong(inquiry, 16.0):
        said.append(_precise(inquiry, "accumulation in 16 bits", "sums of P V are kept in 16 bits (or in less than "
                                  "float32): 4096 + 1 loses the 1", ("accum",)))  # fmt: skip
    plain = problem.scale != 0 and problem.head_dim >= 2 and inquiry.state.no_max is None
    if (
        plain
        and not inquiry.candidate.rounds_scores
        and _scores_wrong(inquiry, 2048.0)
        and not _scores_wrong(inquiry, 16.0)
    ):
        rounded = Hypothesis("scores in 16 bits", "", ("scores",), {"scores_rounded": True})
        sharp = [s for s in inquiry.failing if s.out_wrong and not is_blunt(s, inquiry.candidate)]
        if sharp and not inquiry.explains_most(rounded):
            return "; ".join(said) or None
        said.append(_precise(inquiry, "scores in 16 bits", "scores are rounded to 16 bits before the softmax: 2048 and "
                                  "2049 times the scale become the same", ("scores",),
                                  {"scores_rounded": True}))  # fmt: skip
    if not said and not any(h.by_rounding for h in inquiry.found) and inquiry.failing:
        rounded = None if inquiry.scores is None else rounded_weights(inquiry.scores, inquiry.problem, inquiry.state)
        rounded = rounded or rounded_sums(inquiry.candidate, inquiry.problem)
        if rounded:
            said.append(inquiry.add(rounded))
    return "; ".join(said) or None


def _sums_wrong(inquiry: Inquiry, large: float) -> bool:
    """Whether the last row's sum of V is wrong where `large` and its negative stand beside a few ones."""
    problem, device = inquiry.problem, inquiry.candidate.device
    q, k, v = (torch.zeros_like(t) for t in Inputs(problem).make(device))
    keys = problem.seqlen_k
    ones = (torch.rand(keys, generator=torch.Generator().manual_seed(7)) < 0.05).double()
    ones[0], ones[-1] = large, -large
    v[:] = ones.to(device=device, dtype=v.dtype)[:, None]
    got = inquiry.candidate(q, k, v, problem).out.double()[:, :, -1]
    wanted = simulate(q, k, v, problem, inquiry.state)[0][:, :, -1]
    slack = 0.25 / keys + 4 * torch.finfo(v.dtype).eps * wanted.abs()
    return not bool(((got - wanted).abs() <= slack).all())


def _scores_wrong(inquiry: Inquiry, large: float) -> bool:
    """Whether weights are wrong where scores are `large` and `large` + 1, times the scale."""
    problem = inquiry.problem
    step = abs(math.expm1(problem.scale))
    if step < 4e-3:
        return False
    q, k, _ = (torch.zeros_like(t) for t in Inputs(problem).make(inquiry.candidate.device))
    q[..., 0] = q[..., 1] = 1.0
    k[..., 0] = large
    k[:, :, 1::2, 1] = 1.0
    found = reading.weights(inquiry.candidate, q, k, problem, inquiry.state.columns)
    wanted = reading.simulated_weights(q, k, problem, inquiry.state)
    slack = (0.2 * min(step, 1.0) + reading.tolerance(problem)) * wanted
    return not bool(((found - wanted).abs() <= slack).all())


def _precise(inquiry: Inquiry, name: str, sentence: str, stages: tuple[str, ...], changes: dict | None = None) -> str:
    return inquiry.add(Hypothesis(name, sentence, stages, changes or {}, by_rounding=True))
