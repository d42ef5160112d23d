"""Which trials may be compared, and how they compare: roles of backends, spread of samples, ratios inside one round."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flashcore.problem import Problem
from flashcore.records import Trial

PEERS = frozenset({"sdpa-math", "sdpa-flash", "sdpa-cudnn", "fa3"})
"""Backends that somebody else maintains: what a user would pick instead of ours."""
WITHOUT_KERNEL = frozenset({"cpu"})
"""Backends of ours that launch no `.cu` file, so their trials carry no source hash."""
FEWEST_SAMPLES = 3
"""With fewer samples a spread cannot be told."""


def role(trial: Trial) -> Literal["ours", "peer", "reference"]:
    """Whose backend the trial measured; a peer from a plug-in says so in ``data["role"]``."""
    if trial.backend == "reference":
        return "reference"
    if trial.backend in PEERS or trial.data.get("role") == "peer":
        return "peer"
    return "ours"


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
    """``Problem.flops()`` over the median latency, in 1e12 a second, worked out again instead of read."""
    latency = latency_us(trial)
    return None if latency is None or trial.problem is None else trial.problem.flops() / latency / 1e6


def samples_us(trial: Trial) -> list[float]:
    """The samples of a timing, in µs; empty when one of them is no positive number, since the rest is then in doubt."""
    samples = trial.timing.samples_us if trial.timing else []
    return list(samples) if all(math.isfinite(s) and s > 0 for s in samples) else []


def spread(samples: Iterable[float]) -> tuple[float, float] | None:
    """The 5th and 95th percentile, or None with fewer than `FEWEST_SAMPLES` samples."""
    samples = list(samples)
    if len(samples) < FEWEST_SAMPLES:
        return None
    low, high = np.percentile(samples, [5, 95])
    return float(low), float(high)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one trial is than another of the same round; above 1 is faster."""

    value: float
    """Latency of the other over latency of this one, both medians."""
    spread: tuple[float, float] | None
    """5th and 95th percentile over the samples."""
    n: int
    other: Trial

    def in_words(self) -> str:
        """`faster`, `slower`, or `no difference` when 1 lies inside the spread or no spread is known."""
        if self.spread is None or self.spread[0] <= 1.0 <= self.spread[1]:
            return "no difference"
        return "faster" if self.value > 1.0 else "slower"


def interleaved(trial: Trial, other: Trial) -> bool:
    """Whether two timings are figures of one problem, measured next to each other in the same way."""
    mine, theirs = latency_us(trial), latency_us(other)
    if mine is None or theirs is None or trial.environment != other.environment:
        return False
    a, b = trial.timing, other.timing
    if a.round is None or (a.round, a.method, a.l2) != (b.round, b.method, b.l2):
        return False
    return same_problem(trial.problem, other.problem)


def ratio(trial: Trial, other: Trial) -> Ratio | None:
    """Compare two timings of one round; None when they were not interleaved or either is no number.

    Sample i of one and sample i of the other were taken next to each other, so clock drift cancels in their ratio.
    """
    if not interleaved(trial, other):
        return None
    mine, theirs = latency_us(trial), latency_us(other)
    mine_samples, their_samples = samples_us(trial), samples_us(other)
    if len(mine_samples) == len(their_samples):
        n, bounds = len(mine_samples), spread(t / m for m, t in zip(mine_samples, their_samples, strict=True))
    else:
        n, (low, high) = min(len(mine_samples), len(their_samples)), (spread(mine_samples), spread(their_samples))
        bounds = (high[0] / low[1], high[1] / low[0]) if low and high else None
    return Ratio(theirs / mine, bounds, n, other)


def ratio_to_best_peer(trial: Trial, trials: Iterable[Trial]) -> Ratio | None:
    """Compare a timing with the fastest peer of its round."""
    fastest = min((t for t in trials if role(t) == "peer" and interleaved(trial, t)), key=latency_us, default=None)
    return None if fastest is None else ratio(trial, fastest)


def passed(trial: Trial) -> bool | None:
    """Whether a correctness trial measured a right result: True, False, or None when it measured nothing usable.

    An `ok` that contradicts its own figures counts as wrong: elements out of bound, an error that is NaN or above the
    bound, NaN or Inf among what passed. One that compared fewer values than the problem's `out` has measured nothing.
    """
    if trial.kind != "correctness" or trial.status not in ("ok", "failed"):
        return None
    found = trial.correctness
    if trial.status == "failed":
        return False
    if found is None or found.checked <= 0:
        return None
    p = trial.problem
    if p is not None and found.checked < p.batch * p.num_heads_q * p.seqlen_q * p.head_dim:
        return None
    clean = found.num_bad == 0 and found.num_nan == 0 and found.num_inf == 0
    return found.passed and clean and math.isfinite(found.max_abs_error) and found.max_abs_error <= found.bound


SAME_MEDIAN = 1e-3
"""How far a stated latency may lie from the median of its samples: both are rounded to five or six digits."""
MOST_SAMPLES = 50
"""Samples that a timing keeps; where more were taken the median of those kept is another one."""


def contradiction(trial: Trial) -> str | None:
    """What in a timing contradicts itself, as a clause; None when its figures belong together."""
    name, latency, samples = trial.backend, latency_us(trial), samples_us(trial)
    if latency is None or (trial.timing.samples_us and not samples):
        return f"the timing of {name} is not a number"
    if trial.problem is None:
        return f"the timing of {name} names no problem"
    if samples and not min(samples) <= latency <= max(samples):
        return f"the median of {name} lies outside its own samples"
    if 0 < len(samples) < MOST_SAMPLES and not math.isclose(float(np.median(samples)), latency, rel_tol=SAME_MEDIAN):
        return f"the latency recorded for {name} is not the median of its samples"
    stated = trial.timing.tflops
    if stated is not None and not math.isclose(stated, tflops(trial), rel_tol=0.01):
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
