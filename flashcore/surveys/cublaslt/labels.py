"""Prove that the algorithm whose name a measurement carries is the one that ran, by the kernels the profiler sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flashcore.backends import Backend, with_methods
from flashcore.errors import FlashCoreError
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Algorithm, Plan, Product
from flashcore.measure.cluster import Pool, Task, perform
from flashcore.problem import Problem
from flashcore.records import RunFolder, Trial
from flashcore.surveys.cublaslt import kernel_names
from flashcore.surveys.cublaslt.grid import SurveyCase, product_of, whole, write_product
from flashcore.surveys.cublaslt.measuring import attributes, kernel_in, launcher

PROOF = "label-proof"
"""`data["group"]` of the trials that say whether the algorithm a backend chose is the one that ran."""


def _configuration(algorithm: Algorithm) -> tuple[tuple[str, Any], ...]:
    """The attributes that make one algorithm another than the next, for one product."""
    return tuple((k, v) for k, v in attributes(algorithm).items() if k not in ("rank", "waves_count"))


def wrong_labels(backend: Backend, problem: Problem) -> list[str]:
    """What contradicts the algorithms that a cublaslt backend names for a problem; empty when each is what runs.

    The backend runs once, and each plan that it used is launched again under the profiler, beside every candidate that
    cuBLASLt offers for the same product: the kernel has to be that of the candidate with the attributes of the plan's
    label, and to compute the tile that they name.

    Returns
    -------
    list of str
        One sentence a product.

    Raises
    ------
    FaultError
        The backend makes no plans.
    FlashCoreError
        The profiler saw no kernel, so there is no proof either way.
    """
    from flashcore.gpu.profiling import kernels_of

    plans = _plans_of(backend, problem)
    offers = [cublaslt.candidates(plan.product, workspace_bytes=cublaslt.workspace_limit()) for plan in plans]
    calls: list[Callable[[], None]] = []
    for plan, offered in zip(plans, offers, strict=True):
        calls += [launcher(plan.product, algorithm) for algorithm in offered]
        calls.append(launcher(plan.product, plan.algorithm, plan))
    names = iter(kernels_of(calls))
    found = []
    for plan, offered in zip(plans, offers, strict=True):
        kernel_of = {_configuration(algorithm): kernel_in(next(names)) for algorithm in offered}
        ran, label = kernel_in(next(names)), _configuration(plan.algorithm)
        if ran is None:
            raise FlashCoreError(
                f"The profiler saw no kernel for the product {plan.product.label()}, so nothing proves which one ran; "
                "see that no other profiler holds the GPU, and run it again."
            )
        wrong = kernel_names.label_problem(dict(label)["tile"], ran, kernel_of.get(label))
        if wrong:
            found.append(f"{plan.product.label()}: {wrong}")
    return found


def _plans_of(backend: Backend, problem: Problem) -> list[Plan]:
    """The plans that a backend uses for a problem, one a product, in the order of their first use."""
    from flashcore.numerics.inputs import make_inputs

    used: dict[Product, Plan] = {}

    def plan(self, product, *more):
        found = type(backend).plan(self, product, *more)
        used.setdefault(product, found)
        return found

    watched = with_methods(backend, {"plan": plan})
    watched.run(*make_inputs(problem, device="cuda"), problem)
    return list(used.values())


def prove_labels(run: RunFolder, cases: Sequence[SurveyCase], *, pool: Pool | None = None) -> list[Trial]:
    """For each case and policy: is the algorithm that `choose` names the one that runs?

    The kernel seen by the profiler has to be the one that the survey saw for the algorithm with the same attributes,
    and to compute the tile that the attributes name. Status `failed` where it is not. With a pool, one of its cards
    does it.
    """
    surveyed = run.trials(kind="gemm_candidate", backend="cublaslt")
    owed = tuple({"kind": "gemm_candidate", "backend": "cublaslt", "variant": f"{PROOF}-{case.id}"} for case in cases)
    return perform([Task("the labels of algorithms", _proved, (list(cases), surveyed), owed=owed)], run=run,
                   pool=pool)[0]  # fmt: skip


def _proved(cases: Sequence[SurveyCase], surveyed: Sequence[Trial]) -> list[Trial]:
    """The records of these cases; `surveyed` is what the survey saw."""
    from flashcore.gpu.profiling import kernels_of

    chosen: list[tuple[SurveyCase, str, Algorithm, str]] = []
    for case in cases:
        for policy in cublaslt.POLICIES:
            try:
                algorithm, why = cublaslt.choose(case.product, policy=policy, workspace_bytes=case.limit_bytes)
            except (FlashCoreError, RuntimeError):
                continue  # a case without candidates is in the survey's own records
            chosen.append((case, policy, algorithm, why))
    seen = kernels_of([launcher(case.product, algorithm) for case, _, algorithm, _ in chosen])
    trials = []
    for (case, policy, algorithm, why), names in zip(chosen, seen, strict=True):
        kernel, label = kernel_in(names), attributes(algorithm)
        before = surveyed_kernel(surveyed, case.product, algorithm)
        problem = kernel_names.label_problem(label["tile"], kernel, before)
        data = {
            "group": PROOF, "product": write_product(case.product), "policy": policy, "why": why, "kernel": kernel,
            "surveyed": before is not None, **{k: label[k] for k in ("algo_id", "tile", "stages", "workspace_bytes")},
        }  # fmt: skip
        trials.append(Trial(
            kind="gemm_candidate", backend="cublaslt", variant=f"{PROOF}-{case.id}-{policy}",
            status="failed" if problem else "ok", reason=problem, data=data,
        ))  # fmt: skip
    return trials


def surveyed_kernel(trials: Sequence[Trial], product: Product, algorithm: Algorithm) -> str | None:
    """The kernel that a survey saw for an algorithm with these attributes on this product; None when it saw none."""
    wanted = _configuration(algorithm)
    for trial in map(whole, trials):
        same = all(trial.data.get(k) == v for k, v in wanted)
        if same and trial.data.get("group") != PROOF and product_of(trial) == product:
            return trial.data.get("kernel")
    return None
