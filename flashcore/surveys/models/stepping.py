"""Take a model's step by the host's launches, compiled, or as a CUDA graph; and time steps next to each other."""

from __future__ import annotations

import re
import time
import types
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flashcore.errors import InvalidTiming, Unsupported
from flashcore.measure.timing import is_narrow, summarise
from flashcore.measure.watching import Watch
from flashcore.numerics import instruments
from flashcore.problem import Problem
from flashcore.records import Timing
from flashcore.surveys.models.attending import Attention
from flashcore.surveys.models.model import Model

WARM_UPS = 3
MORE_S = 4.0
"""Seconds that the steps of one kind may go on beyond their first rounds."""
_clock = time.perf_counter


@dataclass
class Step:
    """One way to take a step in one mode."""

    way: str
    mode: str
    run: Callable[[], torch.Tensor]
    """Takes the step and gives logits ``[B, S, vocab]``; a captured step writes them to the same place again."""

    @property
    def name(self) -> str:
        return f"{self.way}, {self.mode}"


def steps_of(
    model: Model, attention: Attention, tokens: torch.Tensor, modes: Sequence[str]
) -> dict[str, Step | Exception]:
    """The step of one way in each mode; or, by its mode, what kept it from being taken.

    Parameters
    ----------
    tokens
        ``[B, S]``: read anew at each step, so that other ones may be written to it.
    """
    found: dict[str, Step | Exception] = {}
    position = attention.position

    def forward():
        return model(tokens, position, attention)

    whole = None
    if set(modes) & {"compiled", "graph"}:
        whole = torch.compile(_of_its_own(forward, attention.way), fullgraph=True, dynamic=False)

    def called(function):
        def run():
            attention.begin()
            with attention.around():
                return function()

        return run

    for mode in modes:
        if isinstance(found.get("eager"), Unsupported):  # torch's compiler would not tell why it is refused
            found[mode] = found["eager"]
            continue
        try:
            with instruments.watched(attention.way):
                run = called(forward if mode == "eager" else whole)
                for _ in range(WARM_UPS):
                    run()
                found[mode] = Step(attention.way, mode, _captured(run) if mode == "graph" else run)
        except Exception as error:  # whatever a way raises is its result, and the others go on
            found[mode] = error
            if model.cos.is_cuda:
                torch.cuda.synchronize()
    return found


def _of_its_own(function: Callable, name: str) -> Callable:
    """The same function with code of its own. Torch keeps what it compiled by the code, and a call would first be held
    against what was compiled for other ways."""
    code = function.__code__.replace(co_name=f"forward_{re.sub(r'[^0-9a-z]', '_', name)}")
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def _captured(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same as one replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replayed():
        graph.replay()
        return out

    return replayed


def time_steps(
    steps: Sequence[Step], problem: Problem, *, rounds: int, most_rounds: int, gpu: bool
) -> dict[str, Timing | Exception]:
    """Time steps round by round, each once a round, in an order that rotates.

    A sample is one step on an idle machine, from its first launch until its last kernel is over: on a GPU between two
    events, on a CPU by the clock. So what the host takes to launch is in it, as it is for a user.

    Parameters
    ----------
    problem
        Attention of a layer, for the record.
    rounds, most_rounds
        Samples of each at the least; more follow, up to this many, until the interval of each median is narrow or
        `MORE_S` have passed.

    Returns
    -------
    dict
        By the steps' names; all share one `round`.
    """
    samples: dict[str, list[float]] = {step.name: [] for step in steps}
    failed: dict[str, Exception] = {}
    order, until = list(steps), 0.0
    with Watch() as watch:
        for number in range(most_rounds):
            if number == rounds:
                until = _clock() + MORE_S
            late = number >= rounds and _clock() > until
            if late or (
                number >= rounds and all(is_narrow(taken) for name, taken in samples.items() if name not in failed)
            ):
                break
            for step in order:
                if step.name in failed:
                    continue
                try:
                    with instruments.watched(step.way):
                        samples[step.name].append(_sample_us(step, gpu))
                except Exception as error:
                    failed[step.name] = error
            order = order[1:] + order[:1]
    round_id = uuid.uuid4().hex[:12]
    method = "events" if gpu else "host"
    found: dict[str, Timing | Exception] = {}
    for name, taken in samples.items():
        if name in failed:
            found[name] = failed[name]
        elif min(taken) <= 0:
            found[name] = InvalidTiming(name)
        else:
            timing = summarise(taken, problem, method=method, round_id=round_id, l2="warm", during=watch.summary())
            # Operations of attention alone over the time of a whole step would be no rate of anything.
            found[name] = timing.model_copy(update={"tflops": None})
    return found


def _sample_us(step: Step, gpu: bool) -> float:
    if not gpu:
        started = _clock()
        step.run()
        return (_clock() - started) * 1e6
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    step.run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) * 1e3
