"""Paged attention in float64 equals dense attention over the same keys."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.numerics import reference
from flashcore.paging import AllPages, PagedKVCache, PageSelection, SinkWindow, paged_reference
from flashcore.problem import Problem

HEADS, DIM, SIZE = 2, 16, 16
LENGTHS = [70, 16, 1, 33]


def filled(lengths=LENGTHS, dtype=torch.float16):
    """A cache whose pages lie in no order, and each sequence's dense k and v ``[1, HEADS, length, DIM]``."""
    cache = PagedKVCache(num_pages=40, batch=len(lengths), max_pages=8, num_heads_kv=HEADS, head_dim=DIM,
                         page_size=SIZE, dtype=dtype, device="cpu")  # fmt: skip
    dense = [torch.randn(2, 1, HEADS, length, DIM).to(dtype) for length in lengths]
    handles = [cache.add() for _ in lengths]
    for start in range(0, max(lengths), 10):  # in turns, so that the sequences' pages alternate in the pool
        for handle, kv in zip(handles, dense, strict=True):
            if start < kv.shape[3]:
                cache.append(kv[0, :, :, start : start + 10], kv[1, :, :, start : start + 10], [handle])
    return cache, dense


def problem_for(length: int, heads_q: int, tokens: int, causal: bool, scale=None) -> Problem:
    return Problem(batch=1, num_heads_q=heads_q, num_heads_kv=HEADS, seqlen_q=tokens, seqlen_k=length, head_dim=DIM,
                   causal=causal, softmax_scale=scale)  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize(("heads_q", "scale", "dtype"), [(2, None, torch.float16), (8, 0.4, torch.bfloat16)])
def test_equals_dense_attention(causal, tokens, heads_q, scale, dtype):
    cache, dense = filled(dtype=dtype)
    q = torch.randn(len(LENGTHS), heads_q, tokens, DIM).to(dtype)
    results = [paged_reference(q, cache, selection, causal=causal, softmax_scale=scale)
               for selection in (None, AllPages().select(q, cache))]  # fmt: skip
    for row, length in enumerate(LENGTHS):
        out, lse = reference.attention(q[row : row + 1], dense[row][0], dense[row][1],
                                       problem_for(length, heads_q, tokens, causal, scale))  # fmt: skip
        for got_out, got_lse in results:
            torch.testing.assert_close(got_out[row], out[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got_lse[row], lse[0], rtol=1e-12, atol=1e-12)


def test_a_selection_equals_attention_over_its_keys():
    cache, dense = filled()
    q = torch.randn(4, 4, 1, DIM).half()
    pages = torch.tensor([[1, 4], [0, 3]], dtype=torch.int32)  # of head 0 and head 1 of the sequence of 70 tokens
    selection = PageSelection(torch.zeros(4, 2, 2, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32))
    selection.pages[0], selection.counts[0] = pages, 2
    out, lse = paged_reference(q, cache, selection)
    for head, columns in enumerate(([*range(16, 32), *range(64, 70)], [*range(16), *range(48, 64)])):
        k, v = (dense[0][i, 0, head, columns].double() for i in range(2))
        scores = q[0, 2 * head : 2 * head + 2, 0].double() @ k.T / 4
        torch.testing.assert_close(lse[0, 2 * head : 2 * head + 2, 0], scores.logsumexp(-1))
        torch.testing.assert_close(out[0, 2 * head : 2 * head + 2, 0], scores.softmax(-1) @ v)
    assert (out[1:] == 0).all() and (lse[1:] == -math.inf).all()  # nothing selected


def test_dropped_pages_are_passed_over_and_free_rows_are_empty():
    cache, dense = filled()
    cache.drop(cache.sequences[0], [0, 2])
    cache.free(cache.sequences[1])
    cache.v_pool[cache.stats().pages_total - 1] = torch.nan  # a page in nobody's hands
    q = torch.randn(4, 2, 1, DIM).half()
    out, lse = paged_reference(q, cache)
    columns = [*range(16, 32), *range(48, 70)]
    k, v = (dense[0][i, 0][:, columns].double() for i in range(2))
    scores = (q[0].double() @ k.mT) / 4
    torch.testing.assert_close(out[0], scores.softmax(-1) @ v)
    torch.testing.assert_close(lse[0], scores.logsumexp(-1))
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and not out.isnan().any()


def test_values_that_no_query_sees_do_not_matter():
    cache, _ = filled()
    q = torch.randn(4, 2, 1, DIM).half()
    selection = SinkWindow(0, 1).select(q, cache)
    before = paged_reference(q, cache, selection)
    cache.v_pool[cache.pages(cache.sequences[0])[1]] = torch.inf
    cache.k_pool[cache.pages(cache.sequences[0])[1]] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(before, paged_reference(q, cache, selection), strict=True))


def test_wrong_arguments():
    cache, _ = filled()
    with pytest.raises(InvalidProblem, match="q has batch 3"):
        paged_reference(torch.zeros(3, 2, 1, DIM).half(), cache)
    selection = AllPages().select(torch.zeros(4, 2, 1, DIM).half(), cache)
    selection.pages[3, 0, 0] = 7
    with pytest.raises(PageTableError, match="a page that the sequence does not have"):
        paged_reference(torch.zeros(4, 2, 1, DIM).half(), cache, selection)
