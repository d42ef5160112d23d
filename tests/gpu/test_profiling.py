"""Profiles: whose kernels are whose, and what a time is made of."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from flashcore.gpu import profiling
from flashcore.gpu.profiling import split_by_marker


def test_the_profilers_kernels_are_split_call_by_call():
    assert split_by_marker(["add", "add", "a", "b", "add", "add", "c", "add"], 3) == [["a", "b"], [], ["c"]]
    assert split_by_marker(["add", "add", "a", "add"], 2) == [[], []], "lost events name no kernel at all"
    assert split_by_marker([], 1) == [[]]


def test_names_are_the_next_call_s_until_the_next_marker():
    assert split_by_marker(["m", "m", "a", "m", "b", "a", "m"], 2) == [["a"], ["b", "a"]]
    assert split_by_marker(["m", "m"], 0) == [], "no call at all"
    assert split_by_marker(["m", "m", "m", "m"], 2) == [[], []], "calls that launched nothing"
    assert split_by_marker(["m", "m", "a", "m", "m"], 1) == [[]], "one marker too many: nothing can be told"


# ------------------------------------------------------------------------------------------------ without a GPU


class Profiled:
    """torch's profiler, whose events are those of what was launched, in an order that tells nothing."""

    launched: ClassVar[list[str]] = []

    def __init__(self, activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self):
        self.launched.clear()
        return self

    def __exit__(self, *error):
        return None

    def events(self):
        device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
        ours = [event(name, start, device) for start, name in enumerate(self.launched)]
        return [event("cudaLaunchKernel", 0.5, host), *reversed(ours)]


def event(name, start, kind):
    """Each kernel runs for as long as its name is, in tenths of a µs."""
    end = start + len(name) / 10
    return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))


@pytest.fixture
def profiler(monkeypatch):
    """What is appended is launched; the marker launches `add`."""
    marker = SimpleNamespace(add_=lambda number: Profiled.launched.append("add"))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: marker)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", Profiled)
    return Profiled.launched


def test_kernels_are_ordered_by_their_start_and_given_to_their_calls(profiler):
    calls = [lambda: profiler.extend(["q k", "softmax"]), lambda: None, lambda: profiler.append("p v")]
    assert profiling.kernels_of(calls) == [["q k", "softmax"], [], ["p v"]]
    assert profiling.kernels_of([]) == []


def test_a_profiler_that_lost_events_names_none(profiler):
    def loses():
        profiler.clear()
        profiler.append("q k")

    assert profiling.kernels_of([lambda: profiler.append("softmax"), loses]) == [[], []]


def test_the_time_of_each_kernel_is_its_own_and_not_that_of_what_lies_between(profiler):
    calls = [lambda: profiler.extend(["q k", "softmax"]), lambda: None, lambda: profiler.append("p v")]
    found = profiling.kernel_us(calls)
    assert [[pytest.approx(us) for us in one] for one in ([0.3, 0.7], [], [0.3])] == found
    assert profiling.kernel_us([]) == []

    def loses():
        profiler.clear()
        profiler.append("q k")

    assert profiling.kernel_us([lambda: profiler.append("softmax"), loses]) == [[], []]


@pytest.fixture
def clock(monkeypatch):
    """Graphs and events of torch's without a GPU: each replay takes the next of these milliseconds."""
    taken = [0.4, 0.1, 9.0, 0.2, 0.3]
    state = SimpleNamespace(now=0.0, taken=taken, captured=False)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream is STREAM
            self.at = state.now

        def synchronize(self):
            return None

        def elapsed_time(self, other):
            return other.at - self.at

    class Graph:
        def replay(self):
            state.now += taken.pop(0)

    @contextlib.contextmanager
    def capture(graph, stream):
        assert stream is STREAM
        state.captured = True
        yield
        state.captured = False

    monkeypatch.setattr(torch.cuda, "Stream", lambda: STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's")
    WAITED.clear()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return state


WAITED = []
"""The streams whose work is waited for."""
STREAM = SimpleNamespace(cuda_stream=1234, synchronize=lambda: None, wait_stream=WAITED.append)


def test_a_time_is_the_median_of_the_replays_for_one_of_the_calls_in_the_graph(clock):
    calls = []
    found = profiling.graph_us(lambda stream: calls.append((stream, clock.captured)), calls=4, rounds=5)
    assert found == pytest.approx(0.3e3 / 4), "0.3 ms is the median, and four calls share it"
    assert calls == [(1234, False)] + [(1234, True)] * 4, "one call before the capture, to load what it needs"
    assert clock.taken == [] and WAITED == ["the caller's"], "what a call reads may still be on its way there"


def test_a_copy_is_counted_as_read_and_written(monkeypatch):
    copied, zeros = [], torch.zeros

    def timed(call):
        call(0)
        copied.append(True)
        return 10.0

    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(profiling, "graph_us", timed)
    assert profiling.l2_copy_tbs() == pytest.approx(2 * profiling.L2_BUFFER_BYTES / 10e-6 / 1e12) and copied == [True]


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
def test_the_kernels_of_calls_on_the_gpu():
    a = torch.randn(256, 256, device="cuda").half()
    product, nothing, twice = profiling.kernels_of([lambda: a @ a, lambda: None, lambda: (a.relu_(), a.neg_())])
    assert len(product) >= 1 and nothing == [] and len(twice) == 2


@pytest.mark.gpu
def test_cupti_and_graph_replay_agree_on_a_call_that_takes_long():
    a = torch.randn(4096, 4096, device="cuda").half()
    (kernels,) = profiling.kernel_us([lambda: a @ a])
    assert sum(kernels) == pytest.approx(profiling.graph_us(lambda _: a @ a), rel=0.2)


@pytest.mark.gpu
def test_a_larger_copy_takes_longer_and_l2_copies_faster_than_memory():
    small, large = (torch.zeros(size, dtype=torch.uint8, device="cuda") for size in (1 << 26, 1 << 29))
    first, second = (torch.empty_like(one) for one in (small, large))
    quick, slow = (profiling.graph_us(lambda _, a=a, b=b: b.copy_(a)) for a, b in ((small, first), (large, second)))
    assert slow > 4 * quick, "eight times the bytes"
    assert profiling.l2_copy_tbs() > 2 * large.numel() / slow / 1e6
