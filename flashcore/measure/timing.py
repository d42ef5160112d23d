"""Time attention calls so that the figures can be compared: graph replay, interleaved rounds, medians with spread."""

from __future__ import annotations

import math
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flashcore.numerics import ambient
from flashcore.problem import Problem
from flashcore.records import Timing, digits

ROUNDS = 30
SLOW_CALL_US = 20_000.0
SLOW_ROUNDS = 10
"""A call this slow has little spread, and thirty of them would take the run's whole time."""
SAMPLE_US = 2_000.0
"""Device time of one sample: long enough that the resolution of CUDA events (about 0.5 µs) is lost in it."""
MAX_CALLS = 200
EAGER_CALLS = 30
"""Few enough that the driver's queue of launches does not fill up, which would make the host wait for the GPU."""
MAX_INPUT_SETS = 64

Call = Callable[[int], None]
"""Runs a backend once on input set number i."""


@dataclass(frozen=True)
class Candidate:
    """One backend to be timed: a name, and a call that takes the number of an input set."""

    name: str
    call: Call


def input_sets(problem: Problem, *, l2: str, l2_bytes: int) -> int:
    """How many sets of buffers to rotate over, so that together they exceed twice the L2 cache; 1 when `warm`."""
    if l2 == "warm":
        return 1
    return max(1, min(MAX_INPUT_SETS, math.ceil(2 * l2_bytes / problem.bytes())))


@ambient.judging
def time_on_gpu(
    candidates: Sequence[Candidate], problem: Problem, *, sets: int = 1, rounds: int = ROUNDS, l2: str = "warm"
) -> dict[str, Timing | Exception]:
    """Time calls on the current GPU by CUDA-graph replay, interleaved round by round.

    Every candidate is captured once into a graph of enough calls for a sample of about `SAMPLE_US`. In each round
    every graph is replayed once between two events, in an order that rotates, so that clock drift and heat fall on
    all alike. Launch overhead is a separate figure: the host time of an eager call.

    Returns
    -------
    dict
        By name, a `Timing` whose `latency_us` is the median, with `launch_us` and the calls a graph holds; or the
        exception that kept the candidate from being timed. All share one `round`.
    """
    results: dict[str, Timing | Exception] = {}
    graphs: dict[str, _Captured] = {}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for candidate in candidates:
        try:
            with torch.cuda.stream(stream):
                graphs[candidate.name] = _capture(candidate.call, sets, stream)
        except Exception as error:  # whatever a backend raises is its result, and the others go on
            torch.cuda.synchronize()
            results[candidate.name] = error

    samples: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    with torch.cuda.stream(stream):
        for number in range(rounds):
            pending = []
            for name in order:
                captured = graphs[name]
                if captured.estimate_us > SLOW_CALL_US and number >= SLOW_ROUNDS:
                    continue
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                before.record(stream)
                captured.graph.replay()
                after.record(stream)
                pending.append((name, captured.calls, before, after))
            stream.synchronize()
            for name, calls, before, after in pending:
                samples[name].append(before.elapsed_time(after) * 1e3 / calls)
            order = order[1:] + order[:1]

    round_id = uuid.uuid4().hex[:12]
    for name, captured in graphs.items():
        results[name] = summarise(
            samples[name], problem, method="graph_replay", round_id=round_id, l2=l2,
            launch_us=captured.launch_us, calls=captured.calls, input_sets=sets,
        )  # fmt: skip
    torch.cuda.current_stream().wait_stream(stream)
    return results


@ambient.judging
def time_on_cpu(candidates: Sequence[Candidate], problem: Problem, *, rounds: int = 7) -> dict[str, Timing | Exception]:
    """Time calls on the CPU by the wall clock, interleaved round by round, after one warm-up each."""
    results: dict[str, Timing | Exception] = {}
    samples: dict[str, list[float]] = {}
    for candidate in candidates:
        try:
            candidate.call(0)
            samples[candidate.name] = []
        except Exception as error:
            results[candidate.name] = error
    order = [c for c in candidates if c.name in samples]
    for _ in range(rounds):
        for candidate in order:
            started = time.perf_counter()
            candidate.call(0)
            samples[candidate.name].append((time.perf_counter() - started) * 1e6)
        order = order[1:] + order[:1]
    round_id = uuid.uuid4().hex[:12]
    for name, taken in samples.items():
        results[name] = summarise(taken, problem, method="host", round_id=round_id, l2="warm")
    return results


def summarise(samples_us: Sequence[float], problem: Problem, *, method: str, round_id: str, l2: str, **more) -> Timing:
    """A `Timing` from samples: median, quartiles, TFLOPS by `Problem.flops()`; at most 50 samples are kept."""
    latency_us = statistics.median(samples_us)
    low, _, high = statistics.quantiles(samples_us, n=4) if len(samples_us) > 1 else (latency_us,) * 3
    return Timing(
        method=method,
        latency_us=digits(latency_us),
        samples_us=[digits(s, 5) for s in samples_us[:50]],
        tflops=digits(problem.flops() / latency_us / 1e6),
        round=round_id,
        l2=l2,
        quartiles_us=[digits(low), digits(high)],
        **more,
    )


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    calls: int
    """Calls in the graph."""
    estimate_us: float
    """Device time of one call, roughly."""
    launch_us: float
    """Host time of one eager call."""


def _capture(call: Call, sets: int, stream: torch.cuda.Stream) -> _Captured:
    """Warm up, time eager calls on the host, estimate one call on the device, and capture enough of them."""
    for number in range(max(3, min(sets, 8))):
        call(number % sets)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record(stream)
    for number in range(3):
        call(number % sets)
    after.record(stream)
    stream.synchronize()
    estimate_us = max(before.elapsed_time(after) * 1e3 / 3, 1.0)

    eager_calls = EAGER_CALLS if estimate_us < SLOW_CALL_US else 3
    started = time.perf_counter()
    for number in range(eager_calls):
        call(number % sets)
    launch_us = round((time.perf_counter() - started) * 1e6 / eager_calls, 3)
    stream.synchronize()

    calls = max(1, min(MAX_CALLS, round(SAMPLE_US / estimate_us)))
    if sets > 1:
        calls = max(sets, calls // sets * sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(calls):
            call(number % sets)
    graph.replay()
    stream.synchronize()
    return _Captured(graph, calls, estimate_us, launch_us)
