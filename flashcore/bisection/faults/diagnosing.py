"""Prove the diagnosis: plant every known bug, hide the stages, see what outputs alone tell; ask right code too."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from flashcore import backends as registry
from flashcore import tables
from flashcore.backends import Backend
from flashcore.bisection.diagnosis import Diagnosis, diagnose
from flashcore.bisection.faults.catalogue import FAULTS, get
from flashcore.bisection.faults.planting import Source
from flashcore.bisection.faults.proving import compile_planted, expendable
from flashcore.errors import BackendUnavailable, FlashCoreError, Unsupported
from flashcore.gpu.isolation import START_S, Worker, isolated_trial
from flashcore.measure.check import device_of, on_host
from flashcore.measure.cluster import Here, Task, Work, crew, perform
from flashcore.numerics.inputs import PATTERNS, make_inputs
from flashcore.problem import Problem
from flashcore.records import RunFolder, Trial

LIMIT_S = 120.0
LONG = 5000
"""Keys of the second problem that a bug is looked for on, where the first does not show it: many pages a block."""
CALL_LIMIT_S = 10.0
PEER_CALL_LIMIT_S = 60.0
"""The same for a peer, which may compile a kernel at the first call of each kind while all cores are busy."""
ALL_CLEAN_LIMIT_S = 600.0
"""Seconds for all clean cases of a backend, where they are asked one after the other."""
CLEAN_LIMIT_S = 150.0
"""Seconds for the cases of one task; asked alone, a backend takes 4 s for them, and a peer that compiles some 40."""
TRIES = 200
"""Random problems that are drawn for one that a backend takes."""
CLEAN_CASES = 100
"""Random problems that each right backend is asked about."""
AT_ONCE = 25
"""Of those as many as one task holds."""
CLASSES: dict[str, tuple[str, ...]] = {
    "scores": ("scores", "probs"),
    "row_max": ("row_max", "probs", "scores"),
    "rescale": ("rescale", "probs", "scores", "row_sum", "accum"),
    "probs": ("probs", "scores", "row_max", "rescale"),
    "row_sum": ("row_sum", "scores", "out"),
    "accum": ("accum", "out"),
    "out": ("out", "accum", "row_sum"),
    "lse": ("lse",),
}
"""For each stage those that a bug of it may be taken for, since an output shows their product alone."""
REASONS: dict[str, str] = {
    "scores": "a weight is exp(score - maximum): a wrong score and a wrong exponential look alike",
    "row_max": "the maximum cancels out; it shows only where it lets an exponential overflow",
    "rescale": "a factor on earlier pages is one on their weights, and on one of the two sums if it misses the other",
    "probs": "a weight is exp(score - maximum): a wrong score looks alike, and a wrong reference like a wrong rescale",
    "row_sum": "a row's sum that is too large is one key more, or an output that is too small",
    "accum": "the output is the accumulator over the sum: NaN in either is NaN in the output",
    "out": "an element that was not written may hold what any sum could give",
    "lse": "it is returned by itself",
}


def plan(backends: Sequence[Backend]) -> list[tuple[str, str]]:
    """Faults and backends that can be asked about: bugs of a backend's stages that change what it returns.

    Those that show under a window, a softcap, a sink or lengths are left out: a diagnosis asks about none of these.
    """
    return [(fault.id, backend.id) for backend in backends for fault in FAULTS
            if fault.why_not(backend.id) is None and fault.found_by == "bisection"
            and not fault.problem_in(backend.id).masks]  # fmt: skip


def prove(fault_id: str, backend_id: str) -> Trial:
    """Plant one bug and diagnose by outputs alone. Importable, to be run in another process.

    Returns
    -------
    Trial
        Kind ``diagnosis``, variant the fault's id; data `outcome`: ``stage`` (its stage is named alone or among
        several), ``class`` (one is named that no output can tell apart from it), ``elsewhere`` (found, at another),
        ``raised`` (an error of its own says so), ``not visible`` (no output has another bit), or ``missed``.
    """
    fault = get(fault_id)
    problem = fault.problem_in(backend_id)
    started = time.perf_counter()
    base = {"fault": fault_id, "expected": fault.stage}
    try:
        planted = fault.plant(backend_id)
        found = diagnose(planted, problem, time_limit_s=CALL_LIMIT_S, smallest=False)
        if found.right and same_bits(planted, backend_id, problem):
            longer = problem.with_(seqlen_k=LONG)
            found = diagnose(planted, longer, time_limit_s=CALL_LIMIT_S, smallest=False)
            if found.right and same_bits(planted, backend_id, longer):
                data = {
                    **base,
                    "outcome": "not visible",
                    "finding": "it changes no bit of the output on these problems",
                }
                return Trial(kind="diagnosis", backend=backend_id, variant=fault_id, problem=problem, data=data)
            problem = longer if not found.right else problem
    except FlashCoreError as error:
        if not fault.error_is_found:
            raise
        data = {**base, "outcome": "raised", "finding": str(error), "seconds": time.perf_counter() - started}
        return Trial(kind="diagnosis", backend=backend_id, variant=fault_id, problem=problem, data=data)
    outcome = judge(found, fault.stage, crash=fault.crash_is_found, error=fault.error_is_found)
    if outcome == "elsewhere" and not any(s.broken for s in found.screened):  # somebody will look into this one
        found = replace(found, smallest=diagnose(planted, problem, time_limit_s=CALL_LIMIT_S).smallest)
    trial = found.to_trial()
    data = {**trial.data, **base, "outcome": outcome}
    if outcome == "class":
        data["looks_alike"] = REASONS[fault.stage]
    status = "ok" if outcome in ("stage", "class", "raised") else "failed"
    reason = (
        None if status == "ok" else f"{fault_id} was planted in {backend_id} at {fault.stage}, and {found.headline()}"
    )
    return Trial(kind="diagnosis", backend=backend_id, variant=fault_id, problem=problem, data=data, status=status,
                 reason=reason)  # fmt: skip


def same_bits(planted: Backend, backend_id: str, problem: Problem) -> bool:
    """Whether a backend with a bug in it gives the bits of the one without, whatever the inputs look like."""
    right = registry.get(backend_id)
    for pattern in PATTERNS:
        q, k, v = make_inputs(problem, device=device_of(right), pattern=pattern)
        for one, other in zip(planted.run(q, k, v, problem), right.run(q, k, v, problem), strict=True):
            if not bool(((one == other) | (one.isnan() & other.isnan())).all()):
                return False
    return True


def judge(found: Diagnosis, stage: str, *, crash: bool = False, error: bool = False) -> str:
    """The outcome of a diagnosis of a function with a bug at `stage`; with `crash`, no answer is one."""
    if found.right:
        return "missed"
    if found.home is None or any(s.broken for s in found.screened):
        return "raised" if crash or error else "elsewhere"
    if stage in found.stages:
        return "stage"
    return "class" if set(found.stages) & set(CLASSES.get(stage, ())) else "elsewhere"


def prove_all(
    run: RunFolder | None, backends: Sequence[Backend], progress: Callable[[str], None] | None = None
) -> list[Trial]:
    """Every bug of `plan`, and clean cases of each backend, in processes that may die; records go to `run`.

    On a GPU several of them share the card, where this machine has cores and memory for that (`cluster.crew`).
    """
    workers = crew(Here())
    if isinstance(workers, Here):
        return _prove_one_by_one(run, backends, progress)
    try:
        found = perform(*works(backends, backends, progress=progress), run=run, pool=workers, progress=progress)
    finally:
        workers.close()
    return [trial for trials in found for trial in trials]


def works(
    planted: Sequence[Backend], clean: Sequence[Backend], *, most_bugs: int = 0, cases: int = CLEAN_CASES,
    seed: int = 0, progress: Callable[[str], None] | None = None,
) -> tuple[Work, Work]:  # fmt: skip
    """The whole proof for `measure.cluster.perform`: planted bugs, whose kernels compile first, and clean cases.

    Parameters
    ----------
    planted, clean, most_bugs, cases, seed
        As of `tasks`.
    progress
        Told how many kernels are compiled.
    """
    bugs = Work(tasks(planted, [], most_bugs=most_bugs), lambda here: _compile(planted, most_bugs, progress),
                expendable().close)  # fmt: skip
    return bugs, Work(tasks([], clean, cases=cases, seed=seed))


def _compile(backends: Sequence[Backend], most_bugs: int, progress: Callable[[str], None] | None) -> None:
    """Compile the one variant that each bug is first asked about in, and none of a bug that is left out."""
    by_id = {one.id: one for one in backends}
    first = [(get(fault_id), by_id[ids[0]]) for fault_id, ids in _asked(backends, most_bugs)]
    compile_planted(first, progress, traced=(False,))


def _asked(backends: Sequence[Backend], most_bugs: int = 0) -> list[tuple[str, tuple[str, ...]]]:
    """Each bug of the plan with the backends to ask about it in turn, until one tells it.

    Backends of one kernel run it in different shapes. The same patch for the same problem is one bug to them.
    """
    kernels = {one.id: one.kernel for one in backends}
    in_turn: dict[tuple, tuple[str, list[str]]] = {}
    count: Counter[str] = Counter()
    for fault_id, backend_id in plan(backends):
        count[backend_id] += 1
        if most_bugs and count[backend_id] > most_bugs:
            continue
        fault, kernel = get(fault_id), kernels[backend_id]
        plant = fault.plants[backend_id]
        shared = isinstance(plant, Source) and kernel and not plant.methods
        what = (kernel, plant.edits, fault.problem_in(backend_id)) if shared else backend_id
        in_turn.setdefault((fault_id, what), (fault_id, []))[1].append(backend_id)
    return [(fault_id, tuple(ids)) for fault_id, ids in in_turn.values()]


def _prove_one_by_one(
    run: RunFolder | None, backends: Sequence[Backend], progress: Callable[[str], None] | None
) -> list[Trial]:
    found: list[Trial] = []

    def keep(trial: Trial) -> None:
        found.append(run.append(trial) if run else trial)

    _compile(backends, 0, progress)
    with Worker(warm="flashcore.bisection.faults.diagnosing") as worker:
        for fault_id, ids in _asked(backends):
            for backend_id in ids:
                if progress:
                    progress(f"{fault_id} in {backend_id}")
                keep(_apart(fault_id, backend_id, worker))
                if found[-1].data.get("outcome") in tables.TOLD:
                    break
    for one in backends:
        if progress:
            progress(f"{one.id}, as it is")
        fields = {"kind": "diagnosis", "backend": one.id, "variant": "clean"}
        keep(isolated_trial(ask_clean, one.id, timeout_s=ALL_CLEAN_LIMIT_S, fields=fields))
    return found


def _fields(fault_id: str, backend_id: str) -> dict[str, Any]:
    """What the record of a bug has when nothing came of it."""
    fault = get(fault_id)
    return {"kind": "diagnosis", "backend": backend_id, "variant": fault_id, "problem": fault.problem_in(backend_id),
            "data": {"fault": fault_id, "expected": fault.stage}}  # fmt: skip


def _apart(fault_id: str, backend_id: str, worker: Worker) -> Trial:
    """`prove` in a process that may die, which is an answer for a bug that may crash."""
    trial = isolated_trial(prove, fault_id, backend_id, worker=worker, timeout_s=LIMIT_S,
                           fields=_fields(fault_id, backend_id))  # fmt: skip
    if trial.data.get("crashed"):
        expected = get(fault_id).may_crash
        return trial.model_copy(update={
            "data": {**trial.data, "outcome": "raised" if expected else "elsewhere"},
            "status": "ok" if expected else "failed",
        })  # fmt: skip
    if trial.status == "error":
        return trial.model_copy(update={"data": {**trial.data, "outcome": "elsewhere"}})
    return trial


def tasks(
    planted: Sequence[Backend], clean: Sequence[Backend], *, most_bugs: int = 0, cases: int = CLEAN_CASES, seed: int = 0
) -> list[Task]:
    """The whole proof as tasks for processes that may die (`cluster.crew`): a bug each, and clean cases.

    The kernels with a bug in them have to be compiled before, or each task compiles its own.

    Parameters
    ----------
    planted
        Backends to plant bugs in.
    clean
        Right backends, ours and peers, to ask about random problems.
    most_bugs
        How many bugs to plant in each backend at most; 0 for all of them.
    cases
        How many random problems each right backend is asked about.
    seed
        Of the random problems; each task takes the next.

    Raises
    ------
    FlashCoreError
        `most_bugs` or `cases` is below 0.
    """
    for name, number in (("most_bugs", most_bugs), ("cases", cases)):
        if number < 0:
            raise FlashCoreError(f"{name}: {number} is no number of them; give one from 0 on.")
    found = []
    for fault_id, (backend_id, *others) in _asked(planted, most_bugs):
        fields = _fields(fault_id, backend_id)
        owed = {**fields, "data": {**fields["data"], "outcome": "elsewhere"}}
        found.append(Task(f"diagnose {fault_id} in {backend_id}", _proved, (fault_id, backend_id, *others),
                          owed=(owed,), limit_s=LIMIT_S * (1 + len(others)) + START_S,
                          host=all(on_host(registry.get(one)) for one in (backend_id, *others)),
                          cost_s=3.0 if get(fault_id).may_crash else 1.4))  # fmt: skip
    for backend in clean:
        for first in range(0, cases, AT_ONCE):
            wanted = min(AT_ONCE, cases - first)
            owed = {"kind": "diagnosis", "backend": backend.id, "variant": "clean",
                    "data": {"cases": 0, "wanted": wanted, "seed": seed + first}}  # fmt: skip
            found.append(Task(f"{wanted} clean cases of {backend.id}, seed {seed + first}", _asked_clean,
                              (backend.id, wanted, seed + first), owed=(owed,), limit_s=CLEAN_LIMIT_S,
                              host=on_host(backend),
                              cost_s=30.0 if backend.foreign else 4.0))  # fmt: skip
    return found


def _proved(fault_id: str, *backend_ids: str) -> Iterator[Trial]:
    """The records of one bug, asked about in these backends in turn until one tells it."""
    for backend_id in backend_ids:
        trial = _proved_in(fault_id, backend_id)
        yield trial
        if trial.data.get("outcome") in tables.TOLD:
            return


def _proved_in(fault_id: str, backend_id: str) -> Trial:
    """The record of one bug in one backend, asked about in this process unless it may crash."""
    if get(fault_id).may_crash:
        return _apart(fault_id, backend_id, expendable())
    try:
        return prove(fault_id, backend_id)
    except Exception as error:  # a patched kernel may raise anything; the record has to say so
        fields = _fields(fault_id, backend_id)
        said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return Trial(**{**fields, "data": {**fields["data"], "outcome": "elsewhere"}}, status="error", reason=said)


def _asked_clean(backend_id: str, cases: int, seed: int) -> Iterator[Trial]:
    fields = dict(kind="diagnosis", backend=backend_id, variant="clean",
                  data={"cases": 0, "wanted": cases, "seed": seed})  # fmt: skip
    try:
        yield ask_clean(backend_id, cases, seed)
    except BackendUnavailable as error:
        yield Trial(**fields, status="unavailable", reason=f"{error.reason}; to mend it: {error.fix}")
    except Unsupported as error:
        yield Trial(**fields, status="unsupported", reason=error.reason)


def random_problem(generator: random.Random) -> Problem:
    """A problem of ordinary size: any lengths, groups of heads and masks, with no row that sees no key."""
    kv = generator.choice([1, 2, 3])
    causal = generator.random() < 0.5
    keys = generator.randint(1, 300)
    rows = generator.randint(1, keys) if causal else generator.randint(1, 300)
    return Problem(batch=generator.randint(1, 3), num_heads_kv=kv, num_heads_q=kv * generator.choice([1, 2, 4]),
                   seqlen_q=rows, seqlen_k=keys, head_dim=generator.choice([64, 128]), causal=causal,
                   dtype=generator.choice(["float16", "bfloat16"]))  # fmt: skip


def ask_clean(backend_id: str, cases: int = CLEAN_CASES, seed: int = 0) -> Trial:
    """Diagnose a right backend on random problems; an alarm is a failure. Importable, to be run in another process."""
    backend = registry.get(backend_id)
    backend.require()
    generator = random.Random(seed)
    asked, alarms = 0, []
    while asked < cases:
        problem = backend.suits(random_problem(generator))
        for _ in range(TRIES):
            if backend.why_not(problem) is None:
                break
            problem = backend.suits(random_problem(generator))
        else:
            raise Unsupported(backend_id, backend.why_not(problem))
        limit_s = PEER_CALL_LIMIT_S if backend.foreign else CALL_LIMIT_S
        found = diagnose(backend, problem, seed=generator.randrange(1 << 20), time_limit_s=limit_s)
        asked += 1
        if not found.right:
            alarms.append(f"{problem.label()}: {found.headline()}")
    data: dict[str, Any] = {"cases": asked, "alarms": len(alarms), "seed": seed}
    return Trial(kind="diagnosis", backend=backend_id, variant="clean", data=data, status="failed" if alarms else "ok",
                 reason=alarms[0] if alarms else None)  # fmt: skip


def sentence(trials: Sequence[Trial]) -> str:
    """What the proof says, counted."""
    return tables.diagnosis_sentence(trials)
