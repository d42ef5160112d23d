"""Room for kernels: whose it is, what lies in it, and that nothing of a graph's memory is kept."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from support.driver_memory import UNWRITTEN, in_place_of_the_driver

from flashcore.gpu import rooms
from flashcore.gpu.rooms import APART, INT_BYTES, LEAST_BYTES, LEAST_COUNTERS, STOCK_BYTES, room_for

CPU = torch.device("cpu")
CALLED, OTHER = 11, 12
"""Two streams."""


@pytest.fixture
def memory(monkeypatch):
    return in_place_of_the_driver(monkeypatch)


def ints(memory, room, count):
    return memory.at(room.counters, INT_BYTES * count).view(torch.int32)


def test_a_stream_has_one_room_and_each_stream_has_its_own(memory):
    first = room_for(100, CPU, CALLED, counters=5)
    assert room_for(LEAST_BYTES, CPU, CALLED, counters=LEAST_COUNTERS) == first and not first.keeps
    other = room_for(100, CPU, OTHER, counters=5)
    assert other.address != first.address and other.counters != first.counters, "they may run at the same time"
    assert memory.at(first.address, LEAST_BYTES).numel() == LEAST_BYTES
    assert not ints(memory, first, LEAST_COUNTERS).any() and not ints(memory, other, LEAST_COUNTERS).any()


def test_who_asks_for_no_counters_gets_none(memory):
    assert room_for(100, CPU, CALLED) == (room_for(100, CPU, CALLED, counters=1).address, 0, ())
    memory.capture = 3
    assert room_for(100, CPU, CALLED).counters == 0
    assert not rooms._of_graphs


def test_sizes_that_grow_take_few_rooms_and_those_outgrown_stay_for_launches_that_are_kept(memory):
    asked = [1000 * n for n in range(1, 5000)]
    found = {size: room_for(size, CPU, CALLED).address for size in asked}
    sizes = {address: memory.blocks[address].numel() for address in found.values()}
    assert len(sizes) == 4 and max(sizes.values()) < 2 * asked[-1] and sum(sizes.values()) < 4 * asked[-1]
    assert all(memory.at(address, size).numel() == size for size, address in found.items()), "none was given back"
    assert room_for(1, CPU, CALLED).address == found[asked[-1]]


def test_more_counters_than_usual_are_zero_too(memory):
    few = room_for(1, CPU, CALLED, counters=1)
    many = room_for(1, CPU, CALLED, counters=LEAST_COUNTERS + 1)
    assert many.counters != few.counters and not ints(memory, many, LEAST_COUNTERS + 1).any()
    assert room_for(1, CPU, CALLED, counters=1).counters == many.counters


def test_a_graph_holds_nothing_of_torchs_and_has_counters_of_its_own(memory):
    """What `keeps` holds is all that is torch's: whoever drops it leaves nothing in the memory pool of the graph."""
    eager = room_for(100, CPU, CALLED, counters=40)
    memory.capture, before = 3, dict(memory.blocks)
    first, second = (room_for(100, CPU, CALLED, counters=40) for _ in range(2))
    for room in (first, second):
        (held,) = room.keeps
        assert held.data_ptr() == room.address and held.numel() == 100 and not memory.holds(room.address)
        assert not ints(memory, room, 40).any()
    assert first.counters == second.counters != eager.counters, "calls in one stream of a graph follow each other"
    assert memory.blocks == before, "the driver gives no memory while a graph is captured"
    beside = room_for(100, CPU, OTHER, counters=40)
    memory.capture = 4
    later = room_for(100, CPU, CALLED, counters=40)
    apart = sorted((first.counters, beside.counters, later.counters))
    assert apart[1] - apart[0] >= 2 * APART - 1 and apart[2] - apart[1] >= 2 * APART - 1, "graphs run at any time"
    memory.capture = 0
    assert room_for(100, CPU, CALLED, counters=40) == eager


