"""Read the records of a survey of paging: the last measurement of each thing, and the figures that views draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashcore.problem import Problem
from flashcore.records import Trial

WITHOUT_GPU = ("correctness", "memory", "accuracy")
"""What is true of any machine, so that a run without a GPU may show its own."""
MEMORY_WORDS = {
    "shared_prefix": "shared prefix", "mixed_lengths": "mixed lengths", "no_sharing": "nothing shared",
}  # fmt: skip
POLICY_WORDS = {"top_k": "best pages by key bounds", "sink_window": "first page and last ones"}


def paging_trials(trials: Sequence[Trial], what: str | None = None) -> list[Trial]:
    """Records of kind `paging`, or those of one thing."""
    return [t for t in trials if t.kind == "paging" and (what is None or t.data.get("what") == what)]


def measured(trials: Sequence[Trial], what: str, *keys: str) -> list[Trial]:
    """The records of one thing that succeeded: of those alike in `keys` the last, in the order first seen."""
    found: dict[tuple, Trial] = {}
    for trial in paging_trials(trials, what):
        if trial.status == "ok":
            found[tuple(str(trial.data.get(k)) for k in keys) or (len(found),)] = trial
    return list(found.values())


def timed(trials: Sequence[Trial], what: str) -> list[Trial]:
    """Timings on a GPU that count: right results by graph replay; of each problem and variant the last."""
    found: dict[tuple, Trial] = {}
    for trial in paging_trials(trials, what):
        fine = trial.status == "ok" and trial.timing is not None and trial.timing.latency_us > 0
        if fine and trial.timing.method == "graph_replay":
            found[trial.problem, trial.variant, trial.backend] = trial
    return list(found.values())


def troubles(trials: Sequence[Trial]) -> list[Trial]:
    """What failed, did not finish or is not here; of a thing measured again only the last counts."""
    last: dict[tuple, Trial] = {}
    for trial in paging_trials(trials):
        keys = ("what", "group", "case", "pattern", "policy", "share", "shape", "batch")
        place = (trial.backend, trial.variant, trial.problem, *(str(trial.data.get(k)) for k in keys))
        last[place] = trial
    return [t for t in last.values() if t.status not in ("ok", "unsupported")]


@dataclass(frozen=True)
class Decode:
    """One shape's decode step: every way it was timed."""

    problem: Problem
    every: Trial | None
    """All pages, without a selection."""
    peer: Trial | None
    """The fastest dense one, over contiguous K and V."""
    selected: dict[str, list[Trial]]
    """By policy, in order of the share of pages."""

    @property
    def floor_us(self) -> float | None:
        """What reading all of K and V takes at the speed measured."""
        return self.every.data.get("floor_us") if self.every else None

    def nearest(self, policy: str, share: float) -> Trial | None:
        """The step with this policy at the share asked for."""
        return next((t for t in self.selected.get(policy, []) if t.data.get("share") == share), None)


def decodes(trials: Sequence[Trial]) -> list[Decode]:
    """Shapes with at least one timing, in the order first seen."""
    groups: dict[Problem, list[Trial]] = {}
    for trial in timed(trials, "decode"):
        if trial.problem is not None:
            groups.setdefault(trial.problem, []).append(trial)
    found = []
    for problem, group in groups.items():
        dense = [t for t in group if t.data.get("policy") == "dense"]
        selected: dict[str, list[Trial]] = {}
        for trial in group:
            if trial.data.get("policy") in POLICY_WORDS:
                selected.setdefault(trial.data["policy"], []).append(trial)
        found.append(Decode(
            problem, next((t for t in group if t.data.get("policy") == "none"), None),
            min(dense, key=lambda t: t.timing.latency_us, default=None),
            {name: sorted(some, key=lambda t: t.data.get("pages_share", 0.0)) for name, some in selected.items()},
        ))  # fmt: skip
    return found


def tokens_by_shape(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Rates of tokens by model shape, in order of the batch."""
    groups: dict[str, list[Trial]] = {}
    for trial in timed(trials, "tokens"):
        if isinstance(trial.data.get("tokens_per_s"), int | float):
            groups.setdefault(str(trial.data.get("shape")), []).append(trial)
    return {name: sorted(group, key=lambda t: t.data.get("batch", 0)) for name, group in groups.items()}


def checks_by_backend(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Sums over the matrix of correctness, by backend: cases right, wrong and not supported, elements, worst share."""
    last: dict[tuple, Trial] = {}
    for trial in paging_trials(trials, "correctness"):
        if trial.variant is None and isinstance(trial.data.get("right"), int):
            last[trial.backend, trial.data.get("group")] = trial
    found: dict[str, dict[str, Any]] = {}
    for trial in last.values():
        one = found.setdefault(
            str(trial.backend), {"right": 0, "wrong": 0, "unsupported": 0, "elements": 0, "worst": 0.0, "groups": []}
        )
        for key in ("right", "wrong", "unsupported", "elements"):
            one[key] += trial.data.get(key, 0)
        one["worst"] = max(one["worst"], float(trial.data.get("worst_share_of_bound") or 0.0))
        if trial.data["right"] or trial.data.get("wrong"):
            one["groups"].append(str(trial.data.get("group")))
    return found


def verdict_on_needle(trial: Trial) -> str:
    """FOUND or LOST in words: whether the queries still have most of their attention."""
    lost, queries = trial.data.get("lost", 0), trial.data.get("queries", 0)
    if not lost:
        return "FOUND"
    return "LOST" if lost == queries else f"LOST by {lost} of {queries} queries"
