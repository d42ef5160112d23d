"""Room for kernels in CUDA graphs: nothing of a graph's memory is kept, and no call takes another one's room.

`torch.compile(mode="reduce-overhead")` warms up and captures in a memory pool whose every byte torch accounts for. Here
without a GPU too: what would be launched is recorded, and its kernel stands in for ours by what it does to its room.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import weakref
from types import SimpleNamespace

import pytest
import torch
from support.hopper_tiles import MULTIPROCESSORS
from support.paged_tables import cache_of, queries
from support.recorded_driver import RecordedDriver, function_at, loaded

import flashcore
from flashcore import backends
from flashcore.backends import _cuda, _paged, decode, hopper
from flashcore.backends.decode import DECODE, table_keys
from flashcore.gpu import launching, rooms
from flashcore.gpu.launching import PreparedLaunch
from flashcore.ops import problem_of
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PagedKV

BYTES = {"decode": DECODE.size, "hopper": 8, "hopper-paged": 8}
"""Of the last argument, which says where the room is."""
BEFORE = {"decode": 4, "hopper": 6, "hopper-paged": 7}
"""Arguments before it."""


class Pool:
    """Torch's memory while a graph is captured: an arena of its own, and which tensors in it are still held."""

    def __init__(self):
        self.arena, self.taken, self.tensors = torch.empty(1 << 27, dtype=torch.uint8), 0, []

    def empty(self, count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = count * dtype.itemsize
        tensor = self.arena[self.taken : self.taken + size].view(dtype)
        self.taken += -(-size // 512) * 512
        self.tensors.append(weakref.ref(tensor))
        return tensor

    def zeros(self, *given, **options) -> torch.Tensor:
        return self.empty(*given, **options).zero_()

    def held(self) -> int:
        return sum(tensor() is not None for tensor in self.tensors)


@pytest.fixture
def machine(monkeypatch, driver_memory, on_an_h200):
    """Our backends with a driver that records, over memory that can be looked at."""
    driver = RecordedDriver([])
    driver.memory, driver.stream, driver.prepared = driver_memory, 7, 0
    driver.shape = loaded(tile_m=64, tile_n=64)

    def load(self, problem, device, trace):
        driver.prepared += 1
        return driver.shape

    for module in (_paged, hopper):
        monkeypatch.setattr(module, "tensor_map", lambda *given, name, **options: name.encode())
    monkeypatch.setattr(decode, "multiprocessors", lambda device: MULTIPROCESSORS)
    for module in (_cuda, _paged):
        monkeypatch.setattr(module, "current_stream", lambda device: driver.stream)
        monkeypatch.setattr(module, "entry_point", lambda *given: function_at(0xABC))
    monkeypatch.setattr(_cuda.CudaBackend, "load", load)
    monkeypatch.setattr(launching, "_kept", {})
    monkeypatch.setattr(launching, "_launch_kernel", lambda: driver.call)
    driver.pool = Pool()
    monkeypatch.setattr(rooms, "torch", SimpleNamespace(
        empty=driver.pool.empty, zeros=driver.pool.zeros, uint8=torch.uint8, int32=torch.int32, device=torch.device,
    ))  # fmt: skip
    return driver


class Call:
    """A call of one of our kernels that takes room, over tensors of its own."""

    def __init__(self, machine, name: str, *, invariant: bool = True, lengths=(40, 3000), tokens: int = 2):
        self.machine, self.backend = machine, backends.get(name)
        self.name, self.counters, self.lse = name, 0, None
        if name == "hopper":
            self.q, self.k, self.v = (torch.zeros(1, 2, rows, 64).half() for rows in (tokens, *lengths[-1:] * 2))
            self.problem = problem_of(self.q, self.k, self.v, batch_invariant=invariant)
            self.size = MULTIPROCESSORS * 64 * 64 * 4
        else:
            self.cache = cache_of(lengths, 2, 64, 64, torch.float16, "cpu")
            self.q = queries(self.cache, 4, tokens)
            self.problem = paged_problem_of(self.q, self.cache, batch_invariant=invariant)
            self.size = MULTIPROCESSORS * 64 * 64 * 4
        if name == "decode":
            self.counters = len(lengths) * 2
            parts = len(lengths) * 2 + MULTIPROCESSORS
            if invariant:
                parts = len(lengths) * 2 * -(-table_keys(self.cache) // 2048)
            self.size = parts * 2 * tokens * backends.get("decode").row_bytes(self.problem)
        self.out, self.lse = torch.empty_like(self.q), torch.empty(self.q.shape[:3])

    def __call__(self) -> bytes:
        """Launch; what the kernel is told of its room."""
        self.machine.sizes = [0] * BEFORE[self.name] + [BYTES[self.name]]
        self.machine.launches.clear()
        if self.name == "hopper":
            self.backend._launch(self.q, self.k, self.v, self.out, self.lse, self.problem)
        else:
            self.backend.attend(self.q, self.cache, self.problem, None, self.out, self.lse)
        [launch] = self.machine.launches
        self.run(launch.arguments[-1])
        return launch.arguments[-1]

    def run(self, told: bytes) -> None:
        """What the kernel does to its room: it finds counters at 0, leaves them so, and anything elsewhere."""
        if self.name == "decode":
            accum, softmax, accounted, *_ = DECODE.unpack(told)
            count = 4 * self.counters
            assert ctypes.string_at(accounted, count) == bytes(count)
            ctypes.memset(accounted, 0x33, count)
            ctypes.memset(accum, 0x77, self.size)
            assert accum < softmax < accum + self.size and ctypes.string_at(accounted, count) == b"\x33" * count
            ctypes.memset(accounted, 0, count)
        else:
            (sums,) = struct.unpack("Q", told)
            ctypes.memset(sums, 0x77, self.size)


KINDS = [("decode", False), ("decode", True), ("hopper", True), ("hopper-paged", True)]


@pytest.mark.parametrize(("name", "invariant"), KINDS)
def test_a_warm_up_takes_nothing_of_torchs_and_is_kept_as_any_call(machine, name, invariant):
    call = Call(machine, name, invariant=invariant)
    told = call()
    assert machine.prepared == 1 and call() == told and machine.prepared == 1
    assert not machine.pool.tensors, "who warms up for a graph would find it in the graph's pool"
    machine.stream = 8
    assert call() != told and machine.prepared == 2


@pytest.mark.parametrize(("name", "invariant"), KINDS)
def test_of_a_graphs_memory_nothing_is_held_after_a_call(machine, name, invariant):
    call = Call(machine, name, invariant=invariant)
    eager = call()
    machine.memory.capture, before = 5, dict(launching._kept)
    graph = call(), call()
    assert len(machine.pool.tensors) == 2 and not machine.pool.held(), "the next call may have the same memory"
    assert all(told not in (eager, b"") for told in graph)
    assert launching._kept == before and machine.prepared == 3, "a launch would hold it, or outlive it"
    machine.memory.capture = 0
    assert call() == eager and machine.prepared == 3
    assert all(tensor().numel() == call.size for tensor in machine.pool.tensors if tensor())


@pytest.mark.parametrize(("name", "invariant"), KINDS)
def test_graphs_that_are_replayed_between_eager_calls_of_other_sizes_have_room_of_their_own(machine, name, invariant):
    small, large = (Call(machine, name, invariant=invariant, lengths=lengths) for lengths in ((9, 3000), (9, 9000)))
    small(), large()
    graphs = []
    for capture, call in itertools.product((5, 6), (small, large)):
        machine.memory.capture = capture
        graphs.append((call, call()))
    machine.memory.capture = 0
    others = [Call(machine, name, invariant=invariant, lengths=(9,) * n + (2500 * n,)) for n in range(1, 5)]
    for other, (call, told) in itertools.product(others, graphs):
        other(), call.run(told), small(), large()
    if name == "decode":
        counters = {DECODE.unpack(told)[2] for _, told in graphs}
        assert len(counters) == 2 and DECODE.unpack(small())[2] not in counters, "one for each graph"
        assert all(machine.memory.holds(address) for address in counters), "no fill in a graph, and none in its pool"
    assert not machine.pool.held()


@pytest.mark.parametrize("name", ["hopper", "hopper-paged"])
@pytest.mark.parametrize(("keys", "takes"), [(1, False), (2048, False), (2049, True)])
def test_keys_of_one_chunk_take_no_room_for_sums(machine, name, keys, takes):
    """The kernel adds a chunk up where there is one to come (`ChunkTotals`), and else reads and writes no sums."""
    call = Call(machine, name, lengths=(keys, keys))
    call.run = lambda told: None
    if name == "hopper-paged":  # what counts is what the table can hold
        table = call.cache.page_table[:, : -(-keys // 64)].contiguous()
        call.cache = PagedKV.from_tables(call.cache.k_pool, call.cache.v_pool, table, call.cache.lengths)
    assert (call() != bytes(8)) == takes == bool(rooms._rooms)
    call.backend = backends.with_methods(call.backend, {"source": "planted"})
    assert call() != bytes(8), "a bug may cut chunks elsewhere"
    assert not machine.pool.held()


def test_a_ragged_batch_takes_room_by_its_tokens_whatever_is_said_of_its_longest_sequence(machine):
    """Lengths are not read back: a sequence that is longer than it was said to be finds room."""
    told, problem = [], problem_of(*(torch.zeros(1, 2, 64, 64).half() for _ in range(3)), batch_invariant=True)
    problem, q = problem.with_(lengths="ragged", seqlen_k=64), torch.zeros(1, 2, 5000, 64).half()
    backend = backends.get("hopper")
    for k in (q[:, :, :2048], q[:, :, :2049]):
        keys = backend.seqlens(q, k, problem)[1]
        told.append([])
        backend.told_of_room(told[-1], problem, machine.shape, keys, q.device, 7)
    assert told[0] == [bytes(8)] and told[1] != told[0]


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture
def launches(monkeypatch):
    """How many launches the host has made."""
    made, launch = [], PreparedLaunch.launch
    monkeypatch.setattr(PreparedLaunch, "launch", lambda self: made.append(None) or launch(self))
    return made


@pytest.fixture
def compiled():
    """A function compiled with CUDA graphs; nothing that torch compiled before stands in its way, nor this after."""
    torch.compiler.reset()
    yield lambda function: torch.compile(function, fullgraph=True, mode="reduce-overhead")
    torch.compiler.reset()


def a_decode(lengths, invariant: bool):
    """A step over a cache, with inputs that differ at each call."""
    cache = cache_of(lengths, 2, 64, 64, torch.bfloat16, "cuda")

    def step(q):
        return flashcore.paged_attention(q * 2, cache, backend="decode", batch_invariant=invariant) + 1

    def given(number: int):
        cache.k_pool.mul_(-1)
        cache.v_pool.add_(0.125 * number)
        cache.lengths.sub_(1)
        return (queries(cache, 8, 3, seed=number),)

    return step, given


def a_prefill(rows: int, keys: int, paged: bool):
    """A causal prefill in the batch-invariant mode, in pages or not."""
    cache = cache_of((keys, keys), 2, 64, 64, torch.bfloat16, "cuda") if paged else None

    def dense(q, k, v):
        return flashcore.attention(q * 2, k, v, causal=True, backend="hopper", batch_invariant=True) + 1

    def over_pages(q):
        return flashcore.paged_attention(q * 2, cache, backend="hopper-paged", batch_invariant=True) + 1

    def given(number: int):
        if paged:
            cache.k_pool.mul_(-1)
            return (queries(cache, 8, rows, seed=number),)
        generator = torch.Generator("cuda").manual_seed(number)
        sizes = ((8, rows), (2, keys), (2, keys))
        return tuple(
            torch.randn(2, heads, length, 64, generator=generator, device="cuda").bfloat16() for heads, length in sizes
        )

    return over_pages if paged else dense, given


PAIRS = {
    "decode": lambda: (a_decode((300, 900, 5000), False), a_decode((40,) * 30, False)),
    "decode, batch-invariant": lambda: (a_decode((300, 900, 5000), True), a_decode((9000,), True)),
    "hopper, batch-invariant": lambda: (a_prefill(700, 5000, False), a_prefill(300, 9000, False)),
    "hopper-paged, batch-invariant": lambda: (a_prefill(700, 5000, True), a_prefill(90, 3000, True)),
}
"""Two calls that take room of different sizes."""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", PAIRS)
def test_two_functions_compiled_with_cuda_graphs_are_right_at_each_call(kind, compiled, launches):
    """Each warms up, is captured, and is replayed, all in one memory pool, which torch looks through meanwhile."""
    calls = PAIRS[kind]()
    functions = [compiled(step) for step, _ in calls]
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    by_host = []
    for number in range(6):
        for (step, given), function in zip(calls, functions, strict=True):
            inputs = given(number)
            torch.compiler.cudagraph_mark_step_begin()
            before = len(launches)
            out = function(*inputs).clone()
            by_host.append(len(launches) - before)
            expected = step(*inputs)
            torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped
    assert all(by_host[:4]) and not any(by_host[-4:]), "the last calls are replays"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PAIRS)
def test_a_captured_call_is_right_after_eager_calls_of_other_sizes(kind):
    (step, given), (other, given_other) = PAIRS[kind]()
    inputs = given(0)
    step(*inputs)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step(*inputs), step(*inputs)
    for number in range(1, 4):
        other(*given_other(number))
        for tensor, new in zip(inputs, given(number), strict=True):
            tensor.copy_(new)
        graph.replay()
        expected = step(*inputs)
        other(*given_other(number))
        for out in captured:
            assert torch.equal(out, expected)


@pytest.mark.gpu
def test_a_graph_is_replayed_while_eager_calls_run_on_another_stream():
    step, given = a_decode((300, 900, 5000), False)
    inputs = given(0)
    expected = step(*inputs)
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step(*inputs)
    torch.cuda.synchronize()
    eager = []
    with torch.cuda.stream(aside):
        for _ in range(50):
            graph.replay()
    eager = [step(*inputs) for _ in range(50)]
    torch.cuda.synchronize()
    assert torch.equal(captured, expected) and all(torch.equal(out, expected) for out in eager)
