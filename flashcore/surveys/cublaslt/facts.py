"""Compute from the records of a survey what its views and answers say: regret, correlation, the smallest shape."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcore.decision import compare
from flashcore.decision.compare import number
from flashcore.problem import PRESETS, Problem
from flashcore.records import Trial
from flashcore.surveys.cublaslt import unfused_model
from flashcore.surveys.cublaslt.grid import candidates_of, measured_us, product_of, whole

POLICIES = ("first", "largest-workspace")
"""Those that can be judged from a survey: `measured` is the best by definition."""
FEWEST_CASES = 3
"""With fewer products a correlation is a matter of chance."""
STRONG, WEAK = 0.6, 0.3
"""Rank correlations from which on a relation is called strong, and below which none."""


@dataclass(frozen=True)
class Regret:
    """How much slower than the best measured candidate a policy's choice is, for one case."""

    case: str
    policy: str
    ratio: float
    """Latency of the choice over that of the best; 1 is the best."""


def by_case(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Measured candidates of cuBLASLt by case, in order of rank."""
    groups: dict[str, list[Trial]] = defaultdict(list)
    for trial in candidates_of(trials):
        groups[str(trial.variant)].append(trial)
    return {case: sorted(group, key=lambda t: t.data.get("rank") or 0) for case, group in groups.items()}


def fastest(group: Sequence[Trial]) -> Trial | None:
    """The candidate with the smallest median time."""
    return min(group, key=measured_us, default=None)


def facts_of(trials: Sequence[Trial], case: str) -> Mapping[str, Any]:
    """What was recorded of a whole case: candidates offered, with workspace, with Tensor Cores, and the prediction."""
    found = [t.data["case"] for t in trials if t.variant == case and isinstance(t.data.get("case"), dict)]
    return found[-1] if found else {}


def regrets(trials: Sequence[Trial]) -> list[Regret]:
    """For each product that leaves a choice and each policy, how far its choice lies from the best measured.

    A product that several cases ask about counts once for each workspace limit. The search for the smallest shape is
    left out: nobody chooses there.
    """
    found, seen = [], set()
    for case, group in by_case(trials).items():
        asked = (group[0].data.get("product"), group[0].data.get("limit_mb"))
        first = group[0]
        if asked in seen or first.data.get("rank") != 0 or first.data["group"] == "smallest":
            continue
        if facts_of(trials, case).get("offered", 1) < 2:
            continue
        seen.add(asked)
        best = measured_us(fastest(group))
        largest = max(group, key=lambda t: (t.data["workspace_bytes"], -t.data["rank"]))
        for policy, chosen in zip(POLICIES, (first, largest), strict=True):
            found.append(Regret(case, policy, measured_us(chosen) / best))
    return found


def workspace_correlation(trials: Sequence[Trial]) -> tuple[float, int, int] | None:
    """Spearman's rank correlation of workspace and time, over the cases whose candidates differ in workspace.

    Ranks are taken inside each case, so that large products do not count as slow ones; and only cases of which every
    candidate was recorded count.

    Returns
    -------
    correlation, candidates, cases
        Or None when no case has candidates of different workspace. Below 0 more workspace goes with less time.
    """
    workspace, time, cases = [], [], 0
    for case, group in by_case(trials).items():
        sizes = [t.data["workspace_bytes"] for t in group]
        if len(set(sizes)) < 2 or len(group) < facts_of(trials, case).get("offered", 0):
            continue
        cases += 1
        for target, values in ((workspace, sizes), (time, [measured_us(t) for t in group])):
            ranks = _ranks(values)
            target += list((ranks - ranks.mean()) / len(ranks))
    if not cases or np.std(workspace) == 0 or np.std(time) == 0:
        return None
    return float(np.corrcoef(workspace, time)[0, 1]), len(time), cases


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    values = np.asarray(values, float)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def correlation_words(found: tuple[float, int, int] | None) -> str:
    """Whether workspace predicts speed, as one sentence."""
    if found is None:
        return "No product has candidates that differ in workspace, so workspace can predict nothing here."
    value, candidates, cases = found
    if cases < FEWEST_CASES:
        return (
            f"Only {candidates} candidates of {cases} product{'s' if cases != 1 else ''} differ in workspace, "
            "too few to tell whether it predicts time."
        )
    strength = "a strong" if abs(value) >= STRONG else "a weak" if abs(value) >= WEAK else "no"
    direction = ""
    if strength != "no":
        direction = "; more workspace is slower" if value > 0 else "; more workspace is faster"
    return (
        f"Workspace has {strength} relation to time: rank correlation {number(value, 2)} over {candidates} candidates "
        f"of {cases} products{direction}."
    )


def small_grid(trials: Sequence[Trial]) -> dict[tuple[int, int, int], str]:
    """``{(m, n, k): word}`` of the search for the smallest product with a Tensor Core kernel.

    `first`: the heuristic's first choice uses Tensor Cores; `offered`: only another candidate does; `none`: no
    candidate does; `refused`: cuBLASLt offers nothing; `not known`: no kernel was seen.
    """
    found: dict[tuple[int, int, int], str] = {}
    for trial in map(whole, trials):
        if trial.kind != "gemm_candidate" or trial.data.get("group") != "smallest" or trial.backend != "cublaslt":
            continue
        product = product_of(trial)
        if product is None:
            continue
        shape = (product.m, product.n, product.k)
        if trial.data.get("rank") is None:
            found[shape] = "refused"
        elif trial.data.get("rank") == 0:
            uses = trial.data.get("tensor_core")
            others = (trial.data.get("case") or {}).get("with_tensor_core", 0)
            found[shape] = "first" if uses else "offered" if others else "not known" if uses is None else "none"
    return found


def smallest_shape(trials: Sequence[Trial]) -> tuple[int, int, int] | None:
    """The shape of least work whose first choice uses Tensor Cores."""
    shapes = [shape for shape, word in small_grid(trials).items() if word == "first"]
    return min(shapes, key=lambda s: (s[0] * s[1] * s[2], s), default=None)


def transpose_pair(trials: Sequence[Trial], name: str) -> tuple[Trial, Trial] | None:
    """The fastest candidates for K as it lies and for K transposed beforehand."""
    pair = [fastest(candidates_of(trials, case=f"transpose-{name}-{how}")) for how in ("transposed", "beforehand")]
    return None if None in pair else (pair[0], pair[1])


def batch_points(trials: Sequence[Trial], kind: str) -> dict[int, Trial]:
    """The fastest candidate by batch size, for `kind` qk or pv."""
    found = {}
    for case in by_case(trials):
        if case.startswith(f"batch-{kind}-"):
            best = fastest(candidates_of(trials, case=case))
            found[product_of(best).batch] = best
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Limit:
    """What the model allows a variant, beside what was measured."""

    backend: str
    prediction: unfused_model.Prediction
    measured_tflops: float | None


def limits(trials: Sequence[Trial], *, l2_bytes: int | None, problem: Problem = PRESETS["report"]) -> list[Limit]:
    """The model against the measurements on one problem; empty without a GPU's ceilings or the size of its L2."""
    ceilings = unfused_model.ceilings_of(trials, problem.dtype)
    if ceilings is None or not l2_bytes:
        return []
    timed = {t.backend: t for t in attention_timings(trials, problem)}
    return [
        Limit(
            backend, unfused_model.predict(problem, variant, ceilings, l2_bytes=l2_bytes),
            compare.tflops(timed[backend]) if backend in timed else None,
        )
        for backend, variant in unfused_model.VARIANTS.items()
    ]  # fmt: skip


def attention_timings(trials: Sequence[Trial], problem: Problem) -> list[Trial]:
    """Timings of attention on a problem, of each backend the last."""
    found = {
        t.backend: t
        for t in trials
        if compare.tflops(t) is not None and compare.same_problem(t.problem, problem) and t.timing.method != "host"
    }
    return list(found.values())


def attention_by_backend(trials: Sequence[Trial], problem: Problem = PRESETS["report"]) -> dict[str, Trial]:
    """Timings on a GPU of one problem, by backend."""
    return {str(t.backend): t for t in attention_timings(trials, problem)}


def mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
