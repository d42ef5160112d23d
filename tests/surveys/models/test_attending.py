"""Ways of attention: each against attention in float64, over a prompt and over a cache; and what each refuses."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import MIXED, PLAIN, made

from flashcore import ops
from flashcore.backends.others import masked
from flashcore.errors import Unsupported
from flashcore.surveys.models import attending
from flashcore.surveys.models.attending import EXACT, LEFT_OUT, OURS, Attention, Keeping
from flashcore.surveys.models.caches import Dense, Pages

WAYS = (OURS, "sdpa", EXACT)


def truth(q, k, v, window: int | None, sink) -> torch.Tensor:
    """Causal attention of the last queries, in float64, element by element of its definition."""
    group, rows, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    behind = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)
    seen = (behind >= 0) & (behind < (window or keys + 1))
    scores = (q.double() @ k.mT / math.sqrt(q.shape[3])).masked_fill(~seen, -math.inf)
    weights = scores.exp()
    extra = 0.0 if sink is None else sink.double().exp()[:, None, None]
    return weights @ v / (weights.sum(-1, keepdim=True) + extra)


@pytest.fixture
def qkv():
    return (torch.randn(2, heads, 13, 16).bfloat16() for heads in (4, 2, 2))


@pytest.mark.parametrize("way", WAYS)
def test_over_a_prompt(shape, way, qkv):
    q, k, v = qkv
    sinks = made(shape).sinks
    attention = Attention(way, shape, sinks)
    for layer in range(2):
        with attention.around():
            out = attention(layer, q, k, v)
        window = shape.window if shape.windowed(layer) else None
        expected = truth(q, k, v, window, None if sinks is None else sinks[layer])
        torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("way", WAYS)
def test_over_a_cache(shape, way, qkv):
    """A prompt of 12 and one token: what the last row of 13 says."""
    q, k, v = qkv
    sinks = made(shape).sinks
    kind = {"dtype": torch.bfloat16, "device": "cpu"}
    keeping = Keeping(Dense(shape, 2, 16, **kind), Pages(shape, 2, 16, page_size=16, **kind))
    attention = Attention(way, shape, sinks, keeping)
    assert (attention.pages is not None) == (way == OURS)
    for start, stop in ((0, 12), (12, 13)):
        keeping.pages.cache.reserve(stop - start)
        attention.position = start
        attention.begin()
        for layer in range(2):
            with attention.around():
                out = attention(layer, *(t[:, :, start:stop] for t in (q, k, v)))
            window = shape.window if shape.windowed(layer) else None
            sink = None if sinks is None else sinks[layer]
            expected = truth(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], window, sink)
            torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
        keeping.pages.cache.advance(stop - start)
    if way == OURS:
        keeping.pages.cache.check()


def test_pages_are_read_with_the_sink_in_the_same_call(qkv, monkeypatch):
    calls, kind = [], {"dtype": torch.bfloat16, "device": "cpu"}
    attend = attending.paged_attention
    monkeypatch.setattr(
        attending, "paged_attention", lambda *given, **options: calls.append(options) or attend(*given, **options)
    )
    sinks, [layer] = made(MIXED).sinks, [layer for layer in range(2) if not MIXED.windowed(layer)]
    keeping = Keeping(Dense(MIXED, 2, 16, **kind), Pages(MIXED, 2, 16, page_size=16, **kind))
    keeping.pages.cache.reserve(1)
    attention = Attention(OURS, MIXED, sinks, keeping)
    attention.begin()
    attention(layer, *(t[:, :, :1] for t in qkv))
    [options] = calls
    assert torch.equal(options["sink"], sinks[layer]) and not options.get("return_lse")


def test_a_step_taken_again_reads_and_writes_the_same_places(qkv):
    q, k, v = (t[:, :, :1] for t in qkv)
    kind = {"dtype": torch.bfloat16, "device": "cpu"}
    keeping = Keeping(Dense(PLAIN, 2, 16, **kind), Pages(PLAIN, 2, 16, page_size=16, **kind))
    keeping.dense.fill(9, 0)
    keeping.pages.fill(keeping.dense, 9)
    keeping.pages.cache.reserve(1)
    for way in (OURS, "sdpa"):
        attention = Attention(way, PLAIN, None, keeping)
        attention.position = 9
        found = []
        for _ in range(3):
            attention.begin()
            found.append(attention(0, q, k, v))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert keeping.pages.cache.lengths.tolist() == [[10, 10], [9, 9]], "the second layer was not called"


def test_left_out_is_nothing(qkv):
    q, k, v = qkv
    assert Attention(LEFT_OUT, MIXED, None)(0, q, k, v) is q


def test_a_way_is_held_to_its_kernel():
    with Attention(EXACT, PLAIN, None).around():
        assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
    with Attention("sdpa-cudnn", PLAIN, None).around():
        assert torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()
    with Attention("sdpa", PLAIN, None).around():
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_peers_are_asked_for_by_our_registry(qkv, monkeypatch):
    q, k, v = qkv
    asked = []
    attend = ops.attention

    def recorded(*given, backend="auto", **options):
        asked.append(backend)
        return attend(*given, backend="cpu", **options)

    monkeypatch.setattr(ops, "attention", recorded)
    attention = Attention("fa3", PLAIN, None)
    torch.testing.assert_close(attention(0, q, k, v).double(), truth(q, k, v, None, None), rtol=0.02, atol=0.02)
    assert asked == ["fa3"]


def test_what_a_way_does_not_take_is_said(qkv):
    q, k, v = qkv
    sinks = made(MIXED).sinks
    with pytest.raises(Unsupported, match="torch gives cuDNN no window and no sink"):
        Attention("sdpa-cudnn", MIXED, sinks)(0, q, k, v)


def test_a_sink_after_the_fact_is_a_sink_before_it(qkv):
    q, k, v = (t.double() for t in qkv)
    sink = torch.randn(4)
    out, lse = masked.attention(q, k, v, masked.Masking(True))
    both, _ = masked.attention(q, k, v, masked.Masking(True, sink=sink))
    torch.testing.assert_close(attending.with_sink(out, lse, sink), both, rtol=1e-6, atol=1e-6)
    assert attending.with_sink(out, lse, None) is out
