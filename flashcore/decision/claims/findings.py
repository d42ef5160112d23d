"""What a check finds about a claim, and the words and intervals that all of them use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flashcore.decision.claims.file import Claim, Interval
from flashcore.decision.compare import number
from flashcore.problem import Problem

Check = Literal["physics", "arithmetic", "contradiction", "definition", "measurement"]
Outcome = Literal["impossible", "contradicted", "undefined", "confirmed", "possible", "beside", "missing"]
"""The first four settle a claim, the worst first. `possible`: nothing against it. `beside`: a figure that stands next
to the claim and settles nothing. `missing`: the check lacks what it needs."""


@dataclass(frozen=True)
class Finding:
    """What one check found about one claim."""

    check: Check
    outcome: Outcome
    sentence: str
    claimed: float | None = None
    """The claim's side of the comparison, in `unit`."""
    against: float | None = None
    """What it was held against: a roof, a product, another claim, a measured median."""
    unit: str = ""
    backend: str | None = None
    """The backend that was measured, for a measurement."""
    n: int = 0
    """Samples behind the measured figure."""
    interval: tuple[float, float] | None = None
    """Of the measured median, in `unit`."""


def time_words(us: float) -> str:
    """A time in the unit that suits its size."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{number(us / size)} {unit}"
    return f"{number(us)} µs"


def work_words(flop: float, digits: int = 3) -> str:
    """An amount of work in the unit that suits its size."""
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flop >= size:
            return f"{number(flop / size, digits)} {unit}"
    return f"{number(flop / 1e6, digits)} MFLOP"


def spaced(problem: Problem) -> str:
    """A problem's label with spaces, to stand in a sentence."""
    return problem.label().replace(",", ", ")


def work(problem: Problem, share: float = 1.0) -> float:
    """FLOPs of a share of a problem; infinite beyond what a float holds."""
    try:
        return float(problem.flops()) * share
    except OverflowError:
        return math.inf


def apart(a: Interval, b: Interval) -> bool:
    """Whether two intervals have nothing in common; one that is no number is apart from nothing."""
    return a[1] < b[0] or b[1] < a[0]


def divided(a: Interval, b: Interval) -> Interval:
    """Every quotient of a figure in `a` and one in `b`, all of them not negative."""
    low = 0.0 if math.isinf(b[1]) or not b[1] else a[0] / b[1]
    high = math.inf if math.isinf(a[1]) or not b[0] else a[1] / b[0]
    return low, high


def latency_us(claim: Claim, problem: Problem | None) -> Interval | None:
    """The times in µs that a claim of speed allows for a problem; None without one that a throughput needs."""
    if claim.quantity == "latency_us":
        return claim.interval
    if claim.quantity != "tflops" or problem is None:
        return None
    flop = work(problem, claim.share)
    return None if math.isinf(flop) else divided((flop / 1e6, flop / 1e6), claim.interval)


def dtype_of(claim: Claim) -> str:
    """The dtype whose peak bounds a claim."""
    return claim.dtype or (claim.workload.dtype if claim.workload else "float16")
