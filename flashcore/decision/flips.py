"""Say how far a measured figure would have to move to change the result of its condition, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flashcore.decision.compare import number
from flashcore.decision.judging import GateResult
from flashcore.problem import parse_problem

TWICE = 2.0
"""From here on a rise is told in times; below it, and for every fall, in percent."""

COUNTED = {"correct_percent": ("check", "failed"), "kept_percent": ("case", "broke")}
"""Shares, of what they are, and what one that is missing did."""


@dataclass(frozen=True)
class Change:
    """What would have to change for one condition to turn over."""

    condition: str
    """Id of the gate or condition."""
    measured: float
    threshold: float
    unit: str
    relative: float | None
    """From the measured figure to the threshold, as a share of the threshold, as margins are; None for one of 0."""
    words: str
    """A clause that follows "if", such as "hopper's latency rose from 4.73 to above 5 µs (5.4 % of the threshold)"."""
    figures: str
    """The same without its subject, such as "4.73 to above 5 µs (5.4 % of the threshold)"."""

    @property
    def distance(self) -> float | None:
        """How far it is: the factor between the two figures as a logarithm, so that half is as far as twice.

        None for a figure exactly at its threshold (every check passes, no byte is spilled): it has no margin to lose.
        """
        if self.measured == self.threshold:
            return None
        ratio = self.threshold / self.measured if self.measured else 0
        return abs(math.log(ratio)) if ratio > 0 else math.inf


def change(result: GateResult) -> Change | None:
    """What would turn this condition over; None for one that is not settled, which wants a measurement first."""
    if result.measured is None or result.state == "INCONCLUSIVE":
        return None
    holds, measured, threshold = result.state == "PASS", result.measured, result.threshold
    if result.metric in COUNTED and holds and threshold == 100:
        one, fails = COUNTED[result.metric]
        which = f"one of the {result.n:,} {one}s" if result.n > 1 else f"the only {one}"
        words = f"{which} behind '{result.title}' {fails}"
        return Change(result.id, measured, threshold, result.unit, None, words, which)
    rises = (result.comparison == "at least") != holds
    relative = None if threshold == 0 else (threshold - measured) / abs(threshold)
    beyond = ("above " if rises else "below ") if holds else ""
    unit = "%" if result.unit.startswith("%") else result.unit
    far = _how_far(measured, threshold, unit)
    figures = f"{apart(measured, threshold)} to {beyond}{f'{threshold:g} {unit}'.rstrip()} ({far})"
    words = f"{_subject(result)} {'rose' if rises else 'fell'} from {figures}"
    return Change(result.id, measured, threshold, result.unit, relative, words, figures)


def nearest_first(changes: Iterable[Change]) -> list[Change]:
    """The changes, the shortest way first: any one of them turns the whole over. Those without a distance come last."""
    return sorted(changes, key=lambda c: math.inf if c.distance is None else c.distance)


def farthest_first(changes: Iterable[Change]) -> list[Change]:
    """The changes, the longest way first: it is what stands in the way when all of them are needed."""
    return sorted(changes, key=lambda c: math.inf if c.distance is None else -c.distance)


def apart(value: float, other: float) -> str:
    """A figure with as many digits as tell it from another one."""
    for digits in range(3, 7):
        if value == other or float(number(value, digits).replace(",", "").replace("−", "-")) != other:
            return number(value, digits)
    return f"{value!r}"


def _subject(result: GateResult) -> str:
    where = "" if result.problem in ("", "any") else f" at {parse_problem(result.problem).label().replace(',', ', ')}"
    if result.metric == "tflops":
        return f"{result.backend}'s speed{where}"
    if result.metric == "latency_us":
        return f"{result.backend}'s latency{where}"
    if result.metric == "ratio_to_best_peer":
        return f"{result.backend}'s speed against {result.versus}{where}"
    shares = {"correct_percent": "the share of right checks", "kept_percent": "the share of cases kept"}
    what = shares.get(result.metric, "the figure")
    return f"{what} behind '{result.title}'"


def _how_far(measured: float, threshold: float, unit: str) -> str:
    if measured == threshold:
        return "it has no margin"
    if measured == 0 or threshold / measured <= 0:
        return f"by {number(abs(threshold - measured))} {unit}".rstrip()
    ratio = threshold / measured
    if ratio >= TWICE:
        return f"{number(ratio, 2)} times"
    return f"{100 * abs(threshold - measured) / abs(threshold):.1f} % of the threshold"
