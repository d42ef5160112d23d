"""Prove the checker: plant every known bug and see where bisection finds it; run correct code and see no alarm."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flashcore import backends as registry
from flashcore.backends import Backend, CudaBackend
from flashcore.bisection import Bisection, bisect
from flashcore.bisection.faults.catalogue import FAULTS, get
from flashcore.bisection.faults.planting import Fault, Source
from flashcore.errors import BackendUnavailable, FlashCoreError, Unsupported
from flashcore.gpu.build import compile_kernel, source_hash
from flashcore.gpu.isolation import Worker, isolated_trial
from flashcore.measure.check import guarded, hash_of, on_host
from flashcore.measure.cluster import Task, Work, perform
from flashcore.measure.determinism import check_determinism
from flashcore.numerics.inputs import LAYOUTS, PATTERNS, make_inputs
from flashcore.paging import PAGE_SIZES, TopK, paginate
from flashcore.paging.stability import check_selection
from flashcore.problem import Problem, parse_problem
from flashcore.records import RunFolder, Trial, digits
from flashcore.surveys.cublaslt.labels import wrong_labels

Progress = Callable[[str], None]

CRASH_LIMIT_S = 60.0
"""Seconds a fault may take in a process of its own; a right kernel takes well under one."""
FIRST_GPU = 0
"""The GPU that kernels with a bug in them are compiled for ahead of time."""
SELECTED_SHARE = 0.4
"""Of the pages of a sequence, where a bug of the page selection is looked for: many, so that every warp writes some."""
_ISOLATED_ON = ("cuda",)


def provable(backends: Sequence[Backend] | None = None) -> list[Backend]:
    """The backends that faults make sense in: those given, or all, that expose their stages and are ours."""
    given = registry.all_backends() if backends is None else backends
    return [b for b in given if b.traceable and b.role == "ours"]


# ------------------------------------------------------------------------------------------------ planted bugs


def prove(fault_id: str, backend_id: str) -> Trial:
    """Plant one bug, bisect, and say whether it was found at its stage. Importable, to be run in another process.

    A bug that shows in an algorithm's label alone (`Fault.found_by`) is looked for there, and one of the page selection
    in its choices; `backend_id` is then that kernel's name. Where a typed error is how a bug shows
    (`Fault.error_is_found`), the stage that the error itself carries is the one found.

    Raises
    ------
    UnknownName
        No such fault or backend, or the one makes no sense in the other.
    FaultError, CompileError, BackendUnavailable
        The fault cannot be planted here.
    """
    fault = get(fault_id)
    started = time.perf_counter()
    if fault.found_by == "selection":
        return _proved_by_selecting(fault, backend_id, started)
    planted, problem = fault.plant(backend_id), fault.problem_in(backend_id)
    planted.require(problem)
    hashed = planted.source_hash(problem)
    if fault.found_by == "labels":
        wrong = wrong_labels(planted, problem)
        more = {"finding": wrong[0]} if wrong else {}
        return _judged(fault, backend_id, "survey" if wrong else None, started, more, hashed)
    try:
        found = bisect(planted, problem, pattern=fault.pattern)
    except FlashCoreError as error:
        stage = _stage_that_refused(fault, error)
        if stage is None:
            raise
        seen = {"finding": str(error), "error": type(error).__name__}
        return _judged(fault, backend_id, stage, started, seen, hashed)
    return _judged(fault, backend_id, _stage_of(found), started, _seen(found), hashed)


def _proved_by_selecting(fault: Fault, kernel: str, started: float) -> Trial:
    """Choose the same pages again and again: other ones, or invalid ones, are how a bug of that choice shows."""
    state = CudaBackend().availability()
    if not state.ok:
        raise BackendUnavailable(kernel, state.reason, state.fix)
    problem = fault.problem_in(kernel)
    q, k, v = make_inputs(problem, device="cuda", pattern=fault.pattern)
    cache = paginate(k, v, problem.page_size)
    cache.refresh_bounds()
    planted = type("Planted", (TopK,), {"source": fault.plants[kernel].text(kernel)})
    found = check_selection(planted(share=SELECTED_SHARE), q, cache)
    stage = None if found.ok else "page table"
    return _judged(fault, kernel, stage, started, {"finding": str(found)}, source_hash(kernel))


def _judged(
    fault: Fault, backend_id: str, stage: str | None, started: float, seen: dict[str, Any], hashed: str | None
) -> Trial:
    """The record of a bug that was looked for and found at `stage`, or nowhere."""
    outcome = "found" if stage == fault.stage else "missed" if stage is None else "found elsewhere"
    data = _facts(fault) | {"looks_like": fault.looks_like, "pattern": fault.pattern} | {
        "found_stage": stage, "producers": [], "outcome": outcome, "first_bad": None, "output_finite": None,
        "check_passed": None, **seen, "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip
    words = {"found elsewhere": f"it was found at {stage}", "missed": "nothing was found"}
    reason = None if outcome == "found" else f"{fault.id} has to be found at {fault.stage}, and {words[outcome]}"
    return Trial(kind="fault", backend=backend_id, variant=fault.id, problem=fault.problem_in(backend_id), data=data,
                 reason=reason, status="ok" if outcome == "found" else "failed", source_hash=hashed)  # fmt: skip


def _stage_of(found: Bisection) -> str | None:
    """Where a bisection says that a bug is: its first producer, else the first stage that drifts; None for nowhere."""
    if found.first_row:
        return found.first_row[0].stage
    if not found.production.passed:
        return "production"
    return None if found.passed else "coverage"


def _stage_that_refused(fault: Fault, error: FlashCoreError) -> str | None:
    """The stage that an error carries, where an error is how the bug shows; None for any other error."""
    return error.stage if fault.error_is_found else None


def _seen(found: Bisection) -> dict[str, Any]:
    """What a bisection of a planted bug saw, for its record."""
    first = found.first_row[1].first_bad if found.first_row else found.production.first_bad
    output = found.output or {}
    return {
        "producers": found.producers, "first_bad": _shortened(first), "output_finite": output.get("finite"),
        "check_passed": output.get("finite") and output.get("nonzero"), "complete": found.coverage["complete"],
    }  # fmt: skip


def _facts(fault: Fault) -> dict:
    facts = {"fault": fault.id, "title": fault.title, "expected_stage": fault.stage}
    return facts if fault.found_by == "bisection" else {**facts, "found_by": fault.found_by}


def precompile(faults: Sequence[Fault], backends: Sequence[Backend], progress: Progress | None = None) -> int:
    """Compile what the faults will need in all of these backends, traced and not (see `compile_planted`)."""
    pairs = [(fault, backend) for fault in faults for backend in backends]
    return compile_planted(pairs, progress, traced=(True, False))


def compile_planted(
    pairs: Sequence[tuple[Fault, Backend]], progress: Progress | None = None, *, traced: Sequence[bool]
) -> int:
    """Compile faults in the backends that they are planted in, on all cores at once; returns how many variants.

    With True among `traced` come the versions that store their stages, with False the others. Backends of one kernel
    share what is compiled. What does not compile is left for the trial that needs it to say.
    """
    jobs: dict[tuple, Source] = {}
    for fault, backend in pairs:
        plant = fault.plants.get(backend.id)
        if isinstance(plant, Source) and fault.why_not(backend.id) is None and backend.kernel:
            problem = fault.problem_in(backend.id)
            defines = backend.defines(problem, FIRST_GPU) if isinstance(backend, CudaBackend) else ()
            jobs |= {(backend.kernel, plant.edits, problem.head_dim, problem.dtype, defines, trace): plant
                     for trace in traced}  # fmt: skip

    def compile_one(job: tuple[tuple, Source]) -> None:
        (kernel, _, head_dim, dtype, defines, trace), plant = job
        with contextlib.suppress(FlashCoreError):
            compile_kernel(kernel, head_dim=head_dim, dtype=dtype, trace=trace, defines=dict(defines),
                           source=plant.text(kernel))  # fmt: skip

    if not jobs:
        return 0
    with contextlib.suppress(ImportError):
        importlib.import_module("cuda.core")  # before the threads: its first import is not safe in several at once
    if progress:
        progress(f"compiling {len(jobs)} variants with a bug in them")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC runs outside Python's lock
        collections.deque(pool.map(compile_one, jobs.items()), maxlen=0)
    return len(jobs)


def run_faults(
    run: RunFolder | None = None,
    backends: Sequence[Backend] | None = None,
    *,
    faults: Sequence[Fault] = FAULTS,
    progress: Progress | None = None,
) -> list[Trial]:
    """Plant every bug of the catalogue in every backend that can hold it; one `fault` trial each, written as made.

    A bug of the page selection belongs to no backend: it is planted once, whichever backends are chosen, and the trial
    has the kernel's name in the backend's place.

    Parameters
    ----------
    run
        Where trials go; None keeps them in memory.
    backends
        Those to plant in (see `provable`); None for all of ours.
    faults
        Part of the catalogue, for a quick run.

    Returns
    -------
    list of Trial
        Kind `fault`, `variant` the fault's id, data `outcome`: `found`, `found elsewhere`, `missed`, `crashed` (its
        process died), `not applicable` (with the reason; nothing is left out in silence), `not run` (the backend does
        not work here) or `not planted` (the patch no longer fits, or does not compile). Status `ok` for what was
        found, `failed` for what was not.
    """
    return perform(fault_work(backends, faults, progress), run=run, progress=progress)[0]


def fault_work(
    backends: Sequence[Backend] | None = None, faults: Sequence[Fault] = FAULTS, progress: Progress | None = None
) -> Work:
    """What `run_faults` does, as a list for `measure.cluster.perform`: kernels compile first, then one task a bug."""
    chosen = provable(backends)
    ready = [b for b in chosen if b.availability().ok]
    found: list[Task | Trial] = []
    for backend in chosen:
        if backend not in ready:
            state = backend.availability()
            found.append(Trial(kind="fault", backend=backend.id, status="unavailable", data={"outcome": "not run"},
                               reason=f"{state.reason}; to mend it: {state.fix}",
                               source_hash=hash_of(backend)))  # fmt: skip
    for fault in faults:
        known = fault.id if fault in FAULTS else fault  # an id can go to another process
        if fault.held_by:
            found.append(_not_applicable(fault, None))
            continue
        hosts = list(fault.plants) if fault.found_by == "selection" else ready
        for host in hosts:
            if isinstance(host, Backend) and fault.why_not(host.id):
                found.append(_not_applicable(fault, host))
                continue
            name, hashed = (host.id, hash_of(host)) if isinstance(host, Backend) else (host, source_hash(host))
            owed = _fields(fault, name, hashed)
            owed["data"] = owed["data"] | {"outcome": "crashed", "crashed": True}
            found.append(Task(f"{fault.id} in {name}: {fault.title}", _planted, (known, host), owed=(owed,),
                              cost_s=0.5 if fault.may_crash else 0.1,
                              host=isinstance(host, Backend) and on_host(host)))  # fmt: skip

    def prepare(here: bool) -> None:
        if here and any(_isolated(fault, backend) for fault in faults for backend in ready):
            expendable().start()  # it imports torch while the kernels compile
        precompile(faults, ready, progress)

    return Work(found, prepare, expendable().close)


@functools.cache
def expendable() -> Worker:
    """The process of this process's own in which a bug may crash; it stays warm from one to the next."""
    return Worker(warm="flashcore.bisection.faults.proving")


