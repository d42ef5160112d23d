"""What a selection loses, against arithmetic by hand; a saving that loses the needle shows."""

from __future__ import annotations

import pytest
import torch
from support.attention_patterns import PATTERN, pattern_cache, probabilities

from flashcore.paging import (
    ATTENTION_PATTERNS,
    AllPages,
    PagedKVCache,
    PageSelection,
    SinkWindow,
    TopK,
    make_attention,
    recalled,
    selection_accuracy,
)


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


def test_the_scale_and_the_mask_are_those_of_the_call():
    q, cache = pattern_cache("drifting")
    selection = SinkWindow(0, 8).select(q, cache)
    sharper, flat = (selection_accuracy(q, cache, selection, softmax_scale=s).mass_mean for s in (0.25, 0.0))
    assert flat == pytest.approx(8 / 64) and sharper > selection_accuracy(q, cache, selection).mass_mean > flat
    first = PageSelection.of_mask(torch.arange(64).expand(1, 2, 64) == 0)
    two = torch.cat([q, q], dim=2)  # of two queries at the end, the first does not see the last key
    masked, all_keys = (recalled(two, cache, first, causal=causal)[0] for causal in (True, False))
    assert (masked[:, :, 0] > all_keys[:, :, 0]).all() and torch.equal(masked[:, :, 1], all_keys[:, :, 1])
    last = PageSelection.of_mask(torch.arange(64).expand(1, 2, 64) == 63)
    masked, all_keys = (recalled(two, cache, last, causal=causal)[0] for causal in (True, False))
    assert torch.equal(all_keys[:, :, 0], all_keys[:, :, 1]) and (masked[:, :, 0] != masked[:, :, 1]).all()


def test_the_share_of_pages_counts_pages_that_are_there():
    q, cache = pattern_cache("diffuse")
    cache.drop(cache.sequences[0], range(32))
    half = PageSelection.of_mask((torch.arange(64) % 2 == 0).expand(1, 2, 64))  # 16 of them were dropped
    assert selection_accuracy(q, cache, half).pages_share == pytest.approx(16 / 32)