def test_counters_of_graphs_are_put_by_while_there_is_plenty_of_time(memory):
    memory.capture = 3
    bare = room_for(8, CPU, CALLED, counters=9)
    assert [held.numel() for held in bare.keeps] == [8, 9] and bare.counters == bare.keeps[1].data_ptr()
    assert bare.keeps[1].dtype == torch.int32 and not bare.keeps[1].any(), "no eager call came before: the graph's own"
    memory.capture = 0
    room_for(8, CPU, CALLED, counters=9)
    assert memory.waited_for == [CALLED], "a graph may be replayed on any stream"
    each, taken = STOCK_BYTES // 8, set()
    for memory.capture in range(4, 12):
        room = room_for(8, CPU, CALLED, counters=each // INT_BYTES)
        taken.add(room.counters)
        assert len(room.keeps) == 1
    assert len(taken) == 8 and max(taken) - min(taken) == STOCK_BYTES - each
    memory.capture = 99
    assert len(room_for(8, CPU, CALLED, counters=1).keeps) == 2, "all are taken"
    memory.capture = 11
    assert room_for(8, CPU, CALLED, counters=each // INT_BYTES).counters in taken
    memory.capture = 0
    for _ in range(2):
        room_for(8, CPU, OTHER, counters=9)
    assert memory.waited_for == [CALLED, OTHER]
    memory.capture = 100
    assert room_for(8, CPU, CALLED, counters=1).counters not in taken


def test_what_a_planted_bug_leaves_behind_stays_with_it(memory):
    honest = room_for(8, CPU, CALLED, counters=9)
    planted = [room_for(8, CPU, CALLED, counters=9, own=True) for _ in range(2)]
    memory.capture = 3
    planted.append(room_for(8, CPU, CALLED, counters=9, own=True))
    assert (
        len({room.counters for room in (honest, *planted)}) == len({room.address for room in (honest, *planted)}) == 4
    )
    for room in planted:
        assert (room.address, room.counters) == tuple(held.data_ptr() for held in room.keeps)
        assert not memory.holds(room.counters) and not room.keeps[1].any()


def test_new_memory_holds_anything(memory):
    assert int(memory.at(room_for(8, CPU, CALLED).address, 1)) == UNWRITTEN


# ------------------------------------------------------------------------------------------------ the driver


class Refused(Exception):
    pass


@pytest.fixture
def runtime(monkeypatch):
    """CuPy's calls of the driver, which refuses the first `refusals` times to give memory."""
    calls = []

    def malloc(size):
        calls.append(("malloc", size))
        if made.refusals:
            made.refusals -= 1
            raise Refused("cudaErrorMemoryAllocation: out of memory")
        return 0x700

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            calls.append(("device", self.index))

        def __exit__(self, *raised):
            calls.append(("device", "before"))

    made = types.SimpleNamespace(
        CUDARuntimeError=Refused, malloc=malloc, refusals=0, calls=calls,
        memsetAsync=lambda *given: calls.append(("memset", *given)),
        streamSynchronize=lambda stream: calls.append(("wait", stream)),
    )  # fmt: skip
    cuda = types.ModuleType("cupy.cuda")
    cuda.Device, cuda.runtime = Device, made
    cupy = types.ModuleType("cupy")
    cupy.cuda = cuda
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(("empty_cache",)))
    return made


def test_memory_comes_from_the_driver_on_the_gpu_that_is_named_and_zeros_in_the_streams_order(runtime):
    assert rooms._zeros(64, 3, CALLED) == 0x700
    rooms._wait_for(CALLED)
    own = [call for call in runtime.calls if call[0] != "device"]
    assert own == [("malloc", 64), ("memset", 0x700, 0, 64, CALLED), ("wait", CALLED)]
    assert [call[1] for call in runtime.calls if call[0] == "device"] == [3, "before"] * 2


def test_torch_gives_up_what_it_does_not_use_before_a_room_is_refused(runtime):
    runtime.refusals = 1
    assert rooms._allocate(64, 0) == 0x700
    assert [call[0] for call in runtime.calls] == ["device", "malloc", "empty_cache", "malloc", "device"]
    runtime.refusals = 2
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"GPU 0 has no 3 MiB left .*; free tensors, or pass fewer"):
        rooms._allocate(3 << 20, 0)


@pytest.mark.gpu
def test_room_on_a_gpu():
    stream = torch.cuda.current_stream().cuda_stream
    device = torch.device("cuda", torch.cuda.current_device())
    torch_has = torch.cuda.memory_allocated()
    room = room_for(1000, device, stream, counters=9)
    assert room.address % 256 == 0 and not room.keeps and torch.cuda.memory_allocated() == torch_has
    assert room_for(1000, device, stream, counters=9) == room

    import cupy

    torch.cuda.synchronize()
    block = cupy.cuda.UnownedMemory(room.counters, INT_BYTES * LEAST_COUNTERS, None)
    assert not cupy.ndarray((LEAST_COUNTERS,), cupy.int32, cupy.cuda.MemoryPointer(block, 0)).any()
