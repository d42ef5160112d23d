"""Hold a claim against the data sheet of its GPU: the roof of its FLOPs, the floor of its bytes, an empty kernel."""

from __future__ import annotations

import math

from flashcore.decision.claims.file import Claim, Gpu
from flashcore.decision.claims.findings import Finding, dtype_of, latency_us, spaced, time_words, work, work_words
from flashcore.decision.compare import number
from flashcore.problem import Problem


def physics(claim: Claim, gpu: Gpu | None) -> list[Finding]:
    """Hold a claim against what its GPU can do by its data sheet."""
    if claim.quantity == "memory_share":
        full = claim.interval[0] > 100
        sentence = f"A saving of {claim.figure} is more than everything."
        return [Finding("physics", "impossible", sentence, claim.number, 100.0, "%")] if full else []
    if claim.quantity not in ("latency_us", "tflops", "peak_tflops", "clock_ghz", "sm_count"):
        return []
    if gpu is None:
        sentence = "There is no data sheet of its GPU here; write a [[gpu]] table and name it in the claim."
        return [Finding("physics", "missing", sentence)]
    if claim.family == "speed":
        return _speed(claim, gpu)
    listed, words = {
        "peak_tflops": (gpu.peak_tflops.get(dtype_of(claim)), f"dense {dtype_of(claim)} peak"),
        "clock_ghz": (gpu.boost_ghz, "highest clock"),
        "sm_count": (float(gpu.sm_count), "number of SMs"),
    }[claim.quantity]
    return [] if listed is None else [_listed(claim, gpu, listed, words)]


def _listed(claim: Claim, gpu: Gpu, listed: float, words: str) -> Finding:
    """A claim about the GPU itself against its data sheet."""
    unit = "" if claim.quantity == "sm_count" else f" {claim.own_unit}"
    low, high = claim.interval
    fact = f"The {words} of the {gpu.id} is {listed:g}{unit}"
    figures = {"claimed": claim.number, "against": listed, "unit": claim.own_unit}
    if low <= listed <= high:
        return Finding("physics", "confirmed", f"{fact}, as claimed.", **figures)
    if claim.quantity == "clock_ghz":
        if low > listed:
            return Finding("physics", "impossible", f"{fact}; {claim.figure} is {_times(claim.number, listed)} that.",
                           **figures)  # fmt: skip
        return Finding("physics", "possible", f"{fact}; {claim.figure} is below it.", **figures)
    how = f"{_times(claim.number, listed)} the claimed {claim.figure}" if high < listed else f"not {claim.figure}"
    return Finding("physics", "contradicted", f"{fact}, {how}.", **figures)


def _times(one: float, other: float) -> str:
    return f"{number(max(one, other) / min(one, other))} times"


def _speed(claim: Claim, gpu: Gpu) -> list[Finding]:
    if claim.workload is not None:
        roof = _roof(claim, claim.workload, gpu)
        return [roof, *_at_the_highest_clock(roof, gpu)]
    found = [_bare_speed(claim, gpu)]
    for problem in claim.may_mean:
        roof = _roof(claim, problem, gpu)
        if roof.outcome == "impossible":
            meant = f"Were {spaced(problem)} meant, it would be beyond the data sheet: {roof.sentence}"
            found.append(Finding("physics", "beside", meant, roof.claimed, roof.against, roof.unit))
    return [finding for finding in found if finding is not None]


def _bare_speed(claim: Claim, gpu: Gpu) -> Finding | None:
    """A speed without a workload: only the dense peak, or an empty kernel, bounds it."""
    low, high = claim.interval
    peak = gpu.peak_tflops.get(dtype_of(claim))
    if claim.quantity == "tflops" and peak is not None:
        outcome, side = ("impossible", "above") if low > peak else ("possible", "below")
        sentence = f"{claim.figure} is {side} the dense {dtype_of(claim)} peak of the {gpu.id}, {peak:g} TFLOPS."
        return Finding("physics", outcome, sentence, claim.number, peak, "TFLOPS")
    if claim.quantity == "latency_us" and high < gpu.launch_us:
        return Finding("physics", "impossible", _too_short(claim, gpu), claim.number, gpu.launch_us, "µs")
    return None


def _too_short(claim: Claim, gpu: Gpu) -> str:
    return f"{claim.figure} is less than the {gpu.launch_us:g} µs that an empty kernel takes on a {gpu.id}."


def _roof(claim: Claim, problem: Problem, gpu: Gpu) -> Finding:
    """The time claimed for a workload against the least that its FLOPs, its bytes and a launch can take."""
    flop, interval = work(problem, claim.share), latency_us(claim, problem)
    dtype = claim.dtype or problem.dtype
    peak = gpu.peak_tflops.get(dtype)
    if interval is None or math.isinf(flop) or peak is None:
        return Finding("physics", "missing", f"There is no {dtype} peak of the {gpu.id} to hold it against.")
    middle = claim.number if claim.quantity == "latency_us" else flop / claim.number / 1e6
    rate = flop / middle / 1e6 if middle else math.inf
    does = f"{work_words(flop)} in {time_words(middle)} is {number(rate)} TFLOPS"
    roof = f"the {peak:g} TFLOPS dense {dtype} peak of the {gpu.id}"
    figures = {"claimed": rate, "against": peak, "unit": "TFLOPS"}
    if interval[1] < flop / peak / 1e6:
        sentence = f"{does}, {number(rate / peak)} times {roof}."
        return Finding("physics", "impossible", sentence, **figures)
    if interval[1] < gpu.launch_us:
        return Finding("physics", "impossible", _too_short(claim, gpu), middle, gpu.launch_us, "µs")
    least = memory_us(problem, gpu) if claim.share == 1 else 0.0
    if interval[1] < least:
        moved = f"{number(problem.bytes() / 1e6)} MB of Q, K, V and out, {gpu.l2_mb:g} of them in the L2"
        sentence = f"{time_words(middle)} is less than the {time_words(least)} that {moved}, take on a {gpu.id}."
        return Finding("physics", "impossible", sentence, middle, least, "µs")
    return Finding("physics", "possible", f"{does}, {number(100 * rate / peak)} % of {roof}.", **figures)


def memory_us(problem: Problem, gpu: Gpu) -> float:
    """The least time in µs for a problem's bytes, less what may lie in the L2 already."""
    try:
        return max(0.0, float(problem.bytes()) - gpu.l2_mb * 1e6) / gpu.memory_tb_s / 1e6
    except OverflowError:
        return math.inf


def _at_the_highest_clock(roof: Finding, gpu: Gpu) -> list[Finding]:
    """A word on a rate above the data sheet's peak that the highest clock would allow."""
    if roof.outcome != "impossible" or roof.unit != "TFLOPS" or gpu.peak_clock_ghz is None:
        return []
    highest = roof.against * gpu.boost_ghz / gpu.peak_clock_ghz
    if not roof.claimed <= highest:
        return []
    sentence = (
        f"The data sheet counts its peak at {gpu.peak_clock_ghz:g} GHz; at the highest clock, {gpu.boost_ghz:g} GHz, "
        f"it would be {number(highest)} TFLOPS, and the claim {number(100 * roof.claimed / highest)} % of that."
    )
    return [Finding("physics", "beside", sentence, roof.claimed, highest, "TFLOPS")]
