"""Judge a change from samples: faster, slower, same, or too noisy to say. Never by eye, never by the medians alone.

Each run's figure is a median with a percentile-bootstrap interval (Efron and Tibshirani, *An Introduction to the
Bootstrap*, 1993, chapter 13). The interval of a change runs from the worst pairing of the two intervals' ends to the
best one, and is then widened by the drift that code nobody changed shows between the same two runs. So `faster` and
`slower` mean that the intervals lie apart by more than the machine moved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 99.0
"""Percent, of each run's interval. A comparison asks some hundred questions, and none of them may go wrong by chance:
two such intervals of one truth lie apart in less than one case in a thousand."""
RESAMPLES = 2000
SEED = 2025
FEWEST_SAMPLES = 7
"""The range of seven samples holds the median in 98.4 % of cases, that of five in 93.8 % only."""
MATTERS = 0.03
"""A change of 3 % or less is never a regression, and `same` means that a greater one is ruled out."""
MOST_SAMPLES = 500
"""Samples used of a longer list; our own timings keep 50."""
LEAST = 0.01
"""A change below 1 % is not called faster or slower, however narrow its interval: unchanged code moves by as much."""
USUAL_DRIFT = 0.015
"""Drift where too few peers can tell it: about what it was between recorded runs on cards of one type."""
FEWEST_CONTROLS = 10
DRIFT_PERCENTILE = 95.0
"""Of the controls. Not the greatest: one peer that went astray at one problem would hide every change of ours."""

Word = Literal["faster", "slower", "same", "too noisy to say", "not compared"]
WORDS: tuple[Word, ...] = ("faster", "slower", "same", "too noisy to say", "not compared")
Side = Literal["before", "now"]


@dataclass(frozen=True)
class Figure:
    """A median of one run with its interval; the greater, the faster."""

    value: float
    low: float
    high: float
    n: int
    """Samples behind it."""


@dataclass(frozen=True)
class Change:
    """Speed now over speed before; above 1 is faster."""

    value: float
    low: float
    high: float
    drift: float
    """Share by which the interval was widened, because unchanged code moved by as much."""

    @property
    def word(self) -> Word:
        if self.low > 1.0 and self.value >= 1.0 + LEAST:
            return "faster"
        if self.high < 1.0 and self.value <= 1.0 - LEAST:
            return "slower"
        if self.low >= 1.0 - MATTERS and self.high <= 1.0 + MATTERS:
            return "same"
        return "too noisy to say"

    @property
    def excess(self) -> float:
        """How far the interval misses `no change`, as a share; 0 when it does not."""
        return max(0.0, self.low - 1.0, 1.0 / self.high - 1.0)


def figure(samples: Sequence[float], *, side: Side) -> Figure | None:
    """Median and interval of samples of a speed; None with fewer than `FEWEST_SAMPLES`, or one that is no number.

    Parameters
    ----------
    samples
        Positive; the greater, the faster. Taken as independent of each other: slow drift within a run is in them only
        as far as it is not shared by the peer that they are relative to.
    side
        Each run draws its own resamples, the same ones each time, so that a comparison never depends on its company.
    """
    samples = tuple(samples[:MOST_SAMPLES])
    if len(samples) < FEWEST_SAMPLES or not all(math.isfinite(s) and s > 0 for s in samples):
        return None
    return _figure(samples, side)


@functools.lru_cache(maxsize=1024)  # a page compares the same two runs for each of its parts
def _figure(samples: tuple[float, ...], side: Side) -> Figure:
    taken, n = np.asarray(samples, dtype=float), len(samples)
    tail = (100.0 - CONFIDENCE) / 2
    medians = np.median(taken[_picks(n, side)], axis=1)
    low, high = np.percentile(medians, [tail, 100.0 - tail])
    return Figure(float(np.median(taken)), float(low), float(high), n)


@functools.lru_cache(maxsize=32)
def _picks(n: int, side: Side) -> np.ndarray:
    return np.random.default_rng([SEED, n, side == "now"]).integers(0, n, (RESAMPLES, n))


def change(before: Figure, now: Figure, *, drift: float) -> Change | None:
    """The change between two figures; None when they are too far apart to be put as a ratio."""
    parts = (
        now.value / before.value,
        now.low / before.high / (1.0 + drift),
        now.high / before.low * (1.0 + drift),
    )
    return Change(*parts, drift) if all(math.isfinite(p) and p > 0 for p in parts) else None


def drift(controls: Iterable[Change]) -> float:
    """How far unchanged code moved between two runs, beyond its own intervals, as a share.

    Parameters
    ----------
    controls
        Changes of what nobody changed, found with a drift of 0.
    """
    excess = [c.excess for c in controls]
    measured = float(np.percentile(excess, DRIFT_PERCENTILE)) if excess else 0.0
    return measured if len(excess) >= FEWEST_CONTROLS else max(USUAL_DRIFT, measured)
