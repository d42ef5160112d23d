"""The trend of many runs: each backend's latency, TFLOPS and ratio at one problem, from run to run by date."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashcore.decision import compare
from flashcore.page.history import timings
from flashcore.page.history.interval import Word
from flashcore.page.history.runs import Snapshot
from flashcore.page.history.timings import Pair
from flashcore.problem import PRESETS, Problem
from flashcore.records import Trial

FIRST = "first measured"


@dataclass(frozen=True)
class Point:
    """One backend in one run."""

    run: str
    date: str
    machine: str
    trial: Trial
    tflops: float
    latency_us: float
    ratio: compare.Ratio | None
    """Against the best peer of its round; of a peer, against the best of the others."""
    word: Word | str
    """Against the run before on a machine of that name; `first measured` where there is none."""
    percent: float | None
    """Change of speed that the word judges, in %."""
    basis: timings.Basis
    peer: str | None
    """The peer that the change is relative to."""
    other_source: bool

    @property
    def backend(self) -> str:
        return f"{self.trial.backend or 'unnamed'}{f' ({self.trial.variant})' if self.trial.variant else ''}"

    @property
    def day(self) -> str:
        return self.date[:10] or "date not known"

    def as_dict(self) -> dict[str, Any]:
        spread = compare.spread(compare.samples_us(self.trial))
        return {
            "run": self.run, "date": self.date, "machine": self.machine, "backend": self.backend,
            "role": compare.role(self.trial), "problem": self.trial.problem.label(), "latency_us": self.latency_us,
            "spread_us": spread and list(spread), "tflops": self.tflops,
            "ratio_to_best_peer": self.ratio and self.ratio.value, "best_peer": self.ratio and self.ratio.other.backend,
            "word": self.word, "percent": self.percent, "basis": self.basis, "peer": self.peer,
            "source_hash": self.trial.source_hash, "other_source": self.other_source,
        }  # fmt: skip


def trend(runs: Sequence[Snapshot], problem: Problem = PRESETS["report"]) -> dict[str, list[Point]]:
    """Points by machine, in the order of the runs' dates; runs of different machines make no trend.

    Parameters
    ----------
    runs
        In any order. One that did not time the problem gives no point.
    """
    machines: dict[str, list[Snapshot]] = {}
    for run in sorted(runs, key=lambda s: (s.date, s.name)):
        machines.setdefault(run.machine or "machine not known", []).append(run)
    found = {machine: _points(machine, group, problem) for machine, group in machines.items()}
    return {machine: points for machine, points in found.items() if points}


def _points(machine: str, runs: Sequence[Snapshot], problem: Problem) -> list[Point]:
    points: list[Point] = []
    last: dict[tuple, Snapshot] = {}
    for run in runs:
        usable = {
            key: trial
            for key, trial in timings.timed(run.trials).items()
            if compare.same_problem(trial.problem, problem) and 0 < (compare.tflops(trial) or 0) < math.inf
        }
        compared = {
            before.name: timings.rows(Pair(before, run), problem=problem)[0]
            for before in {last[key].name: last[key] for key in usable if key in last}.values()
        }
        for key, trial in usable.items():
            row = compared.get(last[key].name, {}).get(key) if key in last else None
            points.append(
                Point(
                    run.name, run.date, machine, trial, compare.tflops(trial), compare.latency_us(trial),
                    compare.ratio_to_best_peer(trial, [t for t in run.trials if t.backend != trial.backend]),
                    row.word if row else FIRST, row.percent if row else None, row.basis if row else "none",
                    row.peer if row else None, bool(row and row.other_source),
                )
            )  # fmt: skip
            last[key] = run
    return points
