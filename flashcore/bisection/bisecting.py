"""Find the stage at which a backend goes wrong: by dataflow, never by knowing the bug.

Every stage of a `Trace` is judged twice. *Locally*: does it hold what the reference computes from the backend's own
inputs to that stage? *Globally*: does it hold what the reference computes from Q, K and V? A stage that fails locally
made an error (producer); one that fails only globally passed it on (propagator).

The bounds, stage by stage, are in `flashcore.bisection.stagewise`. `row_max` has none: any reference is legal that
keeps `probs` finite. Globally the backend's own is used, so that `probs`, `row_sum` and `accum` are compared at one
reference, while `out` and `lse` depend on none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from flashcore import backends
from flashcore.bisection.stagewise import Judgement, Judges
from flashcore.bisection.zoom import tile, zoom
from flashcore.errors import FlashCoreError, InvalidProblem, Unsupported
from flashcore.measure.check import device_of, guarded, hash_of, on_host
from flashcore.measure.cluster import Task
from flashcore.numerics import ambient, masking, reference
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.numerics.reference import STAGES, Trace
from flashcore.numerics.tolerance import TANH_ERROR
from flashcore.problem import Problem
from flashcore.records import Trial
from flashcore.tables import describe, stage_table

if TYPE_CHECKING:
    import pandas
    import torch

GRID_CELLS = 12
"""Cells along the pages of a recorded error grid; more pages share a cell, which then holds the worst of them."""
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Scores judged at once; about twenty float64 temporaries of that size live at the same time (5 GB on a GPU)."""


@dataclass(frozen=True)
class StageRow:
    """One row of the stage table."""

    stage: str
    local: Judgement
    overall: Judgement
    """The global judgement (`global` is a Python keyword)."""

    @property
    def role(self) -> Literal["producer", "propagator", "clean"]:
        """`producer` fails from its own inputs; `propagator` fails only from the start; `clean` fails neither way."""
        if not self.local.passed:
            return "producer"
        return "clean" if self.overall.passed else "propagator"


