"""What a cache in pages is made for, and what it is refused for; `test_paged_cache` generates over it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from flashcore.errors import InvalidProblem, ToolMissing, Unsupported
from flashcore.integrations.caching import paged_cache


def model_of(dtype=torch.bfloat16, **config):
    """As much of a model of transformers as the cache asks for."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "num_key_value_heads": 2, **config}
    known = SimpleNamespace(**sizes)
    known.get_text_config = lambda decoder: known
    return SimpleNamespace(config=known, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "options, told",
    [({"batch": 0}, "batch is 0"), ({"max_length": 0}, "max_length is 0"), ({"page_size": 48}, "page_size is 48"),
     ({"page_size": 0}, "page_size is 0"), ({"max_length": 1.5}, "max_length")],
)  # fmt: skip
def test_sizes_that_no_cache_has(options, told):
    pytest.importorskip("transformers", reason="transformers is not installed (the extra 'transformers')")
    with pytest.raises(InvalidProblem, match=told):
        paged_cache(model_of(), **{"batch": 2, "max_length": 64, "page_size": 16, **options})


def test_sizes_come_from_the_model():
    pytest.importorskip("transformers", reason="transformers is not installed (the extra 'transformers')")
    cache = paged_cache(model_of(), batch=2, max_length=33, page_size=16)
    assert [tuple(layer.k_pool.shape) for layer in cache.books.layers] == [(6, 2, 16, 16)] * 3
    assert cache.get_max_length() == 48 and len(cache.books.sequences) == 2
    wide = paged_cache(model_of(head_dim=32, num_key_value_heads=None), batch=1, max_length=16, page_size=16)
    assert wide.books.layers[0].k_pool.shape == (1, 4, 16, 32)


def test_models_that_it_cannot_hold():
    pytest.importorskip("transformers", reason="transformers is not installed (the extra 'transformers')")
    with pytest.raises(InvalidProblem, match="^model is 'llama'; pass a decoder of transformers"):
        paged_cache("llama", batch=1, max_length=16)
    with pytest.raises(InvalidProblem, match="dtype is torch.float32; a cache holds"):
        paged_cache(model_of(torch.float32), batch=1, max_length=16)
    for odd, told in (
        ({"layer_types": ["linear_attention", "full_attention"]}, "this model has linear_attention; use transformers'"),
        ({"num_kv_shared_layers": 1}, "this model has layers that share keys and values"),
    ):
        with pytest.raises(Unsupported, match=told):
            paged_cache(model_of(**odd), batch=1, max_length=16)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashcore.integrations._paged_cache", None)
    with pytest.raises(ToolMissing, match="pip install 'flashcore\\[transformers\\]'"):
        paged_cache(model_of(), batch=1, max_length=16)
