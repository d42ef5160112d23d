"""Survey cuBLASLt: what it offers for each product, how fast each candidate is, and which kernel really runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flashcore.errors import FlashCoreError
from flashcore.gpu import cublaslt, device
from flashcore.gpu.cublaslt import Algorithm, Plan, Product
from flashcore.measure.cluster import Pool, Task, perform
from flashcore.numerics import ambient
from flashcore.records import RunFolder, Timing, Trial
from flashcore.surveys.cublaslt import kernel_names, matmul_heuristics
from flashcore.surveys.cublaslt.grid import SurveyCase, lean, write_product
from flashcore.surveys.cublaslt.matmul_heuristics import Prediction

CASES_A_PASS = 24
"""Cases whose kernels are named in one pass of the profiler, which takes a while to start; what dies with a run."""
SHORT_PREFIXES = ("TILE_", "STAGES_", "SHAPE_")


@dataclass
class Measured:
    """One case with what was found: its candidates, the time of each, and the kernels it launched."""

    case: SurveyCase
    offered: list[Algorithm] = field(default_factory=list)
    times_us: list[float | None] = field(default_factory=list)
    kernels: list[list[str]] = field(default_factory=list)
    """Names each candidate launched, in the order of `offered`."""
    peer_us: float | None = None
    peer_kernels: list[str] = field(default_factory=list)
    peer_error: str | None = None
    error: str | None = None
    """Why there are no candidates."""


@dataclass(frozen=True)
class Roofs:
    """What this machine reached at best; None where it was not measured."""

    tflops: dict[str, float]
    """Of a large matrix product, by dtype."""
    copy_tbs: float | None
    """TB/s of a copy through device memory."""


# ------------------------------------------------------------------------------------------------ the survey


def survey(
    run: RunFolder,
    cases: Sequence[SurveyCase],
    *,
    pool: Pool | None = None,
    progress: Callable[[str], None] | None = None,
    resume: bool = True,
) -> list[Trial]:
    """Measure every case, one record a candidate, on disk before the next pass starts.

    A case that cuBLASLt refuses, and a candidate that fails, is a record with status `error`.

    Parameters
    ----------
    pool
        The workers, each of which takes some of the cases; None for this process alone.
    progress
        Called with one line a case, or a line for some cases that a worker begins.
    resume
        Leave out the cases whose records are complete in the run already.

    Returns
    -------
    list of Trial
        The records written by this call.

    Raises
    ------
    ToolMissing
        cuBLASLt or its bindings are not installed.
    """
    cublaslt.library()
    say = progress or (lambda line: None)
    done = finished_cases(run.trials(kind="gemm_candidate")) if resume else set()
    todo = [case for case in cases if case.id not in done]
    if len(todo) < len(cases):
        say(f"{len(cases) - len(todo)} of {len(cases)} cases are in the records already")
    if not todo:
        return []
    roofs = measure_roofs(run, pool=pool)
    if pool is None or not pool.places:
        return _here(run, todo, roofs, say)
    size = max(1, min(CASES_A_PASS, -(-len(todo) // len(pool.places))))
    passes = [todo[first : first + size] for first in range(0, len(todo), size)]
    tasks = [
        Task(f"{len(some)} cases of cuBLASLt from {some[0].id} on", surveyed, (some, roofs), timing=True, cost_s=2.0,
             owed=tuple({"kind": "gemm_candidate", "backend": "cublaslt", "variant": case.id} for case in some))
        for some in passes
    ]  # fmt: skip
    return perform(tasks, run=run, pool=pool, progress=progress)[0]


def _here(run: RunFolder, todo: Sequence[SurveyCase], roofs: Roofs, say: Callable[[str], None]) -> list[Trial]:
    written: list[Trial] = []
    for first in range(0, len(todo), CASES_A_PASS):

        def said(number: int, case: SurveyCase, outcome: str, first: int = first) -> None:
            say(f"{first + number} of {len(todo)}: {case.id} ({write_product(case.product)}): {outcome}")

        trials = surveyed(todo[first : first + CASES_A_PASS], roofs, said)
        written += [run.append(trial) for trial in trials]
    return written


@ambient.judging
def surveyed(
    cases: Sequence[SurveyCase], roofs: Roofs | None, said: Callable[[int, SurveyCase, str], None] | None = None
) -> list[Trial]:
    """The records of some cases, whose kernels are named in one pass of the profiler."""
    gpu, found = device.gpu_name(), []
    for number, case in enumerate(cases, start=1):
        found.append(measure_case(case))
        if said:
            said(number, case, _outcome(found[-1]))
    name_kernels(found)
    return [t for one in found for t in trials_of(one, roofs, matmul_heuristics.predict(one.case.product, gpu))]


def finished_cases(trials: Sequence[Trial]) -> set[str]:
    """Ids of the cases all of whose records are there; a case that was cut off in the middle is not among them."""
    seen: dict[str, set] = defaultdict(set)
    wanted: Counter[str] = Counter()
    for trial in trials:
        if trial.variant and isinstance(trial.data.get("of"), int):
            seen[trial.variant].add((trial.backend, trial.data.get("rank")))
            wanted[trial.variant] = trial.data["of"]
    return {name for name, records in seen.items() if len(records) >= wanted[name]}


def measure_case(case: SurveyCase) -> Measured:
    """Ask for candidates and time each; never raises for what cuBLASLt or cuBLAS answers."""
    found = Measured(case)
    try:
        found.offered = cublaslt.candidates(case.product, asked=case.asked, workspace_bytes=case.limit_bytes)
        found.times_us = cublaslt.measure(case.product, found.offered)
    except (FlashCoreError, RuntimeError) as error:
        found.error = str(error)
    if case.peer:
        try:
            found.peer_us = measure_peer(case.product)
        except (FlashCoreError, RuntimeError) as error:
            found.peer_error = str(error)
    return found


def name_kernels(found: Sequence[Measured]) -> None:
    """Fill in the kernels that each candidate, and cuBLAS beside it, launches: one pass of the profiler for all."""
    from flashcore.gpu.profiling import kernels_of

    calls: list[Callable[[], None]] = []
    for one in found:
        calls += [launcher(one.case.product, algorithm) for algorithm in one.offered]
        calls += [launcher(one.case.product, None)] if one.peer_us is not None else []
    names = iter(kernels_of(calls))
    for one in found:
        one.kernels = [next(names) for _ in one.offered]
        one.peer_kernels = next(names) if one.peer_us is not None else []


def _outcome(found: Measured) -> str:
    if found.error:
        return f"nothing: {_sentence(found.error)[:120]}"
    times = [t for t in found.times_us if t is not None]
    best = f"the fastest takes {min(times):.2f} µs" if times else "all of them failed"
    return f"{len(found.offered)} candidates, {best}"


# ------------------------------------------------------------------------------------------------ on the GPU


def _buffers(product: Product, workspace_bytes: int, *, random: bool) -> tuple[Any, Any, Any, Any]:
    """A, B, D and a workspace on the current GPU, as large as the product's strides ask for."""
    import torch

    kinds = {name: getattr(torch, name) for name in cublaslt.CUDA_TYPE}
    make = torch.randn if random else torch.empty
    last = product.batch - 1
    a = make(last * product.next_a + product.m * product.row_a, device="cuda", dtype=kinds[product.dtype])
    rows_b = product.n if product.transpose_b else product.k
    b = make(last * product.next_b + rows_b * product.row_b, device="cuda", dtype=kinds[product.dtype])
    d = torch.empty(
        last * product.next_d + product.m * product.row_d, device="cuda", dtype=kinds[product.out_dtype]
    )  # fmt: skip
    return a, b, d, torch.empty(max(workspace_bytes, 1), dtype=torch.uint8, device="cuda")


