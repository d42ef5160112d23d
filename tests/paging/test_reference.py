"""Paged attention in float64 equals dense attention over the same keys; patterns and metrics are what they say."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.errors import InvalidProblem, PageTableError, UnknownName
from flashcore.numerics import reference
from flashcore.paging import (
    ATTENTION_PATTERNS,
    AllPages,
    PagedKVCache,
    PageSelection,
    SinkWindow,
    TopK,
    make_attention,
    paged_reference,
    recalled,
    selection_accuracy,
)
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


# --- patterns and metrics ------------------------------------------------------------------------------------------

PATTERN = Problem(batch=1, num_heads_q=8, num_heads_kv=2, seqlen_q=1, seqlen_k=2048, head_dim=64, causal=True)


def pattern_cache(pattern, problem=PATTERN, **options):
    q, k, v = make_attention(problem, pattern, **options)
    cache = PagedKVCache(num_pages=problem.seqlen_k // 32, batch=1, num_heads_kv=2, head_dim=64, page_size=32,
                         dtype=k.dtype, device="cpu")  # fmt: skip
    cache.add()
    cache.append(k, v)
    return q, cache


def probabilities(pattern, problem=PATTERN):
    q, k, _ = make_attention(problem, pattern)
    group = problem.num_heads_q // problem.num_heads_kv
    return ((q.double() @ k.double().repeat_interleave(group, dim=1).mT) * problem.scale).softmax(-1)[:, :, 0]


@pytest.mark.parametrize("scale", [None, 0.5, -0.2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_patterns_are_what_they_say(scale, dtype):
    problem = PATTERN.with_(softmax_scale=scale, dtype=dtype)
    needle = probabilities("needle", problem)
    assert (needle.amax(-1) > 0.8).all() and needle[..., 256:1024].sum(-1).min() > 0.8
    peaked = probabilities("peaked", problem).sort(descending=True).values
    assert (peaked[..., :16].sum(-1) > 0.8).all() and (peaked[..., 0] < 0.2).all()
    diffuse = probabilities("diffuse", problem)
    assert (diffuse.amax(-1) < 0.05).all()
    by_tenths = probabilities("drifting", problem)[..., -2000:].unflatten(-1, (10, 200)).sum(-1).mean(dim=(0, 1))
    assert (by_tenths.diff() > 0).all() and by_tenths[-3:].sum() > 0.8


def test_a_seed_gives_the_same_numbers_and_another_gives_others():
    first, again, other = (make_attention(PATTERN, "peaked", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert [t.shape for t in first] == [(1, 8, 1, 64), (1, 2, 2048, 64), (1, 2, 2048, 64)]


def test_wrong_patterns():
    with pytest.raises(
        UnknownName, match="no attention pattern 'flat'; choose one of: peaked, diffuse, drifting, needle"
    ):
        make_attention(PATTERN, "flat")
    with pytest.raises(InvalidProblem, match="channels is 65"):
        make_attention(PATTERN, "needle", channels=65)
    with pytest.raises(InvalidProblem, match="softmax_scale is 0"):
        make_attention(PATTERN.with_(softmax_scale=0.0), "needle")


@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_selecting_everything_loses_nothing(pattern):
    q, cache = pattern_cache(pattern)
    found = selection_accuracy(q, cache, AllPages().select(q, cache))
    assert found.mass_least == pytest.approx(1.0) and found.error_largest < 1e-12 and found.pages_share == 1.0


def test_the_metrics_by_hand():
    q, cache = pattern_cache("drifting")
    selection = SinkWindow(0, 8).select(q, cache)
    mass, error = recalled(q, cache, selection)
    probs = probabilities("drifting")
    torch.testing.assert_close(mass[..., 0], probs[..., -256:].sum(-1))
    values = cache.v_pool[: 2048 // 32].double().transpose(0, 1).flatten(1, 2)
    dense = torch.einsum("hgk,hkd->hgd", probs.view(2, 4, -1), values)
    part = torch.einsum("hgk,hkd->hgd", probs.view(2, 4, -1)[..., -256:], values[:, -256:])
    part /= probs.view(2, 4, -1)[..., -256:].sum(-1, keepdim=True)
    torch.testing.assert_close(error.flatten(), ((part - dense).norm(dim=-1) / dense.norm(dim=-1)).flatten())
    assert selection_accuracy(q, cache, selection).pages_share == pytest.approx(8 / 64)


def test_queries_that_see_no_key_are_left_out():
    problem = PATTERN.with_(seqlen_q=4, seqlen_k=2)
    q, k, v = make_attention(problem, "diffuse")
    cache = PagedKVCache(num_pages=1, batch=1, num_heads_kv=2, head_dim=64, page_size=32, device="cpu")
    cache.add()
    cache.append(k, v)
    mass, error = recalled(q, cache, AllPages().select(q, cache))
    assert mass[..., :2].isnan().all() and error[..., :2].isnan().all() and mass[..., 2:].eq(1).all()
    assert selection_accuracy(q, cache, AllPages().select(q, cache)).mass_mean == 1.0


def test_a_saving_that_loses_the_needle_shows():
    """At 30 % of the pages, a window keeps what drifts and loses the needle; bounds find it unless it is spread."""
    q, cache = pattern_cache("needle")
    window, top = SinkWindow(1, 18), TopK(share=0.3)
    lost = selection_accuracy(q, cache, window.select(q, cache))
    found = selection_accuracy(q, cache, top.select(q, cache))
    assert lost.mass_mean < 0.1 and lost.error_mean > 0.5
    assert found.mass_least > 0.85 and found.error_largest < 0.15
    q, cache = pattern_cache("drifting")
    assert selection_accuracy(q, cache, window.select(q, cache)).mass_mean > 0.85
    thin = [pattern_cache("needle", channels=64, seed=seed) for seed in range(4)]
    assert min(selection_accuracy(q, cache, top.select(q, cache)).mass_least for q, cache in thin) < 0.5
