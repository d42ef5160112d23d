"""Backends over pages: what they refuse, what their kernels are told, and which launches are kept."""

from __future__ import annotations

import pytest
import torch
from support.paged_tables import LENGTHS, cache_of, queries, two_selections

from flashcore import backends
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PagedKV, SinkWindow, paged_reference


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
@pytest.mark.parametrize("name", ["decode", "hopper-paged", "cublaslt-paged"])
@pytest.mark.parametrize("by_tokens", ["k", "v"])
def test_pools_of_k_and_v_that_lie_in_different_orders(by_tokens, name):
    cache = cache_of(LENGTHS, 2, 64, 32, torch.float16, "cuda")
    pools = {"k": cache.k_pool, "v": cache.v_pool}
    pools[by_tokens] = pools[by_tokens].transpose(1, 2).contiguous().transpose(1, 2)
    apart = PagedKV.from_tables(*pools.values(), cache.page_table, cache.lengths)
    q = queries(cache, 4, 3)
    out, _ = backends.get(name).run_paged(q, apart, paged_problem_of(q, apart, True))
    expected, _ = paged_reference(q, cache, causal=True)
    assert float((out.double() - expected).abs().max()) < 6e-3


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
