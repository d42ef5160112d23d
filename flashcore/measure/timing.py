"""Time attention calls so that the figures can be compared: graph replay, interleaved rounds, medians with spread.

How many samples are enough is decided by the interval of their median, as gates are: rounds go on until it is narrow
for each backend, or the time is up.
"""

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

from flashcore.decision import compare
from flashcore.errors import InvalidTiming, JudgeTampered, WrongWhenTimed
from flashcore.gpu import profiling
from flashcore.measure.proof import Proof
from flashcore.measure.watching import Watch
from flashcore.numerics import ambient, instruments
from flashcore.problem import Problem
from flashcore.records import Timing, digits

ROUNDS = 30
SLOW_CALL_US = 20_000.0
SLOW_ROUNDS = 10
"""A call this slow has little spread, and thirty of them would take the run's whole time."""
MOST_ROUNDS = 100
"""What a timing that goes on until its interval is narrow may take, and what a record keeps."""
NARROW = 0.01
"""Width of the interval of a median, over that median, with which no more samples are asked for."""
MORE_S = 0.6
"""Seconds that a timing may go on beyond its first rounds; a full sweep has some 50 problems."""
LOOK_AFTER = 5
"""Rounds between two looks at the intervals: a look leaves the GPU idle for as long as it takes."""
CUPTI_CALLS = 10
"""Calls of each backend under the profiler."""
SINGLE_CALLS = 20
MOST_CLOCKED_US = 5_000.0
"""A slower call is one of thousands of launches, or far from any gate: the other clocks leave it out."""
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
    problem: Problem | None = None
    """What it computes; None for the problem that all of them compute."""
    proof: Proof | None = None
    """Over the buffers that it reads; None for the one of all."""
    flops: int | None = None
    """Operations of a call whose sequences have lengths, which the problem does not know."""


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
    most_rounds: int | None = None,
    other_clocks: bool = False,
) -> dict[str, Timing | Exception]:
    """Time calls on the current GPU by CUDA-graph replay, interleaved round by round.

    They may compute different problems, so that those can be compared as well: each then says which is its own.
    Every candidate is captured once into a graph of enough calls for a sample of about `SAMPLE_US`. In each round
    every graph is replayed once between two events, in an order that rotates, so that clock drift and heat fall on
    all alike. Launch overhead is a separate figure: the host time of an eager call. Clock, power and temperature are
    read while the rounds go on (`measure.watching`).

    Parameters
    ----------
    rounds
        Samples of each, at the least; a call of more than `SLOW_CALL_US` gets `SLOW_ROUNDS`.
    most_rounds
        More rounds follow, up to this many, until the interval of every median is at most `NARROW` of it or `MORE_S`
        seconds have passed. None for no more.
    other_clocks
        Whether to time each call by other means as well, when all rounds are over: see `_clocked_otherwise`.
    proof
        Over the buffers that the calls read. Each graph is then replayed once more, on other values, with the outputs
        of one call in it, drawn by lot, full of NaN: a graph runs no code of the host, so what it does then is what it
        did when it was timed. A backend whose results are wrong gets the exception `WrongWhenTimed`.

    Returns
    -------
    dict
        By name, a `Timing` whose `latency_us` is the median, with `launch_us`, the calls a graph holds, the number of
        `samples` and why there are no more (`stopped`), and what the sensors read (`during`); or the exception that
        kept the candidate from being timed. All share one `round`.
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

    with Watch() as watch, torch.cuda.stream(stream):
        samples, ended = _rounds(graphs, stream, rounds, max(rounds, most_rounds or rounds))

    round_id = uuid.uuid4().hex[:12]
    by_name = {candidate.name: candidate for candidate in candidates}
    for name, captured in graphs.items():
        if statistics.median(samples[name]) <= 0:  # a graph without a kernel, shorter than the clock can tell
            results[name] = InvalidTiming(name)
            continue
        results[name] = summarise(
            samples[name], by_name[name].problem or problem, method="graph_replay", round_id=round_id, l2=l2,
            flops=by_name[name].flops,
            launch_us=captured.launch_us, calls=captured.calls, input_sets=sets, samples=len(samples[name]),
            stopped=_stopped(samples[name], captured, ended), during=watch.summary(),
        )  # fmt: skip
    with torch.cuda.stream(stream):
        for name, captured in graphs.items():
            own = by_name[name].proof or proof
            if own is None or isinstance(results[name], Exception):
                continue
            try:
                _replay_proof(own, name, captured, sets, stream)
            except Exception as error:  # such as too little memory: what is not proved does not count
                results[name] = error
    _add_proof(results, proof, candidates)
    if other_clocks:
        with torch.cuda.stream(stream):
            for name, more in _clocked_otherwise(candidates, results, sets, stream).items():
                if isinstance(results[name], Timing):
                    results[name] = results[name].model_copy(update=more)
    torch.cuda.current_stream().wait_stream(stream)
    return results


def _rounds(
    graphs: dict[str, _Captured], stream: torch.cuda.Stream, least: int, most: int
) -> tuple[dict[str, list[float]], str]:
    """Replay every graph once a round; gives the samples in µs by name, and why the rounds ended where they did."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    order, number, limit = list(graphs), 0, 0.0
    while number < most:
        if number == least:
            limit = _clock() + MORE_S
        if number >= least and (number - least) % LOOK_AFTER == 0:
            if all(is_narrow(samples[name]) for name in graphs if graphs[name].estimate_us <= SLOW_CALL_US):
                return samples, "narrow"
            if _clock() > limit:
                return samples, f"{MORE_S:g} s more were up"
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
        number += 1
    return samples, f"{most} rounds are the most"