@dataclass(frozen=True)
class Bisection:
    """Every stage of one backend on one problem, judged."""

    backend: str
    problem: Problem
    stages: tuple[StageRow, ...]
    coverage: dict[str, Any]
    """`batches`, `heads`, `pages`, `page_size`, `elements` judged, and whether these are all there are (`complete`)."""
    production: Judgement
    """`out` and `lse` of the backend as it runs in production, against those of its traced build."""
    context: dict[str, Any]
    """`seed`, `pattern`, `layout`, `device`."""
    source_hash: str | None = None
    output: dict[str, bool] | None = None
    """Whether production's `out` is `finite` everywhere and `nonzero` somewhere: all that a naive check looks at."""
    window: dict[str, Any] | None = None
    """What was got and expected around the first bad element (see `zoom`); None when nothing is wrong."""

    @property
    def passed(self) -> bool:
        return all(row.role == "clean" for row in self.stages) and self.production.passed and self.coverage["complete"]

    @property
    def producers(self) -> list[str]:
        """Stages that made an error, in dataflow order."""
        return [row.stage for row in self.stages if row.role == "producer"]

    @property
    def first_row(self) -> tuple[StageRow, Judgement] | None:
        """What a finding is about, and the judgement it fails: the first producer, else the first propagator."""
        for role in ("producer", "propagator"):
            for row in self.stages:
                if row.role == role:
                    return row, row.local if role == "producer" else row.overall
        return None

    def grid(self) -> dict[str, Any]:
        """Worst error of each stage and page as a share of its bound, from own inputs (`local`) and from the start."""
        together = -(-self.coverage["pages"] // GRID_CELLS)

        def pooled(judgement: Judgement) -> list[float]:
            cells = range(0, len(judgement.shares), together)
            return [float(f"{max(judgement.shares[c : c + together]):.3g}") for c in cells]

        return {"pages_a_cell": together, "local": {row.stage: pooled(row.local) for row in self.stages},
                "global": {row.stage: pooled(row.overall) for row in self.stages}}  # fmt: skip

    def finding(self) -> str:
        """What was found, in one sentence."""
        if self.passed:
            c = self.coverage
            return (f"every stage is right: {c['elements']} values over {c['batches'] * c['heads']} heads and "
                    f"{c['pages']} pages")  # fmt: skip
        if self.first_row:
            row, bad = self.first_row
            values = f"{bad.num_bad} of {bad.checked} values"
            if row.role == "producer":
                return f"{row.stage} goes wrong first: {values}, {bad.first_bad['kind']} {describe(bad.first_bad)}"
            return (f"no stage fails alone, yet from {row.stage} on the result drifts from the reference: "
                    f"{values}, {describe(bad.first_bad)}")  # fmt: skip
        return f"the traced stages are right, but production gives another result {describe(self.production.first_bad)}"

    def table(self) -> pandas.DataFrame:
        """One row a stage, in dataflow order, verdicts in words."""
        return stage_table(self.to_trial())

    def to_trial(self) -> Trial:
        """The record of it; status `failed` when any stage is wrong."""
        rows = [{"stage": r.stage, "role": r.role, "local": r.local.to_dict(), "global": r.overall.to_dict()}
                for r in self.stages]  # fmt: skip
        data = {"stages": rows, "coverage": self.coverage, "producers": self.producers,
                "production": self.production.to_dict(), "finding": self.finding(), "grid": self.grid(),
                "output": self.output, **self.context}  # fmt: skip
        if self.window:
            data["window"] = self.window
        return Trial(kind="bisection", backend=self.backend, problem=self.problem, data=data,
                     status="ok" if self.passed else "failed", reason=None if self.passed else self.finding(),
                     source_hash=self.source_hash)  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """One run of a backend with its inputs and all of its stages, to be judged and looked at closely."""

    backend: str
    problem: Problem
    own: Trace
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Q, K and V."""
    out: torch.Tensor
    lse: torch.Tensor | None
    """What the backend gave as it runs in production."""
    context: dict[str, Any]
    source_hash: str | None = None
    masks: MaskTensors | None = None
    """Where the masks of the problem need tensors."""
    tanh_error: float = TANH_ERROR
    """As `Backend.tanh_error`."""

    def judge(self, *, progress: Callable[[str, int, int], None] | None = None) -> Bisection:
        """Every stage of it, judged; `progress` as in `bisect`."""
        return judge(self.own, *self.inputs, self.problem, out=self.out, lse=self.lse, backend=self.backend,
                     source_hash=self.source_hash, context=self.context, progress=progress, masks=self.masks,
                     tanh_error=self.tanh_error)  # fmt: skip

    def window(self, element: dict[str, Any], *, is_local: bool) -> dict[str, Any]:
        """Got and expected around an element (`flashcore.bisection.zoom.zoom`)."""
        return zoom(self.own, *self.inputs, self.problem, element, is_local=is_local, masks=self.masks)

    def tile(self, element: dict[str, Any], *, is_local: bool) -> dict[str, Any]:
        """How wrong each element of the tile around one is (`flashcore.bisection.zoom.tile`)."""
        return tile(self.own, *self.inputs, self.problem, element, is_local=is_local, masks=self.masks,
                    tanh_error=self.tanh_error)  # fmt: skip


def bisect(
    backend: str | backends.Backend,
    problem: Problem,
    *,
    seed: int = 0,
    pattern: str = "normal",
    layout: str = "apart",
    device: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Bisection:
    """Trace a backend on one problem and judge every element of every stage, locally and globally.

    The inputs lie in different memory orders unless `layout` says otherwise. The backend's buffers start out full of
    NaN. Judging runs on the trace's device, a few heads at a time. `progress` is told what is done, how many heads are
    done, and how many there are.

    Raises
    ------
    BackendUnavailable, Unsupported
        The backend does not work here, does not take the problem, or exposes no stages.
    InvalidProblem
        The inputs of this pattern hold NaN or Inf.
    FlashCoreError
        The backend's trace has tensors of the wrong shape.
    """
    return traced(backend, problem, seed=seed, pattern=pattern, layout=layout, device=device).judge(progress=progress)


@ambient.judging
def traced(
    backend: str | backends.Backend,
    problem: Problem,
    *,
    seed: int = 0,
    pattern: str = "normal",
    layout: str = "apart",
    device: str | None = None,
) -> Traced:
    """Trace a backend on one problem, and run it as in production; parameters and errors as in `bisect`."""
    chosen = backends.get(backend) if isinstance(backend, str) else backend
    chosen.require(problem)
    if not chosen.traceable:
        raise Unsupported(chosen.id, "it does not expose its stages, so it cannot be bisected")
    place = device or device_of(chosen)
    q, k, v = make_inputs(problem, seed=seed, device=place, pattern=pattern, layout=layout)
    masks = make_masks(problem, seed=seed, device=q.device)
    if not all(bool(t.isfinite().all()) for t in masking.right_aligned(q, k, v, problem, masks)[:3]):
        raise InvalidProblem(f"The inputs '{pattern}' of {problem.label()} hold NaN or Inf.")
    with poisoned_outputs():
        own = chosen.trace(q, k, v, problem, **backends.with_masks(masks))
        out, lse = chosen.run(q, k, v, problem, **backends.with_masks(masks))
    context = {"seed": seed, "pattern": pattern, "layout": layout, "device": q.device.type}
    return Traced(chosen.id, problem, own, (q, k, v), out, lse, context, chosen.source_hash(problem), masks,
                  chosen.tanh_error)  # fmt: skip


def bisect_trial(backend: str | backends.Backend, problem: Problem, **options) -> Trial:
    """`bisect` as a trial that never raises: what goes wrong becomes its status and reason."""
    chosen = backends.get(backend) if isinstance(backend, str) else backend
    return guarded("bisection", chosen, problem, lambda: bisect(chosen, problem, **options).to_trial())


def tasks(pairs: Sequence[tuple[backends.Backend, Problem]], **options: Any) -> list[Task]:
    """`bisect_trial` of each backend on its problem, or one like it that it takes, as tasks of `measure.cluster`."""
    found = []
    for one, wanted in pairs:
        problem = one.suits(wanted)
        owed = {"kind": "bisection", "backend": one.id, "problem": problem, "source_hash": hash_of(one, problem)}
        name = f"bisect {one.id} on {problem.label()}"
        found.append(Task(name, _bisected, (one, problem), options, (owed,), host=on_host(one)))
    return found


def _bisected(backend: backends.Backend, problem: Problem, **options: Any) -> Iterator[Trial]:
    yield bisect_trial(backend, problem, **options)


@ambient.judging
def judge(own: Trace, q, k, v, problem: Problem, *, backend: str, out=None, lse=None, source_hash=None,
          context: dict[str, Any] | None = None,
          progress: Callable[[str, int, int], None] | None = None, masks: MaskTensors | None = None,
          tanh_error: float = TANH_ERROR) -> Bisection:  # fmt: skip
    """Judge a trace that is already there; with `out` and `lse`, also that production agrees with it.

    `masks` where those of the problem need tensors; `tanh_error` as in `Backend`. Where sequences have lengths the
    trace holds real rows first (`Trace`), while Q, K, V, `out` and `lse` lie as the problem says.
    """
    asked, given = problem, (q, k, v, problem, masks)
    if out is not None:
        out, lse = masking.aligned_results(out, lse, problem, masks)
    q, k, v, problem, masks = masking.right_aligned(q, k, v, problem, masks)
    page_size = own.page_size
    num_pages = len(reference.pages(problem, page_size))
    _check_shapes(own, problem, num_pages, backend)
    total = problem.batch * problem.num_heads_q
    per_head = problem.seqlen_q * max(problem.seqlen_k, num_pages * problem.head_dim)
    step = max(1, CHUNK_ELEMENTS.get(q.device.type, CHUNK_ELEMENTS["cpu"]) // per_head)
    local = {stage: Judgement() for stage in STAGES}
    overall = {stage: Judgement() for stage in STAGES}
    production = Judgement()
    for start in range(0, total, step):
        heads = slice(start, min(start + step, total))
        if progress:
            progress(f"judging the stages of {backend}, head by head", start, total)
        mine = own.map(lambda t, heads=heads: t.reshape(total, *t.shape[2:])[heads].double())
        inputs, of_heads = reference.flat_inputs(q, k, v, problem, heads), reference.flat_masks(problem, masks, heads)
        judges = Judges(mine, own, inputs, problem, heads.start, of_heads, tanh_error)
        wanted = reference.flat_stages_from(mine, *inputs, problem, of_heads)
        judges.all(local, wanted, judges.local_models(wanted), mine.scores, is_local=True)
        truth = reference.flat_trace(*inputs, problem, page_size, mine.row_max, own.previous, of_heads)
        models = judges.global_models(truth)
        judges.all(overall, truth, models, truth.scores, is_local=False)
        for stage, result in (("out", out), ("lse", lse)):
            if result is not None:
                flat = result.reshape(total, *result.shape[2:])[heads].double()
                judges.add(production, stage, flat, getattr(mine, stage), 2 * models[stage], nan_is_equal=True)
    rows = tuple(StageRow(stage, local[stage], overall[stage]) for stage in STAGES)
    rows_in_all = total * problem.seqlen_q
    everything = rows_in_all * (2 * problem.seqlen_k + num_pages * (3 + problem.head_dim) + problem.head_dim + 1)
    judged = sum(row.local.checked for row in rows)
    coverage = {"batches": problem.batch, "heads": problem.num_heads_q, "pages": num_pages, "page_size": page_size,
                "elements": judged, "complete": judged == everything}  # fmt: skip
    output = None if out is None else {"finite": bool(out.isfinite().all()), "nonzero": bool((out != 0).any())}
    found = Bisection(backend, asked, rows, coverage, production, context or {}, source_hash, output)
    if not found.first_row:
        return found
    row, bad = found.first_row
    q, k, v, problem, masks = given
    window = zoom(own, q, k, v, problem, bad.first_bad, is_local=row.role == "producer", masks=masks)
    return replace(found, window=window)


def _check_shapes(own: Trace, problem: Problem, num_pages: int, backend: str) -> None:
    if own.previous is not None and len(own.previous) != num_pages:
        raise FlashCoreError(
            f"Backend '{backend}' traced chains of {len(own.previous)} pages; {problem.label()} has {num_pages} pages "
            f"of {own.page_size} keys."
        )
    b, h, sq, sk, d = (problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k, problem.head_dim)
    row, full = (b, h, num_pages, sq), (b, h, sq, sk)
    shapes = {"scores": full, "row_max": row, "rescale": row, "probs": full, "row_sum": row, "accum": (*row, d),
              "out": (b, h, sq, d), "lse": (b, h, sq)}  # fmt: skip
    for stage, shape in shapes.items():
        found = tuple(getattr(own, stage).shape)
        if found != shape:
            raise FlashCoreError(
                f"Backend '{backend}' traced {stage} with shape {found}; for {problem.label()} and pages of "
                f"{own.page_size} keys it has to be {shape}."
            )
