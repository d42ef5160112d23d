"""Time attention calls so that the figures can be compared: graph replay, interleaved rounds, medians with spread."""

from __future__ import annotations

import math
import secrets
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.errors import InvalidTiming, WrongWhenTimed
from flashcore.measure.proof import Proof
from flashcore.numerics import ambient, instruments
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

_clock = time.perf_counter
"""The host's clock, as it was when FlashCore began."""
Call = Callable[[int], Any]
"""Runs a backend once on input set number i, and gives what it returned."""


@dataclass(frozen=True)
class Candidate:
    """One backend to be timed: a name, and a call that takes the number of an input set."""

    name: str
    call: Call
    round_scores: bool = False
    """As `Backend.rounds_scores`: what its results are held to, where they are proved."""


def input_sets(problem: Problem, *, l2: str, l2_bytes: int) -> int:
    """How many sets of buffers to rotate over, so that together they exceed twice the L2 cache; 1 when `warm`."""
    if l2 == "warm":
        return 1
    return max(1, min(MAX_INPUT_SETS, math.ceil(2 * l2_bytes / problem.bytes())))


@ambient.judging
def time_on_gpu(
    candidates: Sequence[Candidate],
    problem: Problem,
    *,
    sets: int = 1,
    rounds: int = ROUNDS,
    l2: str = "warm",
    proof: Proof | None = None,
) -> dict[str, Timing | Exception]:
    """Time calls on the current GPU by CUDA-graph replay, interleaved round by round.

    Every candidate is captured once into a graph of enough calls for a sample of about `SAMPLE_US`. In each round
    every graph is replayed once between two events, in an order that rotates, so that clock drift and heat fall on
    all alike. Launch overhead is a separate figure: the host time of an eager call.

    Parameters
    ----------
    proof
        Over the buffers that the calls read. Each graph is then replayed once more, on other values, with the outputs
        of one call in it, drawn by lot, full of NaN: a graph runs no code of the host, so what it does then is what it
        did when it was timed. A backend whose results are wrong gets the exception `WrongWhenTimed`.

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
            with torch.cuda.stream(stream), instruments.watched(candidate.name):
                graphs[candidate.name] = _capture(candidate.call, sets, stream)
        except Exception as error:  # whatever a backend raises is its result, and the others go on
            results[candidate.name] = error
        # On every stream: what a backend leaves running would slow down those that are timed with it.
        torch.cuda.synchronize()

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
        if statistics.median(samples[name]) <= 0:  # a graph without a kernel, shorter than the clock can tell
            results[name] = InvalidTiming(name)
            continue
        results[name] = summarise(
            samples[name], problem, method="graph_replay", round_id=round_id, l2=l2,
            launch_us=captured.launch_us, calls=captured.calls, input_sets=sets,
        )  # fmt: skip
    if proof is not None:
        with torch.cuda.stream(stream):
            for name, captured in graphs.items():
                if isinstance(results[name], Exception):
                    continue
                try:
                    _replay_proof(proof, name, captured, sets, stream)
                except Exception as error:  # such as too little memory: what is not proved does not count
                    results[name] = error
        _add_proof(results, proof, candidates)
    torch.cuda.current_stream().wait_stream(stream)
    return results


def _replay_proof(proof: Proof, name: str, captured: _Captured, sets: int, stream: torch.cuda.Stream) -> None:
    """Replay a graph on values that it has not seen, and keep what one of its calls returns."""
    turn = proof.next_turn()
    for number in range(sets):  # all alike, so that it does not matter which call wrote last where several write
        proof.lay(turn, number)
    for tensor in captured.results if isinstance(captured.results, tuple | list) else ():
        if type(tensor) is torch.Tensor and tensor.is_floating_point():
            tensor.fill_(math.nan)
    captured.graph.replay()
    stream.synchronize()
    proof.take(name, turn, captured.results, captured.kept % sets)


def _add_proof(results: dict[str, Timing | Exception], proof: Proof, candidates: Sequence[Candidate]) -> None:
    """Let the timing of a backend whose timed results are wrong be the error that says so."""
    for candidate in candidates:
        timing = results[candidate.name]
        if isinstance(timing, Exception):
            continue
        try:
            fault = proof.fault(candidate.name, round_scores=candidate.round_scores)
        except Exception as error:
            results[candidate.name] = error
            continue
        if fault:
            results[candidate.name] = WrongWhenTimed(*fault, timing)
        else:
            results[candidate.name] = timing.model_copy(update={"proved": True, "proof_seed": proof.seed})


@ambient.judging
def time_on_cpu(
    candidates: Sequence[Candidate], problem: Problem, *, rounds: int = 7, proof: Proof | None = None
) -> dict[str, Timing | Exception]:
    """Time calls on the CPU by the wall clock, interleaved round by round, after one warm-up each.

    Parameters
    ----------
    proof
        Over the buffers that the calls read. Each timed call then gets values of its own, in the same buffers, and what
        it returns is compared when all is over. A backend whose results are wrong gets the exception `WrongWhenTimed`,
        and one that changes what measures it, or leaves a thread running, `JudgeTampered`.
    """
    results: dict[str, Timing | Exception] = {}
    samples: dict[str, list[float]] = {}
    for candidate in candidates:
        try:
            if proof is not None:
                proof.lay(proof.next_turn())  # else the first call would have the inputs of the check before it
            with instruments.watched(candidate.name):
                candidate.call(0)
            samples[candidate.name] = []
        except Exception as error:
            results[candidate.name] = error
    order = [c for c in candidates if c.name in samples]
    for _ in range(rounds):
        for candidate in order:
            if candidate.name in results:
                continue
            if proof is None:
                samples[candidate.name].append(_host_us(candidate)[0])
                continue
            turn = proof.next_turn()
            proof.lay(turn)
            try:
                with instruments.watched(candidate.name):
                    taken, returned = _host_us(candidate)
                    proof.take(candidate.name, turn, returned)
                samples[candidate.name].append(taken)
            except Exception as error:
                results[candidate.name] = error
        order = order[1:] + order[:1]
    round_id = uuid.uuid4().hex[:12]
    for name, taken in samples.items():
        if name not in results:
            results[name] = summarise(taken, problem, method="host", round_id=round_id, l2="warm")
    if proof is not None:
        _add_proof(results, proof, candidates)
    return results


def _host_us(candidate: Candidate) -> tuple[float, Any]:
    """Wall-clock time of one call in microseconds, and what it returned."""
    started = _clock()
    returned = candidate.call(0)
    return (_clock() - started) * 1e6, returned


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
    results: Any
    """What one call in it returned, drawn by lot: tensors that each replay writes again."""
    kept: int
    """The number of that call."""


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
    started = _clock()
    for number in range(eager_calls):
        call(number % sets)
    launch_us = round((_clock() - started) * 1e6 / eager_calls, 3)
    stream.synchronize()

    calls = max(1, min(MAX_CALLS, round(SAMPLE_US / estimate_us)))
    if sets > 1:
        calls = max(sets, calls // sets * sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept, results = secrets.randbelow(calls), None
        for number in range(calls):
            # The results of all other calls are dropped at once, so that each call writes where the one before it did.
            if number == kept:
                results = call(number % sets)
            else:
                call(number % sets)
    graph.replay()
    stream.synchronize()
    return _Captured(graph, calls, estimate_us, launch_us, results, kept)


instruments.trust(sys.modules[__name__], ("_clock", "_host_us", "summarise", "time_on_cpu", "time_on_gpu"))
