"""One ledger for several layers: the same tokens as a cache of its own for each layer, whatever happens to them."""

from __future__ import annotations

import pytest
import torch
from support.paged_caches import DIM, HEADS, SIZE, tokens

from flashcore.errors import InvalidProblem, PageTableError, PoolExhausted, SequenceTooLong
from flashcore.paged_ops import paged_attention
from flashcore.paging import LayeredKVCache, PagedKVCache, gather

LAYERS = 3


def layered(num_pages=12, batch=2, **options) -> LayeredKVCache:
    options = {"num_heads_kv": HEADS, "head_dim": DIM, "page_size": SIZE, "device": "cpu", **options}
    return LayeredKVCache(LAYERS, num_pages=num_pages, batch=batch, **options)


def step(cache: LayeredKVCache, count: int, separate: list[PagedKVCache], sequences=None) -> None:
    """The next tokens of some sequences, other ones in each layer, into both."""
    which = sequences or cache.sequences
    cache.reserve(count, which)
    rows = torch.tensor([s.row for s in which])
    for layer, own in enumerate(separate):
        k, v = tokens(count, len(which))
        cache.write(layer, k, v, rows=rows)
        mine = {s.row: s for s in own.sequences}
        own.append(k, v, [mine[s.row] for s in which])
    cache.advance(count, which)


def same(cache: LayeredKVCache, separate: list[PagedKVCache]) -> None:
    cache.check()
    for pages, own in zip(cache.layers, separate, strict=True):
        assert pages.lengths.tolist() == own.lengths.tolist()
        for sequence in own.sequences:
            for mine, theirs in zip(gather(pages, sequence.row), gather(own, sequence.row), strict=True):
                assert torch.equal(mine, theirs)


@pytest.fixture
def both():
    cache = layered(batch=3)
    separate = [
        PagedKVCache(num_pages=12, batch=3, num_heads_kv=HEADS, head_dim=DIM, page_size=SIZE, device="cpu")
        for _ in range(LAYERS)
    ]
    for one in (cache, *separate):
        one.add()
        one.add()
    step(cache, SIZE + 3, separate)
    return cache, separate


def test_layers_hold_what_caches_of_their_own_hold(both):
    cache, separate = both
    for _ in range(3):
        step(cache, 1, separate)
    same(cache, separate)
    q = torch.randn(3, 2 * HEADS, 1, DIM).half()
    for pages, own in zip(cache.layers, separate, strict=True):
        assert torch.equal(paged_attention(q, pages), paged_attention(q, own))
    assert len({layer.k_pool.data_ptr() for layer in cache.layers}) == LAYERS
    assert all(layer.page_table is cache.layers[0].page_table for layer in cache.layers)


def test_a_shared_page_is_copied_in_every_layer_before_it_is_written_to(both):
    cache, separate = both
    first = cache.sequences[0]
    child = cache.fork(first)
    for own in separate:
        own.fork(own.sequences[0])
    assert cache.pages(child) == cache.pages(first)
    step(cache, 1, separate, [child])
    assert cache.pages(child)[-1] != cache.pages(first)[-1]
    same(cache, separate)


def test_tokens_are_forgotten_and_sequences_end_in_every_layer(both):
    cache, separate = both
    first, second = cache.sequences
    cache.truncate(first, 5)
    for own in separate:
        own.truncate(own.sequences[0], 5)
    same(cache, separate)
    step(cache, 2, separate)
    same(cache, separate)
    assert cache.free(second) == 2
    for own in separate:
        own.free(own.sequences[1])
    same(cache, separate)
    assert cache.length(first) == 7 and cache.max_length == 7


def test_what_does_not_fit_changes_nothing(both):
    cache, separate = both
    with pytest.raises(PoolExhausted):
        cache.reserve(10 * SIZE)
    with pytest.raises(SequenceTooLong):
        cache.reserve([12 * SIZE, 0])
    with pytest.raises(InvalidProblem, match="it has to be \\[3 sequences"):
        cache.write(0, *tokens(1, 2))
    for layer in (-1, LAYERS, 0.0, "0", True):
        with pytest.raises(InvalidProblem, match="layer is .*; it has to be a whole number from 0 to 2"):
            cache.write(layer, *tokens(1, 3))
    for rows, counts in ((torch.tensor([0, 0]), None), (torch.tensor([0, 1]), torch.tensor([1, 2], dtype=torch.int32))):
        with pytest.raises(InvalidProblem, match="rows|counts"):
            cache.write(0, *tokens(1, 2), rows=rows, counts=counts)
    same(cache, separate)


def test_a_layer_left_out_is_noticed(both):
    cache, _ = both
    cache.reserve(1)
    k, v = tokens(1, 2)
    cache.write(0, k, v, rows=torch.tensor([0, 1]))
    cache.advance(1)
    with pytest.raises(PageTableError, match="write\\(\\) to every layer once"):
        cache.check()
    cache = layered()
    cache.add()
    cache.reserve(1)
    cache.advance(1)
    with pytest.raises(PageTableError, match="call advance"):
        cache.check()


@pytest.mark.parametrize("bad", [0, -1, 1.5])
def test_a_model_has_layers(bad):
    with pytest.raises(InvalidProblem, match="num_layers"):
        LayeredKVCache(bad, num_pages=1, batch=1, num_heads_kv=1, head_dim=8, device="cpu")


def test_its_options_are_those_of_a_cache_without_key_bounds():
    for bad in (True, False):
        with pytest.raises(InvalidProblem, match="key_bounds is no option of a LayeredKVCache"):
            layered(key_bounds=bad)
    with pytest.raises(TypeError, match="page_sizes"):
        layered(page_sizes=64)
    with pytest.raises(InvalidProblem, match="page_size is 48; it has to be one of 16, "):
        layered(page_size=48)
    usual = LayeredKVCache(2, num_pages=3, batch=1, num_heads_kv=1, head_dim=8, device="cpu")
    one = PagedKVCache(num_pages=3, batch=1, num_heads_kv=1, head_dim=8, device="cpu")
    assert (usual.page_size, usual.dtype, usual.layers[1].max_pages) == (one.page_size, one.dtype, one.max_pages)


def test_bytes_are_those_of_all_layers():
    cache = layered()
    assert cache.bytes == LAYERS * 2 * 12 * HEADS * SIZE * DIM * 2


@pytest.mark.gpu
def test_a_captured_step_goes_on_from_token_to_token():
    cache = LayeredKVCache(2, num_pages=8, batch=2, num_heads_kv=2, head_dim=64, page_size=16, dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 2, 40, 64, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(2, 4, 1, 64, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        cache.add()
    cache.reserve(15)
    for layer in range(2):
        cache.write(layer, k[:, :, :15], v[:, :, :15])
    cache.advance(15)
    new = [t[:, :, :1].clone() for t in (k, v)]

    def step():
        found = []
        for layer, pages in enumerate(cache.layers):
            cache.write(layer, *new)
            found.append(paged_attention(q, pages))
        return found

    cache.reserve(1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # kernels are built before a graph may hold them
    torch.cuda.synchronize()
    cache.lengths.fill_(15)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for position in range(15, 40):  # over the ends of two pages
        cache.reserve(1)
        for kept, t in zip(new, (k, v), strict=True):
            kept.copy_(t[:, :, position : position + 1])
        graph.replay()
        cache.advance(1)
        seen = [t[:, :, : position + 1] for t in (k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(q, *seen, enable_gqa=True)
        for out in found:
            torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    cache.check()
