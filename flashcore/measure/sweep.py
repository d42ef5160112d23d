"""Sweep problems over backends: is each one right, and how fast; one record each, written as it is measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from flashcore.backends import Backend, with_masks
from flashcore.decision import claims
from flashcore.errors import FlashCoreError, WrongWhenTimed
from flashcore.gpu import device
from flashcore.measure import workloads
from flashcore.measure.check import check_attention, correctness_of, hash_of
from flashcore.measure.cluster import Pool, Task, perform
from flashcore.measure.proof import Proof
from flashcore.measure.screening import screen
from flashcore.measure.timing import MOST_ROUNDS, Candidate, input_sets, time_on_cpu, time_on_gpu
from flashcore.numerics.inputs import lengths_of, make_inputs, make_masks
from flashcore.problem import PRESETS, Problem, parse_problem, square
from flashcore.records import RunFolder, Timing, Trial, digits

FOREIGN_S = 90.0
"""Seconds that all checks of a peer that is somebody else's package may take in a sweep: one that compiles a kernel for
each kind of problem could take all the time there is. The problems of gates come first."""
TOKENS = 32_768
"""Batch times sequence length, held constant over the sweep, as FlashAttention's own benchmarks do on 16K tokens."""
LATENCY_PROBLEMS = (PRESETS["latency"], square(1, 16, 1024, 64), square(1, 8, 512, 128))
REPORT_PROBLEMS = (PRESETS["report"], PRESETS["report-causal"])
GROUPED = Problem(batch=1, num_heads_q=32, num_heads_kv=8, seqlen_q=4096, seqlen_k=4096, head_dim=128,
                  dtype="bfloat16", causal=True)  # fmt: skip
AWKWARD_PROBLEMS = (
    square(32, 12, 197, 64), square(32, 12, 197, 128), square(2, 8, 777, 128), square(2, 16, 3000, 64, causal=True),
    GROUPED, GROUPED.with_(batch=8, seqlen_q=1024, seqlen_k=1024),
    *(problem.with_(dtype="bfloat16") for problem in REPORT_PROBLEMS),
    square(16, 16, 2048, 128, dtype="bfloat16"), square(4, 16, 8192, 128, dtype="bfloat16", causal=True),
)  # fmt: skip
"""Shapes that people have and that no line of lengths holds: an image's 197 tokens, lengths that fill no tile, query
heads in groups, and bfloat16, which is the only 16-bit type that some builds of FlashAttention-3 take."""
QUICK_AWKWARD = (AWKWARD_PROBLEMS[1], GROUPED, AWKWARD_PROBLEMS[6])
"""Those that a quick profile measures as well."""
MASKED = "masked"
"""What names the problems of the workloads with masks alone (`flashcore.measure.workloads`)."""
MASKED_ALONE = frozenset(workloads.problems("full")) - {*AWKWARD_PROBLEMS}
"""Problems that are there for the masks alone: backends that take none are not measured at those."""
COSTED_ALONE = frozenset(workloads.costed("full")) - {*AWKWARD_PROBLEMS}
"""Problems that are there for the cost of `batch_invariant` alone: who promises it is measured, and peers beside it."""
STORES_SCORES = frozenset({"sdpa-math"})
"""Takes some masks, and stores all scores: here more than a GPU's memory, or a minute for one figure."""


