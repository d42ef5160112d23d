"""The chunks of the batch-invariant mode: the host's copy of the law, how a decode kernel cuts by it, and room for it.

What kernels compute with is read out of their sources, and computed with here.
"""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import pytest
import torch
from support.hopper_tiles import MULTIPROCESSORS
from support.paged_tables import cache_of, queries
from support.recorded_driver import loaded

from flashcore import backends
from flashcore.backends import _chunks as law
from flashcore.backends import _paged
from flashcore.backends import decode as module
from flashcore.backends.decode import DECODE, MOST_ROOM, Decode
from flashcore.backends.hopper import LAW_TILE as PAGE_OF_HOPPER
from flashcore.gpu import build, options
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PagedKV
from flashcore.problem import Problem

CHUNKS = (build.kernels_dir() / "include" / "chunks.cuh").read_text()
DECODE_CHUNKS = (build.kernels_dir() / "include" / "decode_chunks.cuh").read_text()
KEYS = (0, 1, 63, 64, 65, 2047, 2048, 2049, 4096, 4097, 32_768, 100_000)
ASKED = Problem(
    batch=3, num_heads_q=8, num_heads_kv=2, seqlen_q=1, seqlen_k=5000, head_dim=64, page_size=16, batch_invariant=True
)


def constant(name: str, text: str = CHUNKS) -> int:
    """A whole number that a header defines."""
    return int(re.search(rf"constexpr int {name} = (\d+);", text)[1])


def computed(expression: str, **names) -> int:
    """What an expression of C comes to, over whole numbers that are not negative."""
    choice = re.fullmatch(r"(.+?) \? (.+?) : (.+)", expression)
    if choice:
        return computed(choice[2 if computed(choice[1], **names) else 3], **names)
    known = {"max": max, "min": min, "chunk_of": chunk_of, "first_tile_of": first_tile_of, **names}
    return eval(expression.replace(" / ", " // "), {"__builtins__": {}}, known)


def returned(function: str, text: str, **names) -> int:
    """What a function of one line returns."""
    body = re.search(rf"\b{function}\([^)]*\)(?: \{{| \{{\n) *return (.+?);", text)[1]
    return computed(body, **names)


def chunk_of(tile: int) -> int:
    return returned("chunk_of", CHUNKS, tile=tile, CHUNK_TILES=constant("CHUNK_TILES"))


def first_tile_of(chunk: int) -> int:
    return returned("first_tile_of", CHUNKS, chunk=chunk, CHUNK_TILES=constant("CHUNK_TILES"))


# ------------------------------------------------------------------------------------------------ the law


def test_the_host_has_the_numbers_of_the_header():
    assert (law.LAW_TILE, law.CHUNK_TILES) == (constant("LAW_TILE"), constant("CHUNK_TILES")) == (64, 32)
    assert PAGE_OF_HOPPER == law.LAW_TILE, "the tile that the backend asks for where tiles are few"


def test_the_host_finds_the_chunk_of_a_tile_as_the_header_does():
    tiles = [*range(200), *random.Random(3).sample(range(1 << 20), 200)]
    assert [law.chunk_of(tile) for tile in tiles] == [chunk_of(tile) for tile in tiles]
    for chunk in (0, 1, 2, 77):
        first = first_tile_of(chunk)
        assert law.chunk_of(first) == chunk and (first == 0 or law.chunk_of(first - 1) == chunk - 1)


