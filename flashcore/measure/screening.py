"""Call somebody else's package once at each problem, in a process that may die, before this process dares to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from flashcore.backends import Backend, with_masks
from flashcore.measure import workloads
from flashcore.measure.check import device_of
from flashcore.measure.cluster import Here, Pool, Task, crew, perform
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.problem import Problem
from flashcore.records import Trial

LIMIT_S = 60.0
"""Seconds that one call may take, with what it compiles before; FlashAttention-4 takes some 5 for a new kind."""


def screen(
    wanted: Sequence[tuple[Backend, Problem]],
    *,
    seed: int = 0,
    pool: Pool | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[tuple[str, Problem], str]:
    """Which of these calls took their process with them, hung, or lost the CUDA context.

    A package that compiles a kernel for each kind of problem does so here, on several cores, and may keep it.

    Parameters
    ----------
    pool
        Processes that may die; None for some of this machine, which end with this function.

    Returns
    -------
    dict
        By the backend's id and the problem, what happened, as a clause. A call that ends, or raises, is not in it: that
        is seen when it is measured.
    """
    if not wanted:
        return {}
    tasks = [
        Task(f"try {backend.id} at {problem.label()}", _called, (backend, problem, seed), limit_s=LIMIT_S,
             owed=({"kind": "attention_timing", "backend": backend.id, "problem": problem},))
        for backend, problem in wanted
    ]  # fmt: skip
    own = pool or crew(Here(), least=1)
    try:
        if progress and not isinstance(own, Here):
            progress(f"trying {len(wanted)} calls of other packages in processes of their own")
        (trials,) = perform(tasks, pool=own) if not isinstance(own, Here) else ([],)
    finally:
        if own is not pool and not isinstance(own, Here):
            own.close()
    return {
        (str(trial.backend), trial.problem): f"tried in a process of its own, it did not survive: {trial.reason}"
        for trial in trials
        if trial.data.get("crashed")
    }


def _called(backend: Backend, problem: Problem, seed: int) -> Iterator[Trial]:
    """One call, waited for."""
    place = device_of(backend)
    masks = make_masks(problem, seed=seed, device=place, lengths=workloads.kind_of_lengths(problem))
    spare = {"spare": 0} if problem.lengths == "ragged" else {}
    tensors = make_inputs(problem, seed=seed, device=place, masks=masks, **spare)
    backend.run(*tensors, problem, **with_masks(masks))
    if place == "cuda":
        torch.cuda.synchronize()
    yield Trial(kind="attention_timing", backend=backend.id, problem=problem)
