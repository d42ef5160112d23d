"""Which trials may be compared, and how they compare: roles, intervals of medians, ratios inside one round."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flashcore.problem import Problem
from flashcore.records import Correctness, Trial

PEERS = frozenset({"sdpa-math", "sdpa-flash", "sdpa-cudnn", "fa3", "fa4", "flashinfer"})
"""Backends that somebody else maintains: what a user would pick instead of ours."""
WITHOUT_KERNEL = frozenset({"cpu"})
"""Backends of ours that launch no `.cu` file, so their trials carry no source hash."""
FOR_CHECKS = frozenset({"hopper-unsplit"})
"""Backends of ours that open a part of another one to checks. Nobody ships them, so their speed decides nothing."""
CONFIDENCE = 98.0
"""Percent of cases in which an interval holds the true median. It misses it on each side in 1 case of 100 at most."""
FEWEST_SAMPLES = 7
"""With fewer, not even the range of all samples holds the median so often."""


def role(trial: Trial) -> Literal["ours", "peer", "reference"]:
    """Whose backend the trial measured; a peer from a plug-in says so in ``data["role"]``."""
    if trial.backend == "reference":
        return "reference"
    if trial.backend in PEERS or trial.data.get("role") == "peer":
        return "peer"
    return "ours"


def contends(trial: Trial) -> bool:
    """Whether the trial's backend is one of ours that a user would run, and no variant for checks."""
    return role(trial) == "ours" and trial.backend not in FOR_CHECKS


def in_ordinary_mode(trial: Trial) -> bool:
    """Whether a trial's problem leaves the last bits of a row free: a speed with `batch_invariant` is shown apart."""
    return trial.problem is None or not trial.problem.batch_invariant


def same_problem(a: Problem | None, b: Problem | None) -> bool:
    """Whether two problems are the same mathematics; ``page_size`` only says how a backend walks through it."""
    if a is None or b is None:
        return a is b
    return a is b or (a.mathematics == b.mathematics and math.isclose(a.scale, b.scale))


LEAST_US, MOST_US = 1e-3, 1e12
"""A nanosecond is two cycles, and 1e12 µs are eleven days: a latency beyond these is a broken record, and no figure."""


def latency_us(trial: Trial) -> float | None:
    """Median latency in µs of a timing that succeeded; None when there is none, or no clock could have told it."""
    if trial.kind != "attention_timing" or trial.status != "ok" or trial.timing is None:
        return None
    value = trial.timing.latency_us
    return value if LEAST_US <= value <= MOST_US else None  # a NaN is not


def tflops(trial: Trial) -> float | None:
    """`flops` over the median latency, in 1e12 a second, worked out again instead of read."""
    latency, work = latency_us(trial), flops(trial)
    return None if latency is None or work is None else work / latency / 1e6


def flops(trial: Trial) -> int | None:
    """Floating-point operations of a call: ``Problem.flops()``, and of sequences with lengths what the timing says.

    The work is then that of their real rows, which the problem does not know. It counts whole ones, and a timing that
    claims more than that, or says nothing, has none.
    """
    if trial.problem is None or trial.timing is None:
        return None
    if not trial.problem.lengths:
        return trial.problem.flops()
    stated = trial.timing.more("flops")
    return stated if is_figure(stated) and 0 < stated <= trial.problem.flops() else None


def samples_us(trial: Trial) -> list[float]:
    """The samples of a timing, in µs; empty when one of them is no positive number, since the rest is then in doubt."""
    samples = trial.timing.samples_us if trial.timing else []
    return list(samples) if all(math.isfinite(s) and s > 0 for s in samples) else []


def spread(samples: Iterable[float]) -> tuple[float, float] | None:
    """The range of the middle 90 % of samples, for a plot; None with fewer than three. It judges nothing."""
    samples = list(samples)
    if len(samples) < 3:
        return None
    low, high = np.percentile(samples, [5, 95])
    return float(low), float(high)