def launcher(product: Product, algorithm: Algorithm | None, plan: Plan | None = None) -> Callable[[], None]:
    """A call that launches the product once on torch's stream, through the `Plan` that backends use.

    Without an algorithm it goes through cuBLAS without Lt; with a plan that is ready, through that. What fails launches
    nothing.
    """

    def launch() -> None:
        import torch

        from flashcore.surveys.cublaslt import cublas

        stream = torch.cuda.current_stream().cuda_stream
        size = algorithm.workspace_bytes if algorithm else cublas.WORKSPACE_BYTES
        try:
            call = plan or (Plan(product, algorithm, alpha=1.0, beta=0.0) if algorithm else cublas.Call(product))
            a, b, d, room = _buffers(product, size, random=False)
            call.run(a.data_ptr(), b.data_ptr(), d.data_ptr(), stream=stream, workspace=room.data_ptr(),
                     workspace_bytes=size)  # fmt: skip
        except (FlashCoreError, RuntimeError):  # its time is missing too, which is where the reason is recorded
            return

    return launch


def measure_peer(product: Product) -> float:
    """Median device time in µs of the product through cuBLAS without Lt, by graph replay."""
    from flashcore.gpu.profiling import graph_us
    from flashcore.surveys.cublaslt import cublas

    call = cublas.Call(product)
    a, b, d, room = _buffers(product, cublas.WORKSPACE_BYTES, random=True)
    return graph_us(
        lambda stream: call.run(a.data_ptr(), b.data_ptr(), d.data_ptr(), stream=stream, workspace=room.data_ptr(),
                                workspace_bytes=cublas.WORKSPACE_BYTES)
    )  # fmt: skip