def is_narrow(samples_us: Sequence[float]) -> bool:
    """Whether the interval of the median of these samples is at most `NARROW` of that median."""
    found, middle = compare.median_interval(samples_us), statistics.median(samples_us)
    return found is not None and found[1] - found[0] <= NARROW * middle


def _stopped(samples_us: Sequence[float], captured: _Captured, ended: str) -> str:
    """Why a backend has no more samples than it has, in words for its record."""
    if captured.estimate_us > SLOW_CALL_US:
        return f"a call this slow gets {SLOW_ROUNDS}"
    return "narrow" if is_narrow(samples_us) else ended


def _clocked_otherwise(
    candidates: Sequence[Candidate], results: dict[str, Timing | Exception], sets: int, stream: torch.cuda.Stream
) -> dict[str, dict[str, Any]]:
    """Time the calls that were timed in a graph by other means, on the stream that is current.

    Graph replay is one clock, and whoever doubts it can hold it against these. They come last: the profiler may leave
    something behind that makes launches slower.

    Returns
    -------
    dict
        By name, in µs a call: ``eager_us``, of calls launched one after the other, on the GPU, between two events;
        ``single_us``, of one call on an idle GPU from its launch until the host knows that it is over, median;
        ``cupti_us``, the time that its kernels took by CUPTI, median, with their number ``cupti_kernels``. A clock that
        could not be read is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        timing = results.get(candidate.name)
        if isinstance(timing, Timing) and timing.latency_us <= MOST_CLOCKED_US:
            try:
                with instruments.watched(candidate.name):
                    taken = _eager(candidate.call, sets, stream)
                found[candidate.name] = taken
            except JudgeTampered as error:
                results[candidate.name] = error
            except Exception:  # it was timed, and that stands; what it did here is not known
                torch.cuda.synchronize()
    chosen = [candidate for candidate in candidates if candidate.name in found]

    def quietly(candidate: Candidate, number: int) -> None:
        try:
            with instruments.watched(candidate.name):
                candidate.call(number % sets)
        except Exception as error:  # the profiler goes on with the others
            found.pop(candidate.name, None)
            if isinstance(error, JudgeTampered):
                results[candidate.name] = error

    # Where an event was lost, or a kernel is called as the marker between calls is, nothing is known of any of them;
    # then each is asked for alone.
    for groups in ([chosen], [[candidate] for candidate in chosen]):
        for group in groups:
            calls = [lambda c=candidate, i=i: quietly(c, i) for i in range(CUPTI_CALLS) for candidate in group]
            try:
                measured = profiling.kernel_us(calls) if calls else []
            except Exception:  # CUPTI belongs to another profiler, or is forbidden to users
                return found
            for place, candidate in enumerate(group):
                taken = [one for one in measured[place :: len(group)] if one]
                if taken and candidate.name in found:
                    found[candidate.name] |= {
                        "cupti_us": digits(statistics.median(map(sum, taken))),
                        "cupti_kernels": statistics.median_low(map(len, taken)),
                    }
        if any("cupti_us" in clocks for clocks in found.values()):
            break
    return found


def _eager(call: Call, sets: int, stream: torch.cuda.Stream) -> dict[str, float]:
    """Time of a call launched by the host, in µs: one of many on the GPU, and one alone until its end is known."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call(0)
    before.record(stream)
    for number in range(EAGER_CALLS):
        call(number % sets)
    after.record(stream)
    stream.synchronize()
    alone = []
    for number in range(SINGLE_CALLS):
        started = _clock()
        call(number % sets)
        stream.synchronize()
        alone.append((_clock() - started) * 1e6)
    eager_us = before.elapsed_time(after) * 1e3 / EAGER_CALLS
    return {"eager_us": digits(eager_us), "single_us": digits(statistics.median(alone))}


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