def _planted(fault: Fault | str, host: Backend | str) -> Iterator[Trial]:
    """The record of one bug, planted in a backend, or in a kernel of that name where it is one of page selection."""
    fault = get(fault) if isinstance(fault, str) else fault
    yield _caught(fault, host, source_hash(host)) if isinstance(host, str) else _one(fault, host, expendable())


def bisect_planted(
    fault: Fault,
    backend_id: str,
    problem: Problem | None = None,
    *,
    pattern: str | None = None,
    seed: int = 0,
    repeat: int = 0,
    layout: str = "apart",
) -> list[Trial]:
    """Look closely at one planted bug: its bisection and, with `repeat`, that many repeats compared bit by bit.

    One that shows in the labels of algorithms alone has these looked at as well.

    One that may crash runs in a process of its own on a GPU.

    Returns
    -------
    list of Trial
        Kind `bisection`, their `variant` beginning with `planted`, so that nobody takes them for the backend's own.

    Raises
    ------
    UnknownName, FaultError
        It cannot be planted there.
    """
    wanted, looks = problem or fault.problem_in(backend_id), pattern or fault.pattern
    planted = fault.plant(backend_id)
    work = [("bisection", {"seed": seed, "pattern": looks, "layout": layout})]
    if fault.found_by == "labels":
        work.append(("labels", {}))
    if repeat:
        work.append(("determinism", {"seed": seed, "pattern": looks, "runs": max(2, repeat)}))
    if not _isolated(fault, planted):
        return [_planted_trial(fault.id, backend_id, what, wanted.label(), options) for what, options in work]
    with Worker() as worker:
        trials = []
        for what, options in work:
            fields = dict(kind="bisection", backend=backend_id, variant=f"planted-{fault.id}-{what}", problem=wanted,
                          source_hash=hash_of(planted, wanted), data={"fault": fault.id})  # fmt: skip
            trials.append(isolated_trial(_planted_trial, fault.id, backend_id, what, wanted.label(), options,
                                         worker=worker, timeout_s=CRASH_LIMIT_S, fields=fields))  # fmt: skip
    return trials