def median_interval(samples: Iterable[float], *, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """An interval that holds the median of what the samples were drawn from, whatever its distribution is.

    Of n sorted samples it is the k-th from each end. The median lies below the k-th smallest only if fewer than k
    samples fell below it, and each falls there with probability 1/2. So the interval misses the median with
    probability 2 · P(B < k) at most, where B is binomial with n trials and p = 1/2; k is the largest with which that
    stays within 1 − confidence. For n = 30 and 98 % it is the 9th (98.4 %).

    Source: H. A. David and H. N. Nagaraja, *Order Statistics*, 3rd edition, 2003, section 7.1.

    Parameters
    ----------
    samples
        Finite figures of one unit, taken as independent of each other. Drift within a run makes them less so;
        interleaved rounds put it on all backends alike, so that ratios are free of it.
    confidence
        In percent.

    Returns
    -------
    tuple of float or None
        Lower and upper end, in the unit of the samples; None where there are too few of them for this confidence.
    """
    ordered = sorted(samples)
    k = _from_each_end(len(ordered), confidence)
    return (float(ordered[k - 1]), float(ordered[-k])) if k else None


MANY = 1000
"""Samples beyond which ways to draw them are no longer counted: there are more than a float holds."""


@functools.lru_cache(maxsize=256)
def _from_each_end(n: int, confidence: float) -> int:
    """The largest k for which the k-th samples from both ends of n hold the median with this confidence; 0 for none.

    Of more than `MANY` it is one that Hoeffding's inequality vouches for, ``P(B < k) <= exp(-2 (n/2 - k)^2 / n)``,
    which is a little smaller.
    """
    if n > MANY:
        miss = 1.0 - confidence / 100.0
        return max(0, math.floor(n / 2 - math.sqrt(n * math.log(2 / miss) / 2))) if miss > 0 else 0
    most, below, ways, k = (1.0 - confidence / 100.0) / 2.0 * 2**n, 0, 1, 0  # ways: n over k
    while k <= n // 2 and below + ways <= most:
        below, ways, k = below + ways, ways * (n - k) // (k + 1), k + 1
    return k


def interval_us(trial: Trial) -> tuple[float, float] | None:
    """The interval of a timing's median, in µs, from the samples that its record keeps; None where they are too few.

    The stated median lies in it. Where more samples were taken than kept, it may lie outside that of those kept.
    """
    latency, found = latency_us(trial), median_interval(samples_us(trial))
    return None if latency is None or found is None else _holding(found, latency)


def _holding(interval: tuple[float, float], value: float) -> tuple[float, float]:
    return min(interval[0], value), max(interval[1], value)


def between(interval: tuple[float, float]) -> str:
    """An interval in words, such as ``4.76 to 4.79``: with as many digits as tell its ends apart, six at most."""
    low, high = interval
    texts = [(number(low, digits), number(high, digits)) for digits in range(3, 7)]
    return " to ".join(next((pair for pair in texts if pair[0] != pair[1]), texts[0]))


@dataclass(frozen=True)
class Ratio:
    """How many times faster one trial is than another of the same round; above 1 is faster."""

    value: float
    """Latency of the other over latency of this one, both medians."""
    interval: tuple[float, float] | None
    """Of the median of the samples' ratios, and it holds `value`; None where there are too few samples."""
    n: int
    other: Trial

    def in_words(self) -> str:
        """`faster`, `slower`, or `no difference` when 1 lies inside the interval or none is known."""
        if self.interval is None or self.interval[0] <= 1.0 <= self.interval[1]:
            return "no difference"
        return "faster" if self.value > 1.0 else "slower"


def interleaved(trial: Trial, other: Trial) -> bool:
    """Whether two timings are figures of one problem, measured next to each other in the same way."""
    return same_round(trial, other) and same_problem(trial.problem, other.problem)


def same_round(trial: Trial, other: Trial) -> bool:
    """Whether two timings, of one problem or of two, were measured next to each other in the same way."""
    mine, theirs = latency_us(trial), latency_us(other)
    if mine is None or theirs is None or trial.environment != other.environment:
        return False
    a, b = trial.timing, other.timing
    return a.round is not None and (a.round, a.method, a.l2) == (b.round, b.method, b.l2)


def ratio(trial: Trial, other: Trial) -> Ratio | None:
    """Compare two timings of one round; None when they were not interleaved or either is no number.

    Sample i of one and sample i of the other were taken next to each other, so clock drift cancels in their ratio.
    Where the two do not have the same number of samples, the interval goes from the worst to the best pairing of the
    ends of their own intervals, each of which is made to miss half as often.
    """
    return _ratio(trial, other) if interleaved(trial, other) else None


def speed_beside(trial: Trial, other: Trial) -> Ratio | None:
    """How many times as many operations a second one timing does as another of its round, of whatever problem.

    None as in `ratio`, and where the operations of either are not known.
    """
    work, beside = flops(trial), flops(other)
    if not same_round(trial, other) or not work or not beside:
        return None
    found, share = _ratio(trial, other), work / beside
    within = None if found.interval is None else tuple(share * end for end in found.interval)
    return Ratio(share * found.value, within, found.n, other)


def _ratio(trial: Trial, other: Trial) -> Ratio:
    """Latency of the other over that of this one, which share a round."""
    mine, theirs = latency_us(trial), latency_us(other)
    mine_samples, their_samples = samples_us(trial), samples_us(other)
    if len(mine_samples) == len(their_samples):
        n, found = len(mine_samples), median_interval(t / m for m, t in zip(mine_samples, their_samples, strict=True))
    else:
        n, each = min(len(mine_samples), len(their_samples)), (100.0 + CONFIDENCE) / 2
        a, b = (median_interval(samples, confidence=each) for samples in (mine_samples, their_samples))
        found = (b[0] / a[1], b[1] / a[0]) if a and b else None
    value = theirs / mine
    return Ratio(value, _holding(found, value) if found else None, n, other)


def ratio_to_best_peer(trial: Trial, trials: Iterable[Trial]) -> Ratio | None:
    """Compare a timing with the fastest peer of its round."""
    fastest = min((t for t in trials if role(t) == "peer" and interleaved(trial, t)), key=latency_us, default=None)
    return None if fastest is None else ratio(trial, fastest)


def passed(trial: Trial) -> bool | None:
    """Whether a correctness trial measured a right result: True, False, or None when it measured nothing usable.

    An `ok` that contradicts its own figures counts as wrong: elements out of bound, an error of `out` or `lse` that is
    NaN or above its bound, NaN or Inf among what passed. One that compared fewer values than the problem's `out` has
    measured nothing.
    """
    if trial.kind != "correctness" or trial.status not in ("ok", "failed"):
        return None
    found = trial.correctness
    if trial.status == "failed":
        return False
    if found is None or found.checked <= 0:
        return None
    if trial.problem is not None and found.checked < _values(trial.problem):
        return None
    clean = found.num_bad == 0 and found.num_nan == 0 and found.num_inf == 0
    within = math.isfinite(found.max_abs_error) and found.max_abs_error <= found.bound
    return found.passed and clean and within and _lse_within(found)


def _lse_within(found: Correctness) -> bool:
    """Whether the error of `lse` is within the bound that stands beside it; where neither is told, nothing is wrong."""
    error, bound = found.lse_max_abs_error, (found.model_extra or {}).get("lse_bound")
    return error is None or (math.isfinite(error) and (bound is None or (is_figure(bound) and error <= bound)))


def _values(p: Problem) -> int:
    """Values that `out` has; of a ragged batch, whose lengths are in no record, at least one row a head."""
    rows = 1 if p.lengths == "ragged" else p.batch * p.seqlen_q
    return rows * p.num_heads_q * p.head_dim


SAME_MEDIAN = 1e-3
"""How far a stated latency may lie from the median of its samples: both are rounded to five or six digits."""
MOST_SAMPLES = 50
"""Samples that an older timing keeps; where more were taken the median of those kept is another one. A newer timing
says in `samples` how many were taken."""


def contradiction(trial: Trial) -> str | None:
    """What in a timing contradicts itself, as a clause; None when its figures belong together."""
    name, latency, samples = trial.backend, latency_us(trial), samples_us(trial)
    if latency is None or (trial.timing.samples_us and not samples):
        return f"the timing of {name} is not a number"
    if trial.problem is None:
        return f"the timing of {name} names no problem"
    if samples and not min(samples) <= latency <= max(samples):
        return f"the median of {name} lies outside its own samples"
    taken = trial.timing.more("samples")
    if is_figure(taken) and taken < len(samples):
        return f"the timing of {name} keeps more samples than it says were taken"
    whole = 0 < len(samples) < MOST_SAMPLES or len(samples) == taken
    if samples and whole and not math.isclose(float(np.median(samples)), latency, rel_tol=SAME_MEDIAN):
        return f"the latency recorded for {name} is not the median of its samples"
    stated = trial.timing.tflops
    if stated is not None and not math.isclose(stated, tflops(trial) or 0.0, rel_tol=0.01):
        return f"the TFLOPS recorded for {name} contradict its latency"
    return None


def is_figure(value: Any) -> bool:
    """Whether a value from a record is a number to reckon with: no NaN, and nothing beyond what a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number(value: float | None, digits: int = 3) -> str:
    """A figure with sensible digits for a table: three significant ones, more only left of the point."""
    if value is None or not is_figure(value):
        return "not known"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -3:
        return f"{value:.{digits - 1}e}"
    text = f"{value:,.{max(0, digits - 1 - size)}f}"
    return text.replace("-", "−")


def first_line(text: str | None, default: str = "no reason recorded", *, most: int = 160) -> str:
    """The first line of a reason that says anything, for where one line has to do."""
    return next((line.strip() for line in (text or "").split("\n") if line.strip()), default)[:most]