def sweep_problems(profile: str, gpu: bool) -> list[Problem]:
    """The problems a profile measures: the report's workload and the small ones first, then lengths at constant work.

    Parameters
    ----------
    profile
        `quick` or `full`.
    gpu
        Whether there is a GPU; the CPU's problems are small enough for two cores.
    """
    if not gpu:
        lengths = (128, 256, 512) if profile == "quick" else (128, 256, 512, 1024)
        return [square(1, 4, s, d, dtype="float32", causal=c) for d in (64,) for c in (False, True) for s in lengths]
    problems = [*REPORT_PROBLEMS, *LATENCY_PROBLEMS]
    lengths = (1024, 4096) if profile == "quick" else (512, 1024, 2048, 4096, 8192, 16384)
    for head_dim in (64, 128):
        for causal in (False, True):
            for seqlen in lengths:
                batch = min(16, max(1, TOKENS // seqlen))
                problem = square(batch, 16, seqlen, head_dim, causal=causal)
                if problem not in problems:
                    problems.append(problem)
    problems += QUICK_AWKWARD if profile == "quick" else AWKWARD_PROBLEMS
    return list(dict.fromkeys([*problems, *workloads.problems(profile), *workloads.costed(profile)]))


def named_problems(names: str, profile: str, gpu: bool) -> list[Problem]:
    """Problems by a `;`-separated list of presets and labels, `default` for the profile's own, `masked` for the part of
    them that has masks."""
    if names.strip() == "default":
        return sweep_problems(profile, gpu)
    if names.strip() == MASKED:
        return workloads.problems(profile)
    return [parse_problem(name) for name in names.split(";") if name.strip()]


def sweep(
    run: RunFolder,
    problems: Sequence[Problem],
    backends: Sequence[Backend],
    *,
    seed: int = 0,
    gpu: bool | None = None,
    pool: Pool | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Trial]:
    """Check, then time every backend on every problem; each trial is on disk before the next one starts.

    Problems that are held against each other (`workloads.grouped`) share their rounds: those that a workload names, and
    one without `batch_invariant` and with it.

    A backend that is not available here, or does not take a problem, gets one trial that says so. A wrong backend is
    timed too, but its timing says `failed`, and no gate accepts that. The float64 reference is left out: it is what the
    others are checked against, and its speed interests nobody.

    On a GPU, packages of others are first called in processes that may die (`flashcore.measure.screening`); where one
    died, its timing says so and this process does not call it.

    Parameters
    ----------
    gpu
        Whether to measure on the GPU; None for wherever there is one. False takes backends that run on the CPU alone.
    pool
        The workers, each of which takes whole problems; None for this process alone.
    """
    on_gpu = device.has_gpu() if gpu is None else gpu
    found: list[Task | Trial] = []
    ready: list[Backend] = []
    for backend in (b for b in backends if b.role != "reference"):
        state = backend.availability()
        if state.ok:
            ready.append(backend)
        else:
            reason = f"{state.reason}; to mend it: {state.fix}"
            found.append(Trial(kind="attention_timing", backend=backend.id, status="unavailable", reason=reason))
    barred: dict[tuple[str, Problem], str] = {}
    if on_gpu and not (pool and pool.places):  # the workers of a pool may die
        foreign = [b for b in ready if b.foreign]
        barred = screen([(b, p) for p in problems for b in foreign if _concerns(b, p) and _why_not(b, p) is None],
                        seed=seed, progress=progress)  # fmt: skip
    spent: dict[str, float] = {}
    groups, first = workloads.grouped(problems), 1
    for group in groups:
        owed = tuple(
            {"kind": "attention_timing", "backend": b.id, "problem": problem, "source_hash": hash_of(b, problem)}
            for problem in group
            for b in ready
            if _concerns(b, problem)
        )
        last = first + len(group) - 1
        which, beside = (f"{first} to {last}", f" and {last - first} beside it") if last > first else (str(first), "")
        found.append(Task(f"{which} of {sum(map(len, groups))}: {group[0].label()}{beside}", _together,
                          (group, ready, seed, gpu, on_gpu, barred, spent), owed=owed, timing=True,
                          cost_s=sum(problem.flops() for problem in group) / 1e12))  # fmt: skip
        first = last + 1
    return perform(found, run=run, pool=pool, progress=progress)[0]


def _concerns(backend: Backend, problem: Problem) -> bool:
    """Whether a sweep has anything to say of a backend at this problem."""
    if not backend.swept and problem not in REPORT_PROBLEMS:
        return False
    if problem in COSTED_ALONE and not backend.batch_invariant:
        return backend.role == "peer" and not problem.batch_invariant
    return bool(problem not in MASKED_ALONE or backend.masks)


def _together(
    problems: Sequence[Problem], ready: Sequence[Backend], seed: int, gpu: bool | None, on_gpu: bool,
    barred: Mapping[tuple[str, Problem], str], spent: dict[str, float],
) -> Iterator[Trial]:  # fmt: skip
    """Check, then time the backends on one problem, or on several that are held against each other; all of it on one
    card, since the timings share a round.

    `barred` says by id and problem which calls this process must not make, and `spent` counts the seconds that checks
    of packages of others took so far.
    """
    candidates: list[tuple[Backend, Trial, Problem]] = []
    for problem in problems:
        for backend in ready:
            if not _concerns(backend, problem):
                continue
            reason = _why_not(backend, problem)
            if reason:
                yield _timing_trial(backend, problem, status="unsupported", reason=reason)
                continue
            if died := barred.get((backend.id, problem)):
                yield _timing_trial(backend, problem, status="error", reason=died)
                continue
            if spent.get(backend.id, 0.0) > FOREIGN_S:
                reason = f"its checks took more than {FOREIGN_S:g} s, so it was asked at no further problem"
                yield _timing_trial(backend, problem, status="unavailable", reason=reason)
                continue
            started = time.perf_counter()
            checked = check_attention(
                backend, problem, seed=seed, device="cpu" if gpu is False else None,
                lengths=workloads.kind_of_lengths(problem),
            )  # fmt: skip
            if backend.foreign and backend.role == "peer":
                spent[backend.id] = spent.get(backend.id, 0.0) + time.perf_counter() - started
            yield checked
            if checked.status in ("ok", "failed"):
                candidates.append((backend, checked, problem))
            elif checked.status == "unsupported":  # said by the package itself, when it was called
                yield _timing_trial(backend, problem, status="unsupported", reason=checked.reason)
    timings = _time([(backend, problem) for backend, _, problem in candidates], seed, on_gpu)
    for (backend, checked, problem), timing in zip(candidates, timings, strict=True):
        late = isinstance(timing, WrongWhenTimed)
        if isinstance(timing, Exception) and not late:
            reason = f"{type(timing).__name__}: {timing}"
            yield _timing_trial(backend, problem, status="error", reason=reason)
        elif checked.status == "failed":
            reason = f"its result is wrong, so its speed counts for nothing ({checked.reason})"
            measured = timing.timing if late else timing
            yield _timing_trial(backend, problem, status="failed", reason=reason, timing=measured)
        elif late:
            yield _wrong_when_timed(backend, problem, timing)
            yield _timing_trial(backend, problem, status="failed", reason=str(timing), timing=timing.timing)
        else:
            yield _timing_trial(backend, problem, timing=timing)
    if on_gpu:
        torch.cuda.empty_cache()  # the next problem may need the memory in other pieces


def _why_not(backend: Backend, problem: Problem) -> str | None:
    """Why a backend is not measured at a problem, as a clause; None where it is."""
    if problem in MASKED_ALONE | COSTED_ALONE and backend.id in STORES_SCORES:
        return "it stores all scores, which takes too much memory and time here"
    reason = backend.why_not(problem)
    if reason is None and not backend.dense:
        return "it reads K and V in pages; 'flashcore paging' times it"
    return reason


def _wrong_when_timed(backend: Backend, problem: Problem, error: WrongWhenTimed) -> Trial:
    """The record of a check that the timing made: what a backend returned in a timed call was wrong."""
    found = None if error.found is None else correctness_of(error.found, None)
    return Trial(
        kind="correctness", backend=backend.id, problem=problem, status="failed", reason=error.reason,
        correctness=found, data={"role": backend.role, "timed": True}, source_hash=backend.source_hash(problem),
    )  # fmt: skip


def _timing_trial(backend: Backend, problem: Problem, **fields) -> Trial:
    version = backend.software() if backend.role == "peer" else None
    data = {"version": version} if version else {}
    if problem.lengths:
        data["lengths"] = workloads.kind_of_lengths(problem)
    return Trial(
        kind="attention_timing", backend=backend.id, problem=problem, data=data,
        source_hash=backend.source_hash(problem), **fields,
    )  # fmt: skip


def _time(candidates: Sequence[tuple[Backend, Problem]], seed: int, gpu: bool) -> list[Timing | Exception]:
    """Time all backends of one problem, or of several that belong together, so that their figures share a round."""
    if not candidates:
        return []
    problems = list(dict.fromkeys(problem for _, problem in candidates))
    warm = not gpu or any(problem in LATENCY_PROBLEMS for problem in problems)
    l2 = "warm" if warm else "rotating"
    sets = max(input_sets(problem, l2=l2, l2_bytes=device.l2_bytes()) for problem in problems) if gpu else 1
    before = _clocks()
    calls: dict[Problem, list[Candidate]] = {}
    for problem in problems:
        backends = [backend for backend, of in candidates if of == problem]
        calls[problem] = _calls(backends, problem, seed, "cuda" if gpu else "cpu", sets, alone=len(problems) == 1)
    chosen = [candidate for problem in problems for candidate in calls[problem]]
    if gpu:
        decides = any(problem in REPORT_PROBLEMS or problem in LATENCY_PROBLEMS for problem in problems)
        timings = time_on_gpu(chosen, problems[0], sets=sets, l2=l2, most_rounds=MOST_ROUNDS, other_clocks=decides)
    else:
        timings = time_on_cpu(chosen, problems[0])
    after = _clocks()
    for candidate in chosen:
        timing = timings[candidate.name]
        if isinstance(timing, Timing) and gpu:
            clocks = {"clocks_before": before, "clocks_after": after}
            light = speed_of_light(timing, candidate.problem, _data_sheet())
            timings[candidate.name] = timing.model_copy(update=clocks | light)
    waiting = {problem: iter(calls[problem]) for problem in problems}
    return [timings[next(waiting[problem]).name] for _, problem in candidates]


def _calls(
    backends: Sequence[Backend], problem: Problem, seed: int, place: str, sets: int, *, alone: bool
) -> list[Candidate]:
    """The calls of some backends at one problem, on the same inputs and with one proof of what they return.

    Where not all that is timed is of this problem (`alone`), their names say what they compute.
    """
    kind = workloads.kind_of_lengths(problem)
    masks = make_masks(problem, seed=seed, device=place, lengths=kind)
    given = with_masks(masks)
    # Every row of a ragged batch belongs to a sequence: a peer's time does not hold what ours does about the others.
    more = {"masks": masks, "spare": 0} if problem.lengths == "ragged" else given
    tensors = [make_inputs(problem, seed=seed + i, device=place, **more) for i in range(sets)]
    proof = Proof(problem, tensors, masks, max(backend.tanh_error for backend in backends))
    flops = problem.flops_of(*lengths_of(problem, seed, kind)) if problem.lengths else None
    return [
        Candidate(
            backend.id if alone else f"{backend.id} at {problem.label()}",
            lambda i, backend=backend: backend.run(*tensors[i], problem, **given),
            backend.rounds_scores, problem, proof, flops,
        )
        for backend in backends
    ]  # fmt: skip


def speed_of_light(timing: Timing, problem: Problem, sheet: claims.Gpu | None) -> dict[str, float]:
    """Which shares of what the GPU can do by its data sheet a timing reached, as fields of its record.

    Parameters
    ----------
    sheet
        Of the GPU; None where there is none, and then nothing is said.

    Returns
    -------
    dict
        ``peak_share``: of the peak of dense matrix products, at the clock seen during the timing instead of the one
        that the data sheet counts with; left out where no clock was seen. ``memory_share``: of the memory's bandwidth,
        by `Problem.bytes`; left out where the buffers stayed in the L2 cache, and where sequences have lengths, which
        say what is read.
    """
    if sheet is None:
        return {}
    found = {}
    clock_mhz = (timing.more("during") or {}).get("sm_clock_mhz")
    peak = sheet.peak_tflops.get(problem.dtype)
    if clock_mhz and peak and sheet.peak_clock_ghz and timing.tflops:
        found["peak_share"] = digits(timing.tflops / (peak * clock_mhz[1] / 1e3 / sheet.peak_clock_ghz), 4)
    if timing.l2 != "warm" and not problem.lengths:
        found["memory_share"] = digits(problem.bytes() / timing.latency_us / 1e6 / sheet.memory_tb_s, 4)
    return found


@functools.cache
def _data_sheet() -> claims.Gpu | None:
    """The data sheet of this GPU, from the file of claims; None where that has none or cannot be read."""
    try:
        sheets = claims.load_claims().gpus
    except FlashCoreError:  # said by 'flashcore claims'; a timing needs no data sheet
        return None
    return next((sheet for sheet in sheets if sheet.is_named(device.gpu_name())), None)


def _clocks() -> dict[str, object]:
    """What may change from one timing to the next; the memory's clock does not, and stands in the environment."""
    return {name: value for name, value in device.clocks().items() if name != "memory_clock_mhz"}