def measure_roofs(run: RunFolder, *, pool: Pool | None = None) -> Roofs:
    """The run's ceilings, measured and recorded first where they are missing; with a pool, on one of its cards."""
    from flashcore.measure.ceilings import ceilings

    known = _ceilings_in(run)
    if "copy_bandwidth" not in known:
        ceilings(run, pool=pool)
        known = _ceilings_in(run)
    if "l2_copy_bandwidth" not in known:
        perform([Task("copies inside the L2 cache", _l2_copy, timing=True, owed=({"kind": "ceiling"},))],
                run=run, pool=pool)  # fmt: skip
        known = _ceilings_in(run)
    return Roofs(
        {d: known[name] for d, name in (("float16", "matmul_fp16"), ("bfloat16", "matmul_bf16")) if name in known},
        known.get("copy_bandwidth"),
    )


@ambient.judging
def _l2_copy() -> list[Trial]:
    from flashcore.gpu.profiling import l2_copy_tbs

    data = {
        "name": "l2_copy_bandwidth", "value": l2_copy_tbs(), "unit": "TB/s", "device": device.gpu_name(),
        "method": "8 MiB copy inside the L2 cache, bytes read plus written, CUDA graph, median of 5",
    }  # fmt: skip
    return [Trial(kind="ceiling", data=data)]


def _ceilings_in(run: RunFolder) -> dict[str, float]:
    """Ceilings of a GPU in a run by name: TFLOPS and TB/s."""
    return {
        str(t.data.get("name")): float(t.data["value"])
        for t in run.trials(kind="ceiling", status="ok")
        if t.data.get("unit") in ("TFLOPS", "TB/s") and isinstance(t.data.get("value"), int | float)
    }


# ------------------------------------------------------------------------------------------------ records


def trials_of(found: Measured, roofs: Roofs | None, prediction: Prediction | None = None) -> list[Trial]:
    """The records of one case: candidates, and cuBLAS without Lt beside them.

    What belongs to the whole case (candidates offered, how many ask for workspace, how many run on Tensor Cores; where
    every candidate is kept, the prediction of nvidia-matmul-heuristics) stands in ``data["case"]`` of rank 0. What most
    candidates have is left out: `survey_grid.whole` puts it back.
    """
    case = found.case
    trials = [_candidate_trial(found, place, roofs, prediction) for place in _kept(found)]
    if found.error:
        data = {"group": case.group, "product": write_product(case.product), "limit_mb": case.limit_mb, "rank": None}
        trials.append(
            Trial(kind="gemm_candidate", backend="cublaslt", variant=case.id, status="error",
                  reason=_sentence(found.error), data=data)
        )  # fmt: skip
    if case.peer:
        trials.append(_peer_trial(found, roofs))
    return [t.model_copy(update={"data": {**t.data, "of": len(trials)}}) for t in trials]


def _kept(found: Measured) -> Iterator[int]:
    """Places of the candidates that become records."""
    places = range(len(found.offered) if found.times_us else 0)
    if found.case.keep_all:
        yield from places
        return
    timed = [p for p in places if found.times_us[p] is not None]
    failed = [p for p in places if found.times_us[p] is None]
    wanted = set(list(places)[:1] + failed[:2])
    if timed:
        wanted.add(min(timed, key=lambda p: found.times_us[p]))
        wanted.add(max(timed, key=lambda p: (found.offered[p].workspace_bytes, -p)))
    yield from sorted(wanted)


