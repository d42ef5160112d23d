"""FlashInfer over pages: what it is planned with, against float64, with a stand-in that reads those words."""

from __future__ import annotations

import pytest
import torch
from support import stand_in_flashinfer

from flashcore.errors import BackendUnavailable, Unsupported
from flashcore.paging import paged_reference
from flashcore.surveys.paging import peers
from flashcore.surveys.paging.caches import mixed_cache
from flashcore.surveys.paging.plan import decode_problem
from flashcore.surveys.paging.serving_facts import CASCADE, CUDA, SEVERAL, TENSOR

LENGTHS = (70, 33, 64)
PROBLEM = decode_problem(3, 4, 2, max(LENGTHS), 64).with_(page_size=16)


def cache_of(prefix=0, seed=0):
    return mixed_cache(LENGTHS, 2, 64, page_size=16, dtype=torch.float16, device="cpu", prefix=prefix, seed=seed)


def queries(tokens=1):
    return torch.randn(3, 4, tokens, 64, generator=torch.Generator().manual_seed(tokens)).half()


@pytest.mark.parametrize(("variant", "tokens", "prefix"), [(TENSOR, 1, 0), (CUDA, 1, 0), (SEVERAL, 3, 0),
                                                           (CASCADE, 1, 32)])  # fmt: skip
def test_what_it_is_planned_with_is_the_same_attention(monkeypatch, variant, tokens, prefix):
    stand_in_flashinfer.install(monkeypatch)
    caches, q = [cache_of(prefix, seed) for seed in (0, 1)], queries(tokens)
    problem = PROBLEM.with_(seqlen_q=tokens, causal=tokens > 1)
    call = peers.planned(variant, [q, q], caches, problem, prefix=prefix)
    for i, cache in enumerate(caches):
        out, lse = call(i)
        exact, _ = paged_reference(q, cache, None, causal=problem.causal)
        torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
        assert lse is None


@pytest.mark.slow
def test_only_the_variant_that_is_named_asks_for_tensor_cores(monkeypatch):
    stand_in_flashinfer.install(monkeypatch)
    made = []
    real = stand_in_flashinfer.BatchDecodeWithPagedKVCacheWrapper.__init__
    monkeypatch.setattr(stand_in_flashinfer.BatchDecodeWithPagedKVCacheWrapper, "__init__",
                        lambda self, *a, **k: made.append(k["use_tensor_cores"]) or real(self, *a, **k))  # fmt: skip
    for variant in (TENSOR, CUDA):
        peers.planned(variant, [queries()], [cache_of()], PROBLEM)
    assert made == [True, False]


def test_a_table_in_its_words():
    cache = cache_of()
    begin, pages, last = peers.pages_of(cache)
    assert begin.tolist() == [0, 5, 8, 12] and last.tolist() == [6, 1, 16]
    assert pages.tolist() == [p for row, n in zip(cache.page_table.tolist(), (5, 3, 4), strict=True) for p in row[:n]]
    begin, pages, last = peers.pages_of(cache, first=2)
    assert begin.tolist() == [0, 3, 4, 6] and last.tolist() == [6, 1, 16] and len(pages) == 6


def test_without_it_that_is_said_and_so_is_a_head_dim_that_it_lacks(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="FlashInfer"):
            peers.planned(TENSOR, [queries()], [cache_of()], PROBLEM)
    stand_in_flashinfer.install(monkeypatch)
    with pytest.raises(Unsupported, match="head_dim 96"):
        peers.planned(TENSOR, [queries()], [cache_of()], PROBLEM.with_(head_dim=96))
