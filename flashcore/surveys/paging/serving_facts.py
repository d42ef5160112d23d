"""Read the records of served models and of decode against dense attention, and name what they compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flashcore.problem import Problem
from flashcore.records import Trial
from flashcore.surveys.paging.facts import paging_trials, timed

SERVING, SHAPES = "serving", "shapes"
"""``data["what"]`` of the records."""
OURS, INVARIANT = "all pages", "batch-invariant"
DENSE, AS_ROWS = "dense", "dense, group as rows"
TENSOR, CUDA = "FlashInfer, tensor cores", "FlashInfer, CUDA cores"
SEVERAL, CASCADE = "FlashInfer, prefill kernel", "FlashInfer, cascade"
"""Ways to take a step, as ``variant`` has them."""
PLAIN, LENGTHS, TOKENS, PREFIX = "plain", "mixed lengths", "query tokens", "shared prefix"
"""``data["case"]`` of records of `SHAPES`."""
UNPAGED = Problem.model_fields["page_size"].default
PEERS = {"dense": "cuDNN", "flashinfer": "FlashInfer"}
"""Whom ours is held against, as ``over_...`` in a record says it."""


@dataclass(frozen=True)
class Served:
    """One model at one batch: the last record of every way to take a layer's step."""

    model: str
    batch: int
    ways: dict[str, Trial] = field(default_factory=dict)

    @property
    def ours(self) -> Trial | None:
        """All pages, if its result is right and it was timed on a GPU."""
        return self.good(OURS)

    @property
    def invariant(self) -> Trial | None:
        """The same in the mode whose bits do not depend on the batch, whatever came of it."""
        return self.ways.get(INVARIANT)

    def good(self, *names: str) -> Trial | None:
        """The fastest of these ways that counts."""
        there = [self.ways[name] for name in names if name in self.ways and counts(self.ways[name])]
        return min(there, key=lambda t: t.timing.latency_us, default=None)


def counts(trial: Trial | None) -> bool:
    """Whether a record holds a time on a GPU of a result that is right."""
    return trial is not None and bool(timed([trial], str(trial.data.get("what"))))


def served(trials: Sequence[Trial]) -> list[Served]:
    """Models by batch of which ours was timed, in the order first seen."""
    found: dict[tuple[str, int], Served] = {}
    for trial in paging_trials(trials, SERVING):
        model, batch = trial.data.get("shape"), trial.data.get("batch")
        if isinstance(model, str) and isinstance(batch, int) and trial.variant:
            found.setdefault((model, batch), Served(model, batch)).ways[trial.variant] = trial
    keys = ("layers", "tbs")
    return [one for one in found.values() if one.ours and all(_is_figure(one.ours.data.get(key)) for key in keys)]


def rate(trial: Trial) -> float:
    """Tokens a second: batch / (layers x time of one layer's step)."""
    return trial.data["batch"] / (trial.data["layers"] * trial.timing.latency_us) * 1e6


def best_read(trials: Sequence[Trial]) -> Trial | None:
    """The record of whoever read K and V fastest of all decode steps that are compared; its ``tbs`` says how fast."""
    found = [t for what in (SERVING, SHAPES) for t in timed(trials, what) if _is_figure(t.data.get("tbs"))]
    return max(found, key=lambda t: t.data["tbs"], default=None)


def share_of_sheet(trial: Trial) -> float | None:
    """Of what the memory reads by its data sheet; None where the record names none."""
    read, sheet = trial.data.get("tbs"), trial.data.get("sheet_tbs")
    return read / sheet if _is_figure(read) and _is_figure(sheet) and sheet else None


def cost_of_invariance(one: Served) -> float | None:
    """How much longer a step of the mode takes, as a share of the ordinary step's time; None where it was not timed."""
    over = one.invariant.data.get("over_ordinary") if counts(one.invariant) else None
    return 1 / over - 1 if _is_figure(over) and over > 0 else None


@dataclass(frozen=True)
class Shape:
    """Decode of one shape in one dtype: the last record of ours at each page size, and of each peer."""

    problem: Problem
    """Its page size means nothing."""
    pages: dict[int, Trial]
    ways: dict[str, Trial]

    @property
    def dense(self) -> Trial | None:
        """The fastest dense way that counts."""
        there = [self.ways[n] for n in (DENSE, AS_ROWS) if counts(self.ways.get(n))]
        return min(there, key=lambda t: t.timing.latency_us, default=None)


def shapes(trials: Sequence[Trial]) -> list[Shape]:
    """Shapes and dtypes of which anything was recorded, in the order first seen."""
    found: dict[Problem, Shape] = {}
    for trial in paging_trials(trials, SHAPES):
        if trial.data.get("case") != PLAIN or trial.problem is None or not trial.variant:
            continue
        problem = trial.problem.with_(page_size=UNPAGED)
        one = found.setdefault(problem, Shape(problem, {}, {}))
        one.ways[trial.variant] = trial
        if trial.variant == f"page {trial.problem.page_size}":
            one.pages[trial.problem.page_size] = trial
    return [one for one in found.values() if any(counts(t) for t in one.ways.values())]


def further(trials: Sequence[Trial], case: str) -> dict[str, Trial]:
    """The last record of each way of one further case, by name; those that count."""
    return {str(t.variant): t for t in timed(trials, SHAPES) if t.data.get("case") == case}


def absent(trials: Sequence[Trial], what: str) -> dict[str, str]:
    """Backends that were not there for a measurement, and why."""
    found = paging_trials(trials, what)
    return {str(t.backend): str(t.reason) for t in found if t.status == "unavailable" and t.variant is None}


def refusals(trials: Sequence[Trial], what: str) -> dict[str, str]:
    """Ways that a backend does not take, and why."""
    return {str(t.variant): str(t.reason) for t in paging_trials(trials, what) if t.status == "unsupported"}


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
