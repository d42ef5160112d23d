"""See which kernels a call launches, and how long it takes, on a GPU: torch's profiler (CUPTI) and graph replay."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

CALLS, ROUNDS = 20, 5
"""Calls in a graph, and replays of it: as `cublaslt.measure` does, so that the figures stand side by side."""
L2_BUFFER_BYTES = 8 << 20
"""Source and target together stay far below the L2 cache of an H100 (50 MB)."""


def kernels_of(calls: Sequence[Callable[[], Any]]) -> list[list[str]]:
    """Run each call once under the profiler and give the names of the kernels it launched, in order.

    A small kernel of torch's runs between two calls; the names between two of them are one call's. Everything goes to
    torch's current stream, where kernels start in the order they were launched.

    Returns
    -------
    list
        One list a call; empty for a call that launched nothing, and for all when the profiler lost events.
    """
    return [[event.name for event in events] for events in _seen(calls)]


def kernel_us(calls: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Run each call once under the profiler and give how long each kernel of it ran on the GPU, in µs, in order.

    A clock of its own: CUPTI takes the times of a kernel's begin and end from the GPU. What lies between two kernels is
    not in it, and a copy or a fill counts as a kernel.

    Returns
    -------
    list
        As `kernels_of`.
    """
    return [[event.time_range.end - event.time_range.start for event in events] for events in _seen(calls)]


def _seen(calls: Sequence[Callable[[], Any]]) -> list[list[Any]]:
    """The profiler's events of each call on the GPU, in the order in which they began."""
    from torch.profiler import ProfilerActivity, profile

    marker = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        marker.add_(1)
        for call in calls:
            marker.add_(1)
            call()
        marker.add_(1)
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    found, place = [], 2  # behind the marker that begins it all, and that of the first call
    for names in split_by_marker([e.name for e in events], len(calls)):
        found.append(events[place : place + len(names)])
        place += len(names) + 1
    return found


def split_by_marker(names: Sequence[str], calls: int) -> list[list[str]]:
    """Names between markers: the sequence begins with two (only one when there is no call) and ends with one."""
    groups: list[list[str]] = []
    marker = names[0] if names else None
    for name in names:
        if name == marker:
            groups.append([])
        else:
            groups[-1].append(name)
    if len(groups) != calls + 2:
        return [[] for _ in range(calls)]
    return groups[1:-1]


def replay_us(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, calls: int) -> float:
    """Device time in µs of one of the calls in a graph, by one replay of it on this stream, which is current."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record(stream)
    graph.replay()
    after.record(stream)
    after.synchronize()
    return before.elapsed_time(after) * 1e3 / calls


def graph_us(call: Callable[[int], None], *, calls: int = CALLS, rounds: int = ROUNDS) -> float:
    """Median device time in µs of one call inside a CUDA graph; the call gets the stream to launch on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what the call reads may still be on its way
    with torch.cuda.stream(stream):
        call(stream.cuda_stream)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call(stream.cuda_stream)
        return statistics.median(replay_us(graph, stream, calls) for _ in range(rounds))


def l2_copy_tbs() -> float:
    """Speed of a copy whose source and target stay in the L2 cache, in TB/s, bytes read plus written."""
    source = torch.zeros(L2_BUFFER_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_us(lambda _: target.copy_(source)) / 1e6