def _planted_trial(fault_id: str, backend_id: str, what: str, label: str, options: dict) -> Trial:
    """One measurement of a planted bug. Importable, to be run in another process."""
    fault = get(fault_id)
    planted, problem = fault.plant(backend_id), parse_problem(label)
    if what == "determinism":
        trial = check_determinism(planted, problem, **options)
    else:
        measure = _labels_trial if what == "labels" else _bisected
        trial = guarded("bisection", planted, problem, lambda: measure(fault, planted, problem, **options))
    data = {**trial.data, "fault": fault_id}
    return trial.model_copy(update={"variant": f"planted-{fault_id}-{what}", "data": data})


def _bisected(fault: Fault, planted: Backend, problem: Problem, **options) -> Trial:
    """The record of its bisection, or of the error that is how the bug shows."""
    try:
        return bisect(planted, problem, **options).to_trial()
    except FlashCoreError as error:
        stage = _stage_that_refused(fault, error)
        if stage is None:
            raise
        finding = f"{stage} was refused: {error}"
        data = {"producers": [stage], "finding": finding, "error": type(error).__name__, **options}
        return Trial(kind="bisection", backend=planted.id, problem=problem, status="failed", reason=finding, data=data,
                     source_hash=hash_of(planted, problem))  # fmt: skip


