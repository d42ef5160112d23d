"""Backend `decode`: what it takes, how it cuts keys and heads, and what its kernel is told."""

from __future__ import annotations

import pytest
import torch
from support import launch_structs
from support.hopper_tiles import MULTIPROCESSORS
from support.paged_tables import cache_of, queries, two_selections
from support.recorded_driver import loaded

import flashcore
from flashcore import backends
from flashcore.backends import _paged, with_methods
from flashcore.backends import decode as module
from flashcore.backends._cuda import PARAMS
from flashcore.backends._paged import PAGED
from flashcore.backends.decode import DECODE, MOST_TOKENS
from flashcore.numerics.masking import MaskTensors
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PagedKV, PageSelection, paged_reference, paginate
from flashcore.problem import Problem


def test_chains_of_a_traced_decode_cover_every_unit_once():
    decode = backends.get("decode")
    for seqlen in (1, 64, 65, 333, 900, 1900, 8192):
        problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=1, seqlen_k=seqlen, head_dim=64)
        shape = type("Shape", (), {"tile_n": 128, "num_splits": 2})
        before = decode.chains(problem, shape)
        assert len(before) == -(-seqlen // 128)
        assert all(b == -1 or b == unit - 2 for unit, b in enumerate(before))


@pytest.mark.gpu
def test_more_heads_than_one_launch_lays_out():
    k, v = (torch.randn(900, 8, 40, 64, device="cuda").half() for _ in range(2))
    cache = paginate(k, v, 16)
    q = queries(cache, 8, 1)
    out = flashcore.paged_attention(q, cache, backend="decode")
    assert float((out.double() - paged_reference(q, cache)[0]).abs().max()) < 4e-3


# ------------------------------------------------------------------------------------------------ what it takes

PROBLEM = Problem(
    batch=3, num_heads_q=8, num_heads_kv=2, seqlen_q=2, seqlen_k=500, head_dim=64, causal=True, page_size=64
)


def test_it_takes_a_few_tokens_and_says_how_many():
    decode = backends.get("decode")
    for tokens in range(1, MOST_TOKENS + 1):
        assert decode.why_not(PROBLEM.with_(seqlen_q=tokens)) is None
    assert decode.why_not(PROBLEM.with_(seqlen_q=9)) == "it takes up to 8 query tokens (got 9)"
    assert decode.why_not(PROBLEM.with_(seqlen_q=9, page_size=48)).startswith("page_size 48 is not among 16, ")
    assert decode.why_not(PROBLEM.with_(seqlen_q=9, head_dim=96)) == "head_dim 96 is not among 64, 128"
    assert decode.suits(PROBLEM.with_(seqlen_q=300)) == PROBLEM.with_(seqlen_q=8) and decode.suits(PROBLEM) == PROBLEM
    assert decode.why_not_paged(PROBLEM, selected=True) is None, "it attends to selections"


# ------------------------------------------------------------------------------------------------ how work is cut


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("group", [1, 2, 5, 8, 16, 40, 64, 100])
def test_tiles_of_64_rows_hold_every_head_of_a_group_and_no_empty_tile(group, tokens):
    problem = PROBLEM.with_(num_heads_q=2 * group, seqlen_q=tokens)
    heads, tiles = backends.get("decode").tiling(problem)
    assert heads * tokens <= 64 and heads * tiles >= group > heads * (tiles - 1)
    assert heads == group or (heads + 1) * tokens > 64, "another head would have fitted"


@pytest.mark.parametrize("seqlen", [1, 128, 129, 256, 300, 640, 1100, 1664, 8192])
def test_parts_of_a_traced_head_are_two_or_more_and_of_the_same_size(seqlen):
    units = -(-seqlen // 128)
    parts = backends.get("decode").traced_parts(PROBLEM.with_(seqlen_k=seqlen), 128)
    assert units % parts == 0 and parts >= min(2, units)
    assert not any(units % fewer == 0 for fewer in range(2, parts))


def test_units_before_the_windows_of_all_queries_are_no_part_of_the_chains():
    """Of 12 units the first 5 lie before every window, and the other 7 are shared out in seven parts of one."""
    decode, shape = backends.get("decode"), loaded(tile_n=128, num_splits=2)
    for tokens, left, before in ((1, 895, 5), (1, 894, 5), (1, 896, 4), (8, 888, 5), (8, 889, 4), (1, 2000, 0)):
        problem = PROBLEM.with_(seqlen_k=12 * 128, seqlen_q=tokens, window_left=left)
        assert module.units_before(problem, 128) == before
        parts = decode.traced_parts(problem, 128)
        share = (12 - before) // parts
        assert share * parts == 12 - before and parts >= 2
        found = decode.chains(problem, shape)
        assert found[:before] == (-1,) * before
        assert found[before:] == tuple(
            before + unit - 2 if unit % share >= 2 else -1 for unit in range(12 - before)
        )  # fmt: skip
    assert module.units_before(PROBLEM, 128) == 0 == module.units_before(PROBLEM.with_(window_right=-1), 128)


def test_chains_begin_anew_in_each_part():
    """12 units in two parts, and two consumers: units 0 and 1, 6 and 7 begin chains."""
    before = backends.get("decode").chains(PROBLEM.with_(seqlen_k=12 * 128), loaded(tile_n=128, num_splits=2))
    assert before == (-1, -1, 0, 1, 2, 3, -1, -1, 4 + 2, 5 + 2, 6 + 2, 7 + 2)


# ------------------------------------------------------------------------------------------------ what is told


@pytest.fixture
def told(monkeypatch, driver_memory):
    """Its arguments for one call; a tensor map is the name of its tensor."""
    maps = {}

    def tensor_map(address, shape, strides, *, name, **options):
        maps[name] = {"address": address, "shape": tuple(shape), **options}
        return name.encode()

    monkeypatch.setattr(_paged, "tensor_map", tensor_map)
    monkeypatch.setattr(module, "multiprocessors", lambda device: MULTIPROCESSORS)

    def call(q, cache, selection=None, *, stream=0, traced=False, by=None):
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
        shape = loaded(tile_m=64, tile_n=128, num_splits=2)
        problem = paged_problem_of(q, cache)
        decode = by or backends.get("decode")
        return decode.paged_arguments(q, cache, problem, selection, out, lse, shape, stream, traced)

    call.maps = maps
    return call


def test_the_host_packs_the_struct_that_the_kernel_declares():
    letters = launch_structs.declared("attention_decode", "DecodeParams")
    assert letters == launch_structs.packed(DECODE) and DECODE.size == launch_structs.size_in_c(letters)


def test_the_kernel_is_told_of_pools_pages_and_room_for_parts(told, driver_memory):
    cache = cache_of((40, 300), 2, 64, 32, torch.float16, "cpu")
    q = queries(cache, 24, 7)
    (params, k_map, v_map, paged, own), blocks, room = told(q, cache)
    assert PARAMS.unpack(params)[:3] == (q.data_ptr(), cache.k_pool.data_ptr(), cache.v_pool.data_ptr())
    assert (k_map, v_map, blocks) == (b"k_pool", b"v_pool", MULTIPROCESSORS)
    for name, pool in (("k_pool", cache.k_pool), ("v_pool", cache.v_pool)):
        assert told.maps[name] == {"address": pool.data_ptr(), "shape": tuple(pool.shape), "rows": 32,
                                   "dtype": "float16", "promote": False}, "pages are read once"  # fmt: skip
    assert PAGED.unpack(paged)[:2] == (cache.page_table.data_ptr(), cache.lengths.data_ptr())
    accum, softmax, accounted, heads_a_tile, tiles = DECODE.unpack(own)
    assert (accum, accounted) == (room.address, room.counters)
    assert (heads_a_tile, tiles) == (9, 2), "of 12 heads with 7 tokens each, 9 make 63 rows"
    heads = 2 * 2 * tiles
    parts = (heads + MULTIPROCESSORS) * heads_a_tile * 7
    assert softmax == accum + 4 * parts * 64, "O of all parts, and then what is left of their softmax"
    assert driver_memory.at(accum, 4 * parts * 64 + 8 * parts).numel() == 4 * parts * 66
    assert not driver_memory.at(accounted, 4 * heads).any(), "counters start at zero"


def test_a_selection_is_told_by_its_address_and_width(told):
    cache = cache_of((500,), 2, 64, 64, torch.float16, "cpu")
    wide, narrow = two_selections("cpu")
    for selection, width in ((wide, 4), (narrow, 2)):
        arguments, _, _ = told(queries(cache, 4, 1), cache, selection)
        assert PAGED.unpack(arguments[3])[2:] == (
            selection.pages.data_ptr(), selection.counts.data_ptr(), cache.page_table.stride(0), width, 6
        )  # fmt: skip


def test_a_traced_call_gives_each_head_blocks_of_its_own(told):
    cache = cache_of((40, 300), 2, 64, 32, torch.float16, "cpu")
    q = queries(cache, 4, 2)
    units = -(-paged_problem_of(q, cache).seqlen_k // 128)
    _, blocks, _ = told(q, cache, traced=True)
    assert units == 3 and blocks == 2 * 2 * 3, "three units can only be shared out in three parts"


def test_room_is_used_again_on_one_stream_by_one_kernel_alone(told):
    cache = cache_of((40, 300), 2, 64, 32, torch.float16, "cpu")
    q = queries(cache, 4, 2)
    first = told(q, cache)[2]
    assert told(q, cache)[2] == first == told(queries(cache, 4, 3), cache)[2]
    other = told(q, cache, stream=1)[2]
    assert other.address != first.address and other.counters != first.counters, "two streams run at the same time"
    planted = told(q, cache, by=with_methods(backends.get("decode"), {"source": "another"}))[2]
    assert planted.address != first.address and planted.counters != first.counters
    assert planted.keeps, "what a planted bug leaves behind stays with it"


# ------------------------------------------------------------------------------------------------ rows that overlap


def overlapping(columns: int) -> dict[str, torch.Tensor]:
    """Tables whose rows are less than their length apart: one row for all sequences, and a column put on its side."""
    row = torch.arange(columns, dtype=torch.int32) % 5
    return {"expanded": row.expand(3, -1), "transposed": row[:, None].t()}


@pytest.mark.parametrize("name", ["expanded", "transposed"])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_table_whose_rows_overlap_is_read_from_a_copy(name, invariant, monkeypatch):
    """The kernel takes the step between rows for their length: how far it may read, and how many parts there are."""
    table, seen = overlapping(100)[name], []
    cache = cache_of((300,), 2, 64, 64, torch.float16, "cpu")
    cache = PagedKV.from_tables(cache.k_pool, cache.v_pool, table, torch.full((len(table),), 300, dtype=torch.int32))
    q = queries(cache, 4, 1)
    problem, decode = paged_problem_of(q, cache, batch_invariant=invariant), backends.get("decode")
    monkeypatch.setattr(module.Decode, "attend", lambda self, q, cache, *given, **options: seen.append(cache))
    decode.run_paged(q, cache, problem)
    assert table.stride(0) < 100 and seen[0].page_table.stride(0) == 100 and seen[0].lengths_fit
    assert torch.equal(seen[0].page_table, table) and module.table_keys(seen[0]) == 100 * 64
    assert decode.room_of_one(problem, seen[0]) == 4 * decode.room_of_one(problem, cache), "four chunks, and not one"
    wide = PagedKV(cache.k_pool, cache.v_pool, seen[0].page_table[:, :3], cache.lengths)
    assert module.rows_apart(wide) is wide, "rows further apart than they are long are read where they lie"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["expanded", "transposed"])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_table_whose_rows_overlap_gives_what_a_whole_one_gives(name, invariant):
    k, v = (torch.randn(1, 2, 5000, 64, device="cuda").half() for _ in range(2))
    whole = paginate(k, v, 16)
    row = whole.page_table[0]
    table = row.expand(3, -1) if name == "expanded" else row[:, None].contiguous().t()
    cache = PagedKV.from_tables(whole.k_pool, whole.v_pool, table, whole.lengths.expand(len(table)).contiguous())
    q = queries(cache, 8, 1)
    out = flashcore.paged_attention(q, cache, backend="decode", batch_invariant=invariant)
    assert float((out.double() - paged_reference(q, cache)[0]).abs().max()) < 4e-3


# ------------------------------------------------------------------------------------------------ large batches


def test_more_heads_than_one_launch_takes_are_several_launches(monkeypatch):
    """Each with its own rows of the table, the lengths and the selection, all sinks, and the results end to end."""
    calls, sinks, holes = [], [], []

    def attend(self, q, cache, problem, selection, out, lse, buffers=None, masks=None):
        holes.append(cache.holes)
        calls.append((problem.batch, cache.lengths.tolist(), selection and selection.counts.flatten().tolist()))
        sinks.append(masks)
        out.copy_(q)
        lse.copy_(cache.lengths[:, None, None].expand_as(lse))

    monkeypatch.setattr(module.Decode, "most_heads", 4)
    monkeypatch.setattr(type(backends.get("decode")), "attend", attend)
    lengths = (10, 20, 30, 40, 50)
    cache = cache_of(lengths, 2, 64, 16, torch.float16, "cpu")
    q = queries(cache, 4, 1)
    problem = paged_problem_of(q, cache)
    counts = torch.arange(1, 11, dtype=torch.int32).view(5, 2)
    selection = PageSelection(torch.zeros(5, 2, 10, dtype=torch.int32), counts)
    for chosen in (None, selection):
        calls.clear()
        out, lse = backends.get("decode").run_paged(q, cache, problem, chosen)
        assert [batch for batch, _, _ in calls] == [2, 2, 1]
        assert [told for _, told, _ in calls] == [[10, 20], [30, 40], [50]]
        assert torch.equal(out, q) and lse[:, 0, 0].tolist() == list(lengths)
    assert [told for _, _, told in calls] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    calls.clear()
    backends.get("decode").run_paged(q[:2], PagedKV(cache.k_pool, cache.v_pool, cache.page_table[:2],
                                                    cache.lengths[:2]), problem.with_(batch=2))  # fmt: skip
    assert len(calls) == 1 and not any(sinks)
    given = MaskTensors(sink=torch.zeros(4))
    backends.get("decode").run_paged(q, cache, problem.with_(sink=True), masks=given)
    assert len(calls) == 4 and all(one is given for one in sinks[-3:]), "sinks belong to heads, and all have these"
    assert not any(holes)
    cache.holes = True
    backends.get("decode").run_paged(q, cache, problem)
    assert holes[-3:] == [True] * 3