def _candidate_trial(found: Measured, place: int, roofs: Roofs | None, prediction: Prediction | None) -> Trial:
    case, algorithm, latency_us = found.case, found.offered[place], found.times_us[place]
    kernel = kernel_in(found.kernels[place] if found.kernels else [])
    data: dict[str, Any] = {
        "group": case.group, "product": write_product(case.product), "limit_mb": case.limit_mb, **attributes(algorithm),
        "kernel": kernel, "tensor_core": kernel_names.uses_tensor_cores(kernel),
    }  # fmt: skip
    if latency_us is not None:
        data |= _shares(case.product, latency_us, roofs)
    if place == 0:
        tensor = [kernel_names.uses_tensor_cores(kernel_in(names)) for names in found.kernels]
        data["case"] = {
            "offered": len(found.offered), "with_workspace": sum(a.workspace_bytes > 0 for a in found.offered),
            "with_tensor_core": sum(t is True for t in tensor),
        }  # fmt: skip
        if prediction and case.keep_all:
            data["case"]["prediction"] = _predicted(prediction)
    failed = "cublasLtMatmul did not run this candidate, or could not be captured into a graph"
    return Trial(
        kind="gemm_candidate", backend="cublaslt", variant=case.id, status="ok" if latency_us is not None else "error",
        reason=None if latency_us is not None else failed, timing=_timing(case.product, latency_us), data=lean(data),
    )  # fmt: skip


def _peer_trial(found: Measured, roofs: Roofs | None) -> Trial:
    case, kernel = found.case, kernel_in(found.peer_kernels)
    data = {
        "group": case.group, "product": write_product(case.product), "kernel": kernel,
        "tensor_core": kernel_names.uses_tensor_cores(kernel),
    }  # fmt: skip
    if found.peer_us is None:
        return Trial(kind="gemm_candidate", backend="cublas", variant=case.id, status="error",
                     reason=_sentence(found.peer_error), data=data)  # fmt: skip
    data |= _shares(case.product, found.peer_us, roofs)
    return Trial(kind="gemm_candidate", backend="cublas", variant=case.id, timing=_timing(case.product, found.peer_us),
                 data=data)  # fmt: skip


def attributes(algorithm: Algorithm) -> dict[str, Any]:
    """Every attribute of a candidate under its name, without the prefixes that cuBLASLt's enumerations repeat."""
    found = {name: value for name, value in asdict(algorithm).items() if name != "raw"}
    for name, value in found.items():
        if isinstance(value, str):
            for prefix in SHORT_PREFIXES:
                value = value.removeprefix(prefix)
            found[name] = value
    return found | {"waves_count": round(algorithm.waves_count, 4)}


def _timing(product: Product, latency_us: float | None) -> Timing | None:
    if latency_us is None:
        return None
    tflops = round(product.flops() / latency_us / 1e6, 3)
    return Timing(method="graph_replay", latency_us=round(latency_us, 4), tflops=tflops, l2="warm")


def _shares(product: Product, latency_us: float, roofs: Roofs | None) -> dict[str, float]:
    """Share of the compute roof, and of the memory roof by the fewest bytes; above 1 where the data stay in L2."""
    shares = {}
    if roofs and roofs.tflops.get(product.dtype):
        shares["compute_share"] = round(product.flops() / latency_us / 1e6 / roofs.tflops[product.dtype], 4)
    if roofs and roofs.copy_tbs:
        shares["memory_share"] = round(product.bytes() / latency_us / 1e6 / roofs.copy_tbs, 4)
    return shares


def _predicted(prediction: Prediction) -> dict[str, Any]:
    return {**asdict(prediction), "latency_us": round(prediction.latency_us, 2)}


def kernel_in(names: Sequence[str]) -> str | None:
    main = kernel_names.main_kernel(names)
    return None if main is None else kernel_names.short(main)


def _sentence(text: str | None) -> str:
    return next((line.strip() for line in (text or "").split("\n") if line.strip()), "no reason was given")[:200]