def _labels_trial(fault: Fault, planted: Backend, problem: Problem) -> Trial:
    """The record of what contradicts the labels of its algorithms."""
    wrong = wrong_labels(planted, problem)
    finding = "; ".join(wrong) or "every algorithm that is named is the one that runs"
    return Trial(kind="bisection", backend=planted.id, problem=problem, status="failed" if wrong else "ok",
                 reason=finding if wrong else None, data={"finding": finding, "wrong_labels": len(wrong)},
                 source_hash=hash_of(planted, problem))  # fmt: skip


def _shortened(first: dict[str, Any] | None) -> dict[str, Any] | None:
    """The first bad element with as many digits as a reader wants."""
    return first and {name: digits(x) if isinstance(x, float) else x for name, x in first.items()}


def _isolated(fault: Fault, backend: Backend) -> bool:
    return fault.may_crash and backend.device in _ISOLATED_ON and fault.why_not(backend.id) is None


def _not_applicable(fault: Fault, backend: Backend | None) -> Trial:
    reason = fault.why_not(backend.id if backend else None)
    return Trial(kind="fault", backend=backend.id if backend else None, variant=fault.id, status="unsupported",
                 reason=reason, data={"fault": fault.id, "outcome": "not applicable"},
                 source_hash=hash_of(backend) if backend else None)  # fmt: skip


def _one(fault: Fault, backend: Backend, worker: Worker) -> Trial:
    hashed = hash_of(backend, fault.problem_in(backend.id))
    if not _isolated(fault, backend):
        return _caught(fault, backend.id, hashed)
    trial = isolated_trial(prove, fault.id, backend.id, worker=worker, timeout_s=CRASH_LIMIT_S,
                           fields=_fields(fault, backend.id, hashed))  # fmt: skip
    if trial.status != "error":
        return trial
    crashed = trial.data["crashed"]
    accepted = crashed and fault.crash_is_found
    changes = {"data": {**trial.data, "outcome": "crashed" if crashed else "not planted"},
               "status": "ok" if accepted else "failed" if crashed else "error"}  # fmt: skip
    return trial.model_copy(update=changes)


