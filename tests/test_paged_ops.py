"""Attention over pages as a user calls it, on every backend that reads a page table."""

from __future__ import annotations

import math

import pytest
import torch

import flashcore
from flashcore import backends
from flashcore.errors import InvalidProblem, PageTableError, Unsupported
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PagedKV, PagedKVCache, PageSelection, SinkWindow, TopK, paged_reference, paginate
from flashcore.problem import Problem

LENGTHS = (1, 17, 64, 200, 1000)


def cache_of(lengths, heads: int, head_dim: int, page_size: int, dtype, device, *, drop: bool = False) -> PagedKV:
    """Sequences of these lengths in pages out of order; NaN where no token is, and a table full of traps past each."""
    pages = [-(-length // page_size) for length in lengths]
    generator = torch.Generator().manual_seed(page_size + head_dim)
    order = torch.randperm(sum(pages) + 3, generator=generator).tolist()
    pools = [torch.full((len(order), heads, page_size, head_dim), math.nan, dtype=dtype) for _ in range(2)]
    table = torch.full((len(lengths), max(pages) + 2), 1 << 20, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for column in range(pages[row]):
            page = order.pop()
            table[row, column] = page
            tokens = min(page_size, length - column * page_size)
            for pool in pools:
                pool[page, :, :tokens] = torch.randn(heads, tokens, head_dim, generator=generator).to(dtype)
        if drop and pages[row] > 2:
            table[row, 1] = -1
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return PagedKV.from_tables(*(t.to(device) for t in (*pools, table, lengths)))


def queries(cache: PagedKV, heads: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(cache.batch, heads, tokens, cache.head_dim, generator=generator)
    return q.to(cache.dtype).to(cache.device)


class Three:
    """A policy that returns no selection."""

    def select(self, q, cache):
        return 3


def test_pages_selected_by_a_policy_on_the_cpu():
    cache = PagedKVCache(num_pages=12, batch=2, num_heads_kv=2, head_dim=64, page_size=64, device="cpu")
    for _ in range(2):
        cache.add()
    k, v = (torch.randn(2, 2, 300, 64).half() for _ in range(2))
    cache.append(k, v)
    q = queries(cache, 4, 1)
    for policy in (None, SinkWindow(1, 1), TopK(pages=2)):
        out, lse = flashcore.paged_attention(q, cache, policy=policy, return_lse=True)
        selection = policy and policy.select(q, cache)
        expected, expected_lse = paged_reference(q, cache, selection)
        assert torch.equal(out, expected.half()) and torch.equal(lse, expected_lse.float())
    dense = flashcore.attention(q, k, v, causal=True, backend="reference")
    assert torch.equal(flashcore.paged_attention(q, cache), dense)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda q, c: (q[0], c, {}), InvalidProblem, "4"),
        (lambda q, c: (q, "a cache", {}), InvalidProblem, "cache is a str; pass a"),
        (lambda q, c: (q.bfloat16(), c, {}), InvalidProblem, "bfloat16"),
        (lambda q, c: (q, c, {"softmax_scale": math.nan}), InvalidProblem, "finite"),
        (lambda q, c: (q, c, {"softmax_scale": "x"}), InvalidProblem, "number"),
        (lambda q, c: (q, c, {"backend": "cpu"}), Unsupported, "it reads no page table"),
        (lambda q, c: (q, c, {"policy": Three()}), PageTableError, "returned a int"),
        (lambda q, c: (q.requires_grad_(), c, {}), InvalidProblem, "gradients"),
        (lambda q, c: (q, c, {"policy": PageSelection(*torch.zeros(2, 1))}), PageTableError, "pages of the"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(change, error, words):
    cache = cache_of(LENGTHS, 2, 64, 64, torch.float16, "cpu")
    q, cache, options = change(queries(cache, 4, 1), cache)
    with pytest.raises(error, match=words):
        flashcore.paged_attention(q, cache, **options)


def test_a_problem_says_what_the_table_can_hold():
    cache = cache_of(LENGTHS, 2, 64, 64, torch.float16, "cpu")
    problem = paged_problem_of(queries(cache, 4, 3), cache)
    assert problem == Problem(
        batch=5, num_heads_q=4, num_heads_kv=2, seqlen_q=3, seqlen_k=18 * 64, head_dim=64, causal=True, page_size=64
    )


def test_chains_of_a_traced_decode_cover_every_unit_once():
    decode = backends.get("decode")
    for seqlen in (1, 64, 65, 333, 900, 1900, 8192):
        problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=1, seqlen_k=seqlen, head_dim=64)
        shape = type("Shape", (), {"tile_n": 128, "num_splits": 2})
        before = decode.chains(problem, shape)
        assert len(before) == -(-seqlen // 128)
        assert all(b == -1 or b == unit - 2 for unit, b in enumerate(before))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("name", "heads_q", "heads_kv", "tokens"),
    [("decode", 4, 1, 1), ("decode", 8, 8, 2), ("decode", 8, 2, 3), ("decode", 32, 2, 8), ("decode", 40, 1, 7),
     ("hopper-paged", 4, 2, 1), ("hopper-paged", 3, 3, 130), ("hopper-paged", 8, 2, 700),
     ("cublaslt-paged", 4, 2, 70)],
)  # fmt: skip
def test_paged_backends_against_float64(name, heads_q, heads_kv, tokens, page_size, head_dim):
    backend = backends.get(name)
    for number, causal in enumerate((True, False)):
        dtype = torch.bfloat16 if number else torch.float16
        cache = cache_of((*LENGTHS, page_size), heads_kv, head_dim, page_size, dtype, "cuda", drop=bool(number))
        q = queries(cache, heads_q, tokens, seed=number)
        problem = paged_problem_of(q, cache, causal)
        policies = (None, SinkWindow(1, 2)) if name == "decode" else (None,)
        for policy in policies:
            selection = policy and policy.select(q, cache)
            out, lse = backend.run_paged(q, cache, problem, selection)
            expected, expected_lse = paged_reference(q, cache, selection, causal=causal)
            # A few roundings of values of about 4, and of scores where the backend stores them in 16 bits.
            room = {torch.float16: 6e-3, torch.bfloat16: 4e-2}[dtype]
            assert float((out.double() - expected).abs().max()) < room
            empty = expected_lse.isinf()
            assert torch.equal(lse[empty], expected_lse[empty].float())
            lse_room = 3e-2 if backend.rounds_scores else 1e-3
            assert not empty.all() and float((lse - expected_lse)[~empty].abs().max()) < lse_room
            again = backend.run_paged(q, cache, problem, selection)
            assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.gpu
def test_a_captured_decode_replays_with_the_lengths_and_pages_of_the_day():
    cache = cache_of((100, 300, 900), 2, 128, 64, torch.float16, "cuda")
    q = queries(cache, 8, 1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        flashcore.paged_attention(q, cache, backend="decode")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flashcore.paged_attention(q, cache, backend="decode")
            again = flashcore.paged_attention(q, cache, backend="decode")
    for lengths in ((100, 300, 900), (7, 299, 650), (64, 1, 0)):
        cache.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        cache.page_table[1, :2] = cache.page_table[1, :2].flip(0)
        graph.replay()
        expected, _ = paged_reference(q, cache)
        assert float((out.double() - expected).abs().max()) < 4e-3 and torch.equal(out, again)


@pytest.mark.gpu
def test_more_heads_than_one_launch_lays_out():
    k, v = (torch.randn(900, 8, 40, 64, device="cuda").half() for _ in range(2))
    cache = paginate(k, v, 16)
    q = queries(cache, 8, 1)
    out = flashcore.paged_attention(q, cache, backend="decode")
    assert float((out.double() - paged_reference(q, cache)[0]).abs().max()) < 4e-3


def two_selections(device) -> list[PageSelection]:
    """Two of the same pages at the same addresses, with room for 4 pages a row and for 2."""
    room, counts = torch.full((1, 2, 4), -1, dtype=torch.int32, device=device), torch.full((1, 2), 2, device=device)
    counts, flat = counts.int(), room.view(-1)
    return [PageSelection(room, counts), PageSelection(flat[:4].view(1, 2, 2), counts)]


def test_launches_are_kept_apart_by_all_that_they_take_from_a_selection(monkeypatch):
    """The caching allocator hands out the same addresses again: an address alone says nothing of the shape."""
    from flashcore.backends import _paged

    keys = []
    monkeypatch.setattr(_paged, "current_stream", lambda device: 0)
    monkeypatch.setattr(_paged, "capture_id", lambda stream: 0)
    monkeypatch.setattr(_paged, "kept", lambda key, make, good: keys.append(key) or Nothing())
    cache = cache_of((500,), 2, 64, 64, torch.float16, "cpu")
    q = queries(cache, 4, 1)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    wide, narrow = two_selections("cpu")
    assert wide.pages.data_ptr() == narrow.pages.data_ptr()
    for selection in (None, wide, narrow, wide):
        backends.get("decode").attend(q, cache, paged_problem_of(q, cache), selection, out, lse)
    assert len(set(keys)) == 3 and keys[1] == keys[3]


class Nothing:
    def launch(self):
        pass


@pytest.mark.gpu
def test_a_selection_of_another_width_at_the_same_address_is_read_anew():
    cache = cache_of((500,), 2, 64, 64, torch.float16, "cuda")
    q = queries(cache, 4, 1)
    wide, narrow = two_selections("cuda")
    for selection in (wide, narrow):
        selection.pages.fill_(-1)
        selection.pages[0, 0, :2] = torch.tensor([0, 7])
        selection.pages[0, 1, :2] = torch.tensor([3, 7])
        out = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
        for _ in range(2):
            backends.get("decode").attend(q, cache, paged_problem_of(q, cache), selection, *out)
        expected, _ = paged_reference(q, cache, selection)
        assert (out[0].double() - expected).abs().max() < 2e-3
