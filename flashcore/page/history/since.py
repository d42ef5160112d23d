"""The headline figures of a run beside those of the run before it: by how much they changed, and the word for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from flashcore.decision import compare
from flashcore.decision.gates import Gate
from flashcore.page.history import timings
from flashcore.page.history.comparing import Comparison, compare_runs, signed
from flashcore.page.history.runs import Snapshot
from flashcore.page.history.timings import Pair
from flashcore.records import Trial

SPEEDS = ("tflops", "ratio_to_best_peer", "latency_us")
"""Metrics of the headline figures that are judged by samples."""


@dataclass(frozen=True)
class Delta:
    """One headline figure, then and now."""

    metric: str
    """As in the gate that the figure belongs to."""
    before: float
    now: float
    unit: str
    percent: float | None
    """Change of the figure itself, in %: of a latency, less is better. None for checks, which are counted."""
    word: str
    """`faster`, `slower`, `same`, `too noisy to say`, `not compared`; of checks `better`, `worse`, `same`, `other`."""
    sentence: str
    """For the line under the figure, such as ``+5.1 % since 2026-11-22: faster, relative to sdpa-cudnn``."""


@dataclass(frozen=True)
class Since:
    """What changed since the run before."""

    comparison: Comparison
    deltas: dict[str, Delta]
    """By metric; a figure that only one run has is not here."""

    @property
    def before(self) -> Snapshot:
        return self.comparison.before

    def as_dict(self) -> dict[str, Any]:
        return {"deltas": {k: asdict(v) for k, v in self.deltas.items()}, "comparison": self.comparison.as_dict()}


def since(run: Snapshot, previous: Snapshot, *, gates: Iterable[Gate]) -> Since:
    """Compare a run with the one before it.

    Parameters
    ----------
    gates
        Of each metric the first one says which backends and which problem make the headline figure.
    """
    pair, gates, deltas = Pair(previous, run), list(gates), {}
    comparison = compare_runs(previous, run)
    for metric in SPEEDS:
        gate = next((g for g in gates if g.metric == metric), None)
        if gate is not None and (found := _speed(gate, pair, comparison)) is not None:
            deltas[metric] = found
    checks = [g for g in gates if g.metric == "correct_percent" and g.required]
    if checks and (found := _checks(checks, pair)) is not None:
        deltas["correct_percent"] = found
    return Since(comparison, deltas)


def _speed(gate: Gate, pair: Pair, comparison: Comparison) -> Delta | None:
    then, now = _best(gate, pair.before), _best(gate, pair.now)
    if then is None or now is None:
        return None
    before, after = _figure(gate, then, pair.before), _figure(gate, now, pair.now)
    if before is None or after is None or not (before > 0 and math.isfinite(after / before)):
        return None
    judged = timings.judge(pair, then, now)
    row = judged.with_drift(comparison.drift(judged.row.basis))
    percent = 100 * (after / before - 1)
    how = {"relative": f", relative to {row.peer}", "absolute": ", by absolute latency"}.get(row.basis, "")
    other = f" (then {then.backend})" if then.backend != now.backend else ""
    line = f"{signed(percent)} % since {pair.before.day}{other}: {row.word}{how}"
    return Delta(gate.metric, before, after, gate.unit, percent, row.word, line)


def _best(gate: Gate, run: Snapshot) -> Trial | None:
    """The fastest backend that the gate means; of a backend's several timings the last counts."""
    last = {t.backend: t for t in run.trials if gate.wants(t)}
    usable = [t for t in last.values() if compare.latency_us(t) is not None and t.problem is not None]
    return min(usable, key=compare.latency_us, default=None)


def _figure(gate: Gate, trial: Trial, run: Snapshot) -> float | None:
    if gate.metric == "tflops":
        return compare.tflops(trial)
    if gate.metric == "latency_us":
        return compare.latency_us(trial)
    found = compare.ratio_to_best_peer(trial, run.trials)
    return found.value if found else None


def _checks(gates: list[Gate], pair: Pair) -> Delta | None:
    widest = max(gates, key=lambda g: len(_outcomes(g, pair.now)))
    then, now = _outcomes(widest, pair.before), _outcomes(widest, pair.now)
    if not then or not now:
        return None
    shares = [100 * sum(o) / len(o) for o in (then, now)]
    word = "better" if shares[1] > shares[0] else "worse" if shares[1] < shares[0] else "same"
    word = "other" if word == "same" and len(then) != len(now) else word
    more = f"{abs(len(now) - len(then)):,} {'more' if len(now) > len(then) else 'fewer'} checks now"
    line = f"{sum(then):,} of {len(then):,} right on {pair.before.day}: {more if word == 'other' else word}"
    return Delta("correct_percent", shares[0], shares[1], widest.unit, None, word, line)


def _outcomes(gate: Gate, run: Snapshot) -> list[bool]:
    found = (compare.passed(t) for t in run.trials if gate.wants(t))
    return [outcome for outcome in found if outcome is not None]