def _fields(fault: Fault, backend_id: str, hashed: str | None) -> dict[str, Any]:
    """What the record of a bug has when nothing came of it."""
    data = _facts(fault) | {"found_stage": None, "producers": []}
    return dict(kind="fault", backend=backend_id, variant=fault.id, problem=fault.problem_in(backend_id),
                source_hash=hashed, data=data)  # fmt: skip


def _caught(fault: Fault, backend_id: str, hashed: str | None) -> Trial:
    """`prove`, in this process; what it raises becomes the record's status and reason."""
    fields = _fields(fault, backend_id, hashed)
    data = fields.pop("data")
    try:
        return prove(fault.id, backend_id)
    except (BackendUnavailable, Unsupported) as error:
        return Trial(**fields, status="unavailable", reason=error.reason, data={**data, "outcome": "not run"})
    except Exception as error:  # a patched kernel may raise anything; the record has to say so
        text = " ".join(str(error).split())[:500] or "no message"
        return Trial(**fields, status="error", reason=f"{type(error).__name__}: {text}",
                     data={**data, "outcome": "not planted"})  # fmt: skip


# ------------------------------------------------------------------------------------------------ clean runs


def random_cases(backend: Backend, n: int, *, seed: int = 0) -> Iterator[tuple[int, Problem, str, str]]:
    """`n` times a seed, a problem that the backend takes, an input pattern and a layout; the same for the same seed.

    Every pattern comes in turn. Shapes hold single rows, tails on both sides, grouped heads, unequal lengths and rows
    without keys; they are small, since an error does not depend on how often it is made. A backend over pages gets more
    problems with a few query tokens, groups of many heads, and all page sizes. One that takes masks gets every other
    problem under some of them.
    """
    rng = random.Random(f"{backend.id} {seed}")
    dtypes = list(backend.dtypes)
    head_dims = list(backend.head_dims or (1, 8, 40, 64, 128))
    heads, lengths = [1, 1, 2], [1, 2, 17, 31, 64, 96, 129]
    long = [*lengths, 200, 257] if backend.device == "cpu" else [*lengths, 300, 517, 1000]
    groups, page_sizes = [1, 1, 2, 3], [16, 64, 100, 128]
    if backend.paged:
        lengths, groups, page_sizes = [*lengths, 3, 5, 6, 8], [*groups, 4, 8, 9, 16], list(PAGE_SIZES)
    made = 0
    while made < n:
        num_heads_kv = rng.choice(heads)
        problem = Problem(
            batch=rng.choice([1, 2]), num_heads_kv=num_heads_kv, num_heads_q=num_heads_kv * rng.choice(groups),
            seqlen_q=rng.choice(lengths), seqlen_k=rng.choice(long), head_dim=rng.choice(head_dims),
            dtype=rng.choice(dtypes), causal=rng.random() < 0.5, page_size=rng.choice(page_sizes),
            softmax_scale=rng.choice([None, None, None, 1.0, -0.3, 0.0]),
        )  # fmt: skip
        layout, pattern = rng.choice(LAYOUTS), PATTERNS[made % len(PATTERNS)]
        if backend.rounds_scores and pattern == "large" and problem.dtype == "float16":
            problem = problem.with_(softmax_scale=None)  # scaled scores past 65504 overflow such a backend by design
        if backend.masks:
            problem = _randomly_masked(problem, backend.masks, rng)
        if backend.why_not(problem) is None:
            yield seed + made, problem, pattern, layout
            made += 1


