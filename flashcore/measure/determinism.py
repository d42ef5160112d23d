"""Run a backend again and again on the same inputs: are the results the same to the bit, and if not, from which stage?

A stage depends only on stages before it in the dataflow. So the first stage that differs is where chance comes in: by a
race, an atomic sum, or a read of memory that nobody wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flashcore import backends
from flashcore.errors import InvalidProblem
from flashcore.measure.check import device_of, guarded, hash_of, on_host
from flashcore.measure.cluster import Task
from flashcore.numerics import ambient
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.numerics.reference import STAGES, Trace
from flashcore.numerics.tolerance import coordinates
from flashcore.problem import Problem
from flashcore.records import Trial
from flashcore.tables import describe

RUNS = 10
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_AXES = {
    "scores": ("batch", "head", "row", "column"), "probs": ("batch", "head", "row", "column"),
    "row_max": ("batch", "head", "page", "row"), "rescale": ("batch", "head", "page", "row"),
    "row_sum": ("batch", "head", "page", "row"), "accum": ("batch", "head", "page", "row", "column"),
    "out": ("batch", "head", "row", "column"), "lse": ("batch", "head", "row"),
}  # fmt: skip


@ambient.judging
def check_determinism(
    backend: str | backends.Backend,
    problem: Problem,
    *,
    runs: int = RUNS,
    seed: int = 0,
    pattern: str = "normal",
    device: str | None = None,
) -> Trial:
    """Compare `runs` results on the same inputs bit by bit: every stage where there is a trace, and `out` and `lse`.

    Parameters
    ----------
    runs
        At least 2. The first is what the others are compared with.
    seed, pattern, device
        As in `flashcore.bisection.bisecting.bisect`.

    Returns
    -------
    Trial
        Kind `bisection`, variant `determinism`; data `runs`, `identical`, and when it is not: `first_stage` (of the
        trace, or `production` where only the production build differs), `element` with coordinates, what a later
        run gave (`got`) and what the first one did (`expected`, though nobody knows that), `differing` (elements of
        each stage) and `runs_that_differ`. Status `failed` when any bit differs. Raises only for an unknown id, or
        fewer than 2 runs.
    """
    if runs < 2:
        raise InvalidProblem(f"runs: {runs} run cannot differ from itself; give at least 2.")
    chosen = backends.get(backend) if isinstance(backend, str) else backend
    data = {"runs": runs, "seed": seed, "pattern": pattern}

    def measure() -> Trial:
        q, k, v = make_inputs(problem, seed=seed, device=device or device_of(chosen), pattern=pattern)
        masks = make_masks(problem, seed=seed, device=q.device)
        differing: dict[str, int] = {}
        first: dict[str, dict[str, Any]] = {}
        runs_that_differ = 0
        before: dict[str, Any] | None = None
        with poisoned_outputs():
            for _ in range(runs):
                now = _everything(chosen, q, k, v, problem, masks)
                if before is None:
                    before = now
                    continue
                counts = {}
                for name, tensor in now.items():
                    mask = _bits(before[name]) != _bits(tensor)
                    if count := int(mask.sum()):
                        counts[name] = max(count, differing.get(name, 0))
                        if name not in first:
                            first[name] = _element(name, mask, before[name], tensor)
                differing |= counts
                runs_that_differ += bool(counts)
        facts = dict(data, identical=not differing, first_stage=None, element=None, differing=differing,
                     runs_that_differ=runs_that_differ, traced=chosen.traceable)  # fmt: skip
        common = dict(kind="bisection", backend=chosen.id, variant="determinism", problem=problem,
                      source_hash=chosen.source_hash(problem))  # fmt: skip
        if not differing:
            return Trial(**common, data=facts)
        name = next(n for n in [*STAGES, "production out", "production lse"] if n in differing)
        facts |= {"first_stage": name, "element": first[name]}
        reason = (f"the same inputs gave other bits in {runs_that_differ} of {runs - 1} repeats, first in {name}: "
                  f"{differing[name]} values, {describe(first[name])} the time before")  # fmt: skip
        return Trial(**common, status="failed", reason=reason.replace(", expected", ", and"), data=facts)

    return guarded("bisection", chosen, problem, measure, variant="determinism", data=data)


def tasks(pairs: Sequence[tuple[backends.Backend, Problem]], **options: Any) -> list[Task]:
    """`check_determinism` of each backend on its problem, or one like it that it takes, as tasks of `cluster`."""
    found = []
    for one, wanted in pairs:
        problem = one.suits(wanted)
        owed = {"kind": "bisection", "backend": one.id, "variant": "determinism", "problem": problem,
                "source_hash": hash_of(one, problem)}  # fmt: skip
        name = f"repeat {one.id} on {problem.label()}"
        found.append(Task(name, _repeated, (one, problem), options, (owed,), host=on_host(one)))
    return found


def _repeated(backend: backends.Backend, problem: Problem, **options: Any) -> Iterator[Trial]:
    yield check_determinism(backend, problem, **options)


def _everything(
    backend: backends.Backend, q, k, v, problem: Problem, masks: MaskTensors | None
) -> dict[str, torch.Tensor]:
    """All that can be compared: the stages by name, and the results of the production build."""
    named: dict[str, torch.Tensor] = {}
    given = backends.with_masks(masks)
    if backend.traceable:
        trace: Trace = backend.trace(q, k, v, problem, **given)
        named = {stage: getattr(trace, stage) for stage in STAGES}
    out, lse = backend.run(q, k, v, problem, **given)
    named["production out"] = out
    if lse is not None:
        named["production lse"] = lse
    return named


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that a NaN equals itself and 0 differs from -0."""
    return tensor.view(_BITS[tensor.element_size()])


def _element(name: str, mask: torch.Tensor, before: torch.Tensor, now: torch.Tensor) -> dict[str, Any]:
    """The first element that differs, by page where the stage has pages, and both its values."""
    axes = _AXES[name.removeprefix("production ")]
    if "page" in axes:
        page = int(mask.transpose(0, 2).flatten(1).any(dim=1).to(torch.uint8).argmax())
        only = torch.zeros_like(mask)
        only[:, :, page] = mask[:, :, page]
        mask = only
    index = int(mask.flatten().to(torch.uint8).argmax())
    place = coordinates(index, mask.shape, axes)
    at = tuple(place.values())
    return {**place, "got": float(now[at]), "expected": float(before[at])}