@pytest.mark.parametrize("keys", KEYS)
def test_most_chunks_are_what_the_decode_kernel_numbers_parts_by(keys):
    """Whose room has as many for each head as the table has keys for."""
    for page_shift in (4, 6, 8):
        stride = -(-keys // (1 << page_shift))
        paged = SimpleNamespace(table_stride=stride, page_shift=page_shift)
        told = returned("most_chunks", DECODE_CHUNKS, paged=paged, UNIT_KEYS=law.LAW_TILE)
        assert told == law.most_chunks(stride << page_shift) >= law.most_chunks(keys)
    assert law.most_chunks(keys) == max(1, -(-keys // (law.LAW_TILE * law.CHUNK_TILES)))


@pytest.mark.parametrize("keys", KEYS)
def test_each_chunk_is_a_chain_of_its_tiles(keys):
    found = law.chains(keys)
    assert len(found) == -(-keys // law.LAW_TILE)
    for tile, before in enumerate(found):
        begins = tile == 0 or law.chunk_of(tile) != law.chunk_of(tile - 1)
        assert before == (-1 if begins else tile - 1)
    assert found.count(-1) == (law.most_chunks(keys) if keys else 0)


def test_chains_do_not_hang_on_the_backend_or_the_problem():
    shape = loaded(tile_n=64, num_splits=2)
    for name in ("decode", "hopper-paged"):
        one = backends.get(name)
        for problem in (ASKED, ASKED.with_(batch=1, num_heads_q=2, seqlen_q=4, page_size=128)):
            assert one.chains(problem, shape) == law.chains(5000)
    assert backends.get("hopper-paged").chains(ASKED.with_(batch_invariant=False), shape) is None


def test_the_macro_is_defined_where_a_problem_asks():
    assert law.invariant_defines(ASKED) == ((options.INVARIANT, 1),)
    assert law.invariant_defines(ASKED.with_(batch_invariant=False)) == ()
    for name in ("decode", "hopper-paged", "hopper-unsplit"):
        assert dict(backends.get(name).defines(ASKED, 0)).get(options.INVARIANT) == 1, name


@pytest.mark.parametrize("rows", [1, 40, 128, 5000])
def test_no_shape_of_the_hopper_kernel_takes_another_tile_of_keys(rows, on_an_h200):
    """Few tiles get blocks of two warpgroups, as without the mode, yet tiles of the law; keys are never split."""
    hopper = backends.get("hopper")
    for head_dim in (64, 128):
        for batch in (1, 64):
            problem = ASKED.with_(seqlen_q=rows, batch=batch, head_dim=head_dim)
            found = dict(hopper.defines(problem, 0))
            plain = dict(hopper.defines(problem.with_(batch_invariant=False), 0))
            assert found.pop(options.INVARIANT) == 1 and found.keys() == plain.keys()
            assert found.get("FLASHCORE_TILE_N", 64) == law.LAW_TILE
            assert found.get("FLASHCORE_NUM_CONSUMERS") == plain.get("FLASHCORE_NUM_CONSUMERS")
            assert hopper.entry(problem, 0) == "attention_hopper"


# ------------------------------------------------------------------------------------------------ shares of blocks


class Cut:
    """How the decode kernel shares out the chunks of heads: what `Chunk` and `produce` compute, by their own lines.

    Parameters
    ----------
    units
        Units of each head.
    before
        Of each head, units of its sequence that lie before the window.
    """

    def __init__(self, units: list[int], before: list[int], blocks: int):
        self.first_unit = [sum(units[:n]) for n in range(len(units) + 1)]
        self.before, self.blocks = before, blocks
        self.all = self.first_unit[-1]
        found = re.search(
            r"chunk = (chunk_of\(unit - unit_0\));\n *begin = (.+?);\n *end = (.+?);\n", DECODE_CHUNKS
        ).groups()
        self.chunk_line, self.begin_line, self.end_line = found
        self.share_line = re.search(r"return (unit - chunk\.begin .+?);", DECODE_CHUNKS)[1]

    def head_of(self, unit: int) -> int:
        return next(n for n in range(len(self.before)) if self.first_unit[n] <= unit < self.first_unit[n + 1])

    def chunk(self, unit: int) -> SimpleNamespace:
        number = self.head_of(unit)
        first = self.first_unit[number]
        names = {"unit": unit, "unit_0": first - self.before[number], "first": first, "number": number, "smem": self}
        names["chunk"] = computed(self.chunk_line, **names)
        begin, end = (computed(line, **names) for line in (self.begin_line, self.end_line))
        return SimpleNamespace(begin=begin, end=end, number=number, chunk=names["chunk"])

    def share_begin(self, block: int) -> int:
        few, longer = self.all // self.blocks, self.all % self.blocks
        unit = block * few + min(block, longer)
        if unit >= self.all:
            return self.all
        return computed(self.share_line, unit=unit, chunk=self.chunk(unit))

    def chunks_of(self, block: int) -> list[SimpleNamespace]:
        """The chunks that a block's warpgroups take, in that order."""
        left, end, found = self.share_begin(block), self.share_begin(block + 1), []
        while left != end:
            found.append(self.chunk(left))
            assert found[-1].begin == left, "a share begins at a border"
            left = found[-1].end
            assert left <= end, "and ends at one"
        return found


def cuts():
    """Many short heads, few long ones, windows that begin within a chunk, more blocks than units."""
    rng = random.Random(7)
    for blocks in (1, 5, 132):
        yield Cut([1], [0], blocks)
        yield Cut([rng.randint(1, 40) for _ in range(60)], [0] * 60, blocks)
        yield Cut([500], [0], blocks)
        yield Cut([700, 1, 64, 33, 32, 31], [0] * 6, blocks)
        yield Cut([rng.randint(1, 90) for _ in range(12)], [rng.randint(0, 90) for _ in range(12)], blocks)


@pytest.mark.slow
def test_every_unit_is_in_one_chunk_of_one_block_and_borders_hang_on_its_place_in_its_sequence_alone():
    for cut in cuts():
        taken, parts = [], set()
        for block in range(cut.blocks):
            for chunk in cut.chunks_of(block):
                taken += range(chunk.begin, chunk.end)
                assert (chunk.number, chunk.chunk) not in parts, "a part is written once"
                parts.add((chunk.number, chunk.chunk))
                offset = cut.before[chunk.number] - cut.first_unit[chunk.number]
                begin, end = chunk.begin + offset, chunk.end + offset  # tiles of the sequence
                assert begin in (cut.before[chunk.number], first_tile_of(chunk.chunk))
                last = cut.first_unit[chunk.number + 1] + offset
                assert end == min(last, first_tile_of(chunk.chunk + 1)) > begin
        assert taken == list(range(cut.all))
        for number in range(len(cut.before)):  # all parts of a head are there, one after the other
            first, last = chunk_of(cut.before[number]), cut.before[number] + cut.first_unit[number + 1]
            wanted = range(first, chunk_of(last - cut.first_unit[number] - 1) + 1)
            assert sorted(part for head, part in parts if head == number) == list(wanted)


def test_a_share_is_no_further_from_an_even_one_than_half_a_chunk_at_either_end():
    for cut in cuts():
        even = cut.all / cut.blocks
        for block in range(cut.blocks):
            share = sum(chunk.end - chunk.begin for chunk in cut.chunks_of(block))
            assert abs(share - even) <= law.CHUNK_TILES + 1


# ------------------------------------------------------------------------------------------------ room


@pytest.fixture
def told(monkeypatch, driver_memory):
    """Room and blocks of a call of `decode`, without a GPU."""
    monkeypatch.setattr(_paged, "tensor_map", lambda *given, name, **options: name.encode())
    monkeypatch.setattr(module, "multiprocessors", lambda device: MULTIPROCESSORS)

    def call(q, cache, traced=False):
        problem = paged_problem_of(q, cache, batch_invariant=True)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
        shape = loaded(tile_m=64, tile_n=64, num_splits=2)
        return backends.get("decode").paged_arguments(q, cache, problem, None, out, lse, shape, 0, traced)

    return call


@pytest.mark.parametrize("lengths", [(40, 300), (2048,), (2049, 1, 7000)])
def test_there_is_room_for_every_part_that_the_kernel_numbers(told, driver_memory, lengths):
    cache = cache_of(lengths, 2, 64, 32, torch.float16, "cpu")
    arguments, blocks, room = told(queries(cache, 24, 7), cache)
    accum, softmax, accounted, heads_a_tile, tiles = DECODE.unpack(arguments[-1])
    assert (heads_a_tile, tiles, blocks) == (9, 2, MULTIPROCESSORS)
    heads, rows = len(lengths) * 2 * tiles, heads_a_tile * 7
    stride = cache.page_table.stride(0)
    paged = SimpleNamespace(table_stride=stride, page_shift=5)
    a_head = returned("most_chunks", DECODE_CHUNKS, paged=paged, UNIT_KEYS=law.LAW_TILE)
    assert a_head > chunk_of((max(lengths) - 1) // 64)
    parts = heads * a_head * rows
    assert (accum, accounted) == (room.address, room.counters) and softmax == accum + 4 * parts * 64
    assert driver_memory.at(accum, 4 * parts * 66).numel() and not driver_memory.at(accounted, 4 * heads).any()
    assert told(queries(cache, 24, 7), cache, traced=True)[1] == MULTIPROCESSORS, "chains are the same in any share"


def test_batches_of_many_sizes_share_one_room_and_a_graph_has_one_that_fits(told, driver_memory):
    """What a server calls: a room for each size would be kept for each."""

    def of(size: int):
        cache = cache_of((300,) * size, 2, 64, 64, torch.float16, "cpu")
        q = queries(cache, 4, 1)
        return told(q, cache)[2], size * backends.get("decode").room_of_one(problem_of(q, cache), cache)

    assert len({of(size)[0] for size in range(1, 17)}) == 1
    driver_memory.capture = 7
    for size in (1, 3, 5):
        room, needed = of(size)
        assert [held.numel() for held in room.keeps] == [needed]


def test_room_of_one_sequence_is_what_a_launch_of_one_takes(told, driver_memory):
    """As in a graph, where nobody shares it."""
    driver_memory.capture = 7
    decode = backends.get("decode")
    for heads, tokens in ((2, 1), (24, 7), (130, 8)):
        cache = cache_of((5000,), 2, 64, 64, torch.float16, "cpu")
        q = queries(cache, heads, tokens)
        _, _, room = told(q, cache)
        problem = problem_of(q, cache)
        assert decode.room_of_one(problem, cache) == room.keeps[0].numel()
        assert decode.room_of_one(problem.with_(batch=9), cache) == decode.room_of_one(problem, cache)


def problem_of(q, cache):
    return paged_problem_of(q, cache, batch_invariant=True)


@pytest.fixture
def launches(monkeypatch):
    """Sequences of each launch of `decode`, in place of launching."""
    calls = []

    def attend(self, q, cache, problem, selection, out, lse, buffers=None, masks=None):
        assert q.shape[0] == cache.batch == problem.batch and cache.lengths_fit
        calls.append(cache.lengths.tolist())
        out.copy_(q)
        lse.copy_(cache.lengths[:, None, None].expand_as(lse))

    monkeypatch.setattr(module.Decode, "attend", attend)
    return calls


@pytest.mark.parametrize(
    ("sequences", "sizes"), [(0.5, [1] * 5), (1, [1] * 5), (2, [2, 2, 1]), (4.9, [3, 2]), (5, [5])]
)
def test_a_batch_is_taken_apart_where_its_parts_have_no_room_at_once(launches, monkeypatch, sequences, sizes):
    lengths = (10, 3000, 30, 40, 2500)
    cache = cache_of(lengths, 2, 64, 16, torch.float16, "cpu")
    q = queries(cache, 4, 1)
    problem, decode = paged_problem_of(q, cache, batch_invariant=True), backends.get("decode")
    monkeypatch.setattr(module, "MOST_ROOM", int(sequences * decode.room_of_one(problem, cache)))
    out, lse = decode.run_paged(q, cache, problem)
    assert [len(call) for call in launches] == sizes and sum(launches, []) == list(lengths)
    assert torch.equal(out, q) and lse[:, 0, 0].tolist() == list(lengths), "end to end, in their order"
    launches.clear()
    decode.run_paged(q, cache, problem.with_(batch_invariant=False))
    assert [len(call) for call in launches] == [5], "without the mode parts are few"


def test_what_serves_many_long_sequences_stays_within_the_room(launches):
    """128 sequences of 32,768 keys, of which a call may have one token each, or eight."""
    decode = backends.get("decode")
    problem = Problem(
        batch=128, num_heads_q=32, num_heads_kv=8, seqlen_q=1, seqlen_k=32_768, head_dim=128, page_size=64,
        batch_invariant=True,
    )  # fmt: skip
    pool = torch.empty(1, 8, 64, 128, dtype=torch.float16)
    table, lengths = torch.zeros(128, 512, dtype=torch.int32), torch.arange(1, 129, dtype=torch.int32)
    cache = PagedKV(pool, pool, table, lengths)
    one = decode.room_of_one(problem, cache)
    assert one == 8 * 4 * 16 * (128 + 2) * 4 and 128 * one < MOST_ROOM
    decode.run_paged(torch.empty(128, 32, 1, 128, dtype=torch.float16), cache, problem)
    assert [len(call) for call in launches] == [128]
    launches.clear()
    many = problem.with_(seqlen_q=8)
    decode.run_paged(torch.empty(128, 32, 8, 128, dtype=torch.float16), cache, many)
    assert decode.room_of_one(many, cache) == 8 * one
    assert 64 <= MOST_ROOM // (8 * one) < 128
    assert [len(call) for call in launches] == [64, 64], "two launches are enough, and are alike"
    assert Decode.most_heads // 8 > 128, "room is what limits it"