def _randomly_masked(problem: Problem, masks: Sequence[str], rng: random.Random) -> Problem:
    """The problem under some of these masks; every other one stays as it is."""
    if rng.random() < 0.5:
        return problem
    limits, chance = [-1, 0, 1, 17, 64, 200], {}
    if "window" in masks:
        left, right = rng.choice(limits), rng.choice(limits)
        chance |= {"window_left": left, "window_right": -1 if problem.causal else right}
    if "softcap" in masks:
        chance["softcap"] = rng.choice([None, None, 1.0, 30.0])
    if "sink" in masks:
        chance["sink"] = rng.random() < 0.4
    lengths = ["right", "left"] * ("lengths" in masks) + ["ragged"] * ("ragged" in masks)
    if lengths and rng.random() < 0.6:
        chance |= {"lengths": rng.choice(lengths), "batch": rng.choice([1, 2, 6])}
    return problem.with_(**chance)


def clean_runs(
    run: RunFolder | None = None,
    backends: Sequence[Backend] | None = None,
    *,
    n: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Trial]:
    """Bisect backends with nothing planted on `n` random problems each; every alarm is a false one.

    Returns
    -------
    list of Trial
        One a backend, kind `bisection`, variant `clean-runs`; data `runs`, `alarms`, `first_alarm`, `values` judged,
        `seeds`, and how many runs had each dtype, pattern and layout. Status `failed` when there was an alarm.
    """
    return perform(clean_tasks(backends, n=n, seed=seed), run=run, progress=progress)[0]


def clean_tasks(backends: Sequence[Backend] | None = None, *, n: int = 100, seed: int = 0) -> list[Task]:
    """What `clean_runs` does, as tasks for `measure.cluster.perform`: one a backend."""
    return [
        Task(f"{n} clean runs of {backend.id}", _clean, (backend, n, seed), cost_s=5.0, host=on_host(backend),
             owed=({"kind": "bisection", "backend": backend.id, "variant": "clean-runs",
                    "source_hash": hash_of(backend), "data": {"runs": 0, "wanted": n}},))
        for backend in provable(backends)
    ]  # fmt: skip


def _clean(backend: Backend, n: int, seed: int) -> Iterator[Trial]:
    yield _clean_runs_of(backend, n, seed)


def _clean_runs_of(backend: Backend, n: int, seed: int) -> Trial:
    common = dict(kind="bisection", backend=backend.id, variant="clean-runs", source_hash=hash_of(backend))
    state = backend.availability()
    if not state.ok:
        return Trial(**common, status="unavailable", reason=f"{state.reason}; to mend it: {state.fix}",
                     data={"runs": 0, "wanted": n})  # fmt: skip
    counts = {name: collections.Counter() for name in ("dtypes", "patterns", "layouts", "head_dims")}
    done, alarms, values, first, causal, grouped, masked = 0, 0, 0, None, 0, 0, 0
    started = time.perf_counter()
    try:
        for case_seed, problem, pattern, layout in random_cases(backend, n, seed=seed):
            found = bisect(backend, problem, seed=case_seed, pattern=pattern, layout=layout)
            done += 1
            values += found.coverage["elements"]
            causal += problem.causal
            masked += bool(problem.masks)
            grouped += problem.num_heads_q != problem.num_heads_kv
            shown = {"dtypes": problem.dtype, "patterns": pattern, "layouts": layout, "head_dims": problem.head_dim}
            for name, value in shown.items():
                counts[name][str(value)] += 1
            if not found.passed:
                alarms += 1
                first = first or {"seed": case_seed, "problem": problem.label(), "pattern": pattern, "layout": layout,
                                  "finding": found.finding()}  # fmt: skip
    except Exception as error:  # a kernel that dies on a right problem is itself an alarm
        reason = f"run {done} of {n} did not finish: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Trial(**common, status="error", reason=reason, data={"runs": done, "wanted": n, "alarms": alarms})
    data = {"runs": done, "wanted": n, "alarms": alarms, "first_alarm": first, "values": values,
            "seeds": [seed, seed + n - 1], "causal": causal, "grouped_heads": grouped, "masked": masked,
            **{name: dict(sorted(count.items())) for name, count in counts.items()},
            "seconds": round(time.perf_counter() - started, 2)}  # fmt: skip
    reason = None
    if alarms:
        reason = f"{alarms} of {done} clean runs raised an alarm, first {first['problem']}: {first['finding']}"
    return Trial(**common, status="failed" if alarms else "ok", reason=reason, data=data)