def _add_proof(results: dict[str, Timing | Exception], proof: Proof | None, candidates: Sequence[Candidate]) -> None:
    """Let the timing of a backend whose timed results are wrong be the error that says so; nothing where no proof is.

    `proof` is that of the candidates that have none of their own.
    """
    for candidate in candidates:
        timing, own = results[candidate.name], candidate.proof or proof
        if own is None or isinstance(timing, Exception):
            continue
        try:
            fault = own.fault(candidate.name, round_scores=candidate.round_scores)
        except Exception as error:
            results[candidate.name] = error
            continue
        if fault:
            results[candidate.name] = WrongWhenTimed(*fault, timing)
        else:
            results[candidate.name] = timing.model_copy(update={"proved": True, "proof_seed": own.seed})


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
        own = candidate.proof or proof
        try:
            if own is not None:
                own.lay(own.next_turn())  # else the first call would have the inputs of the check before it
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
            own = candidate.proof or proof
            if own is not None:
                turn = own.next_turn()
                own.lay(turn)
            try:
                with instruments.watched(candidate.name):
                    taken, returned = _host_us(candidate)
                    if own is not None:
                        own.take(candidate.name, turn, returned)
                samples[candidate.name].append(taken)
            except Exception as error:
                results[candidate.name] = error
        order = order[1:] + order[:1]
    round_id = uuid.uuid4().hex[:12]
    by_name = {candidate.name: candidate for candidate in candidates}
    for name, taken in samples.items():
        if name not in results:
            one = by_name[name]
            results[name] = summarise(
                taken, one.problem or problem, method="host", round_id=round_id, l2="warm", flops=one.flops
            )
    _add_proof(results, proof, candidates)
    return results


def _host_us(candidate: Candidate) -> tuple[float, Any]:
    """Wall-clock time of one call in microseconds, and what it returned."""
    started = _clock()
    returned = candidate.call(0)
    return (_clock() - started) * 1e6, returned


def summarise(
    samples_us: Sequence[float], problem: Problem, *, method: str, round_id: str, l2: str, flops: int | None = None,
    **more,
) -> Timing:  # fmt: skip
    """A `Timing` from samples: median, quartiles, TFLOPS by `Problem.flops()`; `MOST_ROUNDS` are kept at most.

    Where sequences have lengths the work is that of the real rows, and the problem counts whole ones: the TFLOPS are
    then by `flops`, which the timing keeps, and there are none without it.
    """
    latency_us = statistics.median(samples_us)
    if not problem.lengths:
        flops = problem.flops()
    elif flops is not None:
        more["flops"] = flops
    low, _, high = statistics.quantiles(samples_us, n=4) if len(samples_us) > 1 else (latency_us,) * 3
    return Timing(
        method=method,
        latency_us=digits(latency_us),
        samples_us=[digits(s, 5) for s in samples_us[:MOST_ROUNDS]],
        tflops=None if flops is None else digits(flops / latency_us / 1e6),
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
