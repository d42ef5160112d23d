"""Backend `hopper-paged`: which kernel it compiles, what that is told of pages, and what it does not take."""

from __future__ import annotations

import struct

import pytest
import torch
from support.hopper_tiles import MULTIPROCESSORS, loaded_for
from support.paged_tables import cache_of, queries

from flashcore import backends
from flashcore.backends import _paged, hopper
from flashcore.backends._cuda import PARAMS
from flashcore.backends._dealing import WARP_ROWS
from flashcore.backends._paged import PAGED
from flashcore.errors import Unsupported
from flashcore.gpu import build
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PAGE_SIZES
from flashcore.problem import PRESETS, square

pytestmark = pytest.mark.usefixtures("on_an_h200")


@pytest.fixture
def maps(monkeypatch):
    """What each tensor map was made of; the map itself is its name."""
    made = {}

    def tensor_map(address, shape, strides, *, name, **options):
        made[name] = {"address": address, "shape": tuple(shape), "strides": tuple(strides), **options}
        return name.encode()

    monkeypatch.setattr(hopper, "tensor_map", tensor_map)
    monkeypatch.setattr(_paged, "tensor_map", tensor_map)
    return made


def told(problem, q, cache):
    """The arguments of a launch, and its number of blocks."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    backend = backends.get("hopper-paged")
    return backend.paged_arguments(q, cache, problem, None, out, lse, loaded_for(problem), 0, False), out, lse


def test_it_is_the_hopper_kernel_compiled_for_pages_and_never_splits_keys():
    paged, dense = backends.get("hopper-paged"), backends.get("hopper")
    assert paged.kernel == dense.kernel and paged.variant_of == "hopper" and paged.paged and not paged.dense
    for problem in (PRESETS["report"], PRESETS["latency"], square(1, 1, 64, 64)):
        assert paged.defines(problem, 0) == (("FLASHCORE_PAGED", 1),)
        assert paged.entry(problem, 0) == "attention_hopper"
    assert dense.entry(square(1, 1, 64, 64), 0) != "attention_hopper", "this one would be split"
    assert "FLASHCORE_PAGED" in build.kernel_path(paged.kernel).read_text()


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_boxes_of_a_pool_lie_within_one_page(maps, page_size):
    cache = cache_of((40, 300), 2, 64, page_size, torch.float16, "cpu")
    q = queries(cache, 4, 70)
    problem = paged_problem_of(q, cache)
    told(problem, q, cache)
    for name, pool in (("k_pool", cache.k_pool), ("v_pool", cache.v_pool)):
        assert maps[name] == {"address": pool.data_ptr(), "shape": tuple(pool.shape), "strides": pool.stride()[:3],
                              "rows": min(64, page_size), "dtype": "float16", "promote": True}  # fmt: skip
    assert maps["q"]["rows"] == loaded_for(problem).tile_m and maps["q"]["address"] == q.data_ptr()
    assert maps["out"]["rows"] == WARP_ROWS, "each warp stores its own rows"


def test_the_kernel_is_told_of_pools_then_maps_then_sections_then_pages(maps):
    cache = cache_of((40, 300), 2, 64, 32, torch.float16, "cpu")
    q = queries(cache, 4, 70)
    problem = paged_problem_of(q, cache)
    (arguments, blocks, keeps), out, lse = told(problem, q, cache)
    params, *made, sections, paged = arguments
    fields = PARAMS.unpack(params)
    assert fields[:5] == tuple(t.data_ptr() for t in (q, cache.k_pool, cache.v_pool, out, lse))
    assert fields[17:23] == (2, 4, 2, 70, problem.seqlen_k, 1)
    assert made == [b"q", b"k_pool", b"v_pool", b"out"] and keeps is None
    shape = loaded_for(problem)
    assert struct.unpack("i", sections) == (backends.get("hopper-paged").sections(problem, shape, 0),)
    table, lengths, selected, counts, stride, most, shift = PAGED.unpack(paged)
    assert (table, lengths) == (cache.page_table.data_ptr(), cache.lengths.data_ptr())
    assert (selected, counts, most) == (0, 0, 0), "all pages that are resident"
    assert (stride, shift) == (cache.page_table.stride(0), 5)
    assert blocks == 2 * 4 * -(-70 // shape.tile_m) < MULTIPROCESSORS


def test_a_block_a_multiprocessor_takes_one_tile_after_the_other(maps):
    cache = cache_of((300, 300), 32, 64, 64, torch.float16, "cpu")
    q = queries(cache, 32, 700)
    problem = paged_problem_of(q, cache)
    (_, blocks, _), _, _ = told(problem, q, cache)
    assert blocks == MULTIPROCESSORS < 2 * 32 * -(-700 // loaded_for(problem).tile_m)


def test_what_it_does_not_take(monkeypatch):
    backend = backends.get("hopper-paged")
    problem = PRESETS["report"].with_(page_size=64)
    assert all(backend.why_not(problem.with_(page_size=size)) is None for size in PAGE_SIZES)
    assert backend.why_not(problem.with_(page_size=48)) == (
        f"page_size 48 is not among {', '.join(map(str, PAGE_SIZES))}"
    )
    assert backend.why_not(problem.with_(head_dim=96, page_size=48)) == "head_dim 96 is not among 64, 128"
    assert backend.why_not_paged(problem) is None
    assert backend.why_not_paged(problem, selected=True) == "it attends to all pages and takes no selection"
    monkeypatch.setattr(type(backend), "availability", lambda self: backends.AVAILABLE)
    with pytest.raises(Unsupported, match="'hopper-paged' cannot run this problem: page_size 48"):
        backend.require(problem.with_(page_size=48))


def test_it_runs_the_hopper_kernel_compiled_for_pages():
    paged, hopper = backends.get("hopper-paged"), backends.get("hopper")
    assert paged.kernel == hopper.kernel and paged.paged and not paged.dense
    assert dict(paged.defines(square(1, 2, 256, 64), 0)).get("FLASHCORE_PAGED") == 1
    assert "FLASHCORE_PAGED" in build.kernel_source(paged.kernel)
    assert paged.source_hash() == hopper.source_hash()


def test_it_refuses_a_selection_of_pages_and_other_head_dims_with_a_reason():
    paged = backends.get("hopper-paged")
    assert paged.why_not_paged(square(1, 2, 256, 64)) is None
    assert "96" in paged.why_not(square(1, 2, 256, 96))
    assert paged.why_not_paged(square(1, 2, 256, 64), selected=True)
