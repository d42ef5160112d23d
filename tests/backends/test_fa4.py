"""Backend `fa4`: called as FlashAttention-4 wants it, with a stand-in for it, and what is said without it."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from flashcore import backends
from flashcore.backends import fa4
from flashcore.errors import Unsupported
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.ops import problem_of
from flashcore.problem import Problem, square

UNEQUAL = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=20, seqlen_k=50, head_dim=24, causal=True)


def compute(q, k, v, softmax_scale, causal):
    """What it computes: [B, S, H, D] in and out, `lse` as [B, H, S]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = backends.get("cpu").run(q, k, v, problem_of(q, k, v, causal, softmax_scale))
    return out.transpose(1, 2), lse


def asked(q, k, v, qv=None, softmax_scale=None, causal=False, num_splits=1, return_lse=False):
    out, lse = compute(q, k, v, softmax_scale, causal)
    return out, lse if return_lse else None


def unasked(q, k, v, softmax_scale=None, causal=False):
    return compute(q, k, v, softmax_scale, causal)


def install(monkeypatch, function):
    module = types.SimpleNamespace(flash_attn_func=function, __spec__=None)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, module)
    fa4._interface.cache_clear()


@pytest.fixture(autouse=True)
def _forget():
    yield
    fa4._interface.cache_clear()


@pytest.mark.parametrize("function", [asked, unasked])
def test_it_is_asked_for_lse_where_it_has_to_be(monkeypatch, function):
    install(monkeypatch, function)
    inputs = make_inputs(UNEQUAL)
    out, lse = backends.get("fa4").run(*inputs, UNEQUAL)
    expected, expected_lse = backends.get("cpu").run(*inputs, UNEQUAL)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_see_no_key_are_0_whatever_it_left_there(monkeypatch, causal):
    problem = UNEQUAL.with_(seqlen_q=30, seqlen_k=20, causal=causal)

    def leaves_nonsense(q, k, v, softmax_scale=None, causal=False):
        return torch.full_like(q, math.nan), torch.full((2, 4, 30), math.inf)

    install(monkeypatch, leaves_nonsense)
    out, lse = backends.get("fa4").run(*make_inputs(problem), problem)
    empty = 10 if causal else 0
    assert not out[:, :, :empty].any() and bool((lse[:, :, :empty] == -math.inf).all())
    assert out[:, :, empty:].isnan().all() and bool((lse[:, :, empty:] == math.inf).all()), "the others are its own"


def test_out_alone_is_no_lse(monkeypatch):
    install(monkeypatch, lambda q, k, v, softmax_scale=None, causal=False: q)
    problem = UNEQUAL.with_(seqlen_q=50)
    q, k, v = make_inputs(problem)
    out, lse = backends.get("fa4").run(q, k, v, problem)
    assert torch.equal(out, q) and lse is None


def test_what_is_missing_is_named_with_what_mends_it(monkeypatch):
    backend, there = backends.get("fa4"), {}
    monkeypatch.setattr(fa4, "installed", lambda names: next((n for n in names if n in there), None))
    monkeypatch.setattr(fa4, "version_of", lambda names: "4.0.0b36" if "flash-attn-4" in names else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    state = backend.availability()
    assert (state.ok, state.fix) == (False, "pip install 'flashcore[peers]'") and "flash_attn.cute" in state.reason
    assert backend.software() is None
    there["flash_attn.cute"] = True
    state = backend.availability()
    assert (state.ok, state.fix) == (False, "pip install nvidia-cutlass-dsl") and "cutlass" in state.reason
    there["cutlass"] = True
    install(monkeypatch, asked)
    assert backend.availability().ok and backend.software() == "flash-attn-4 4.0.0b36"


def test_what_it_does_not_take():
    backend = backends.get("fa4")
    for head_dim, takes in ((8, True), (64, True), (256, True), (20, False), (264, False)):
        reason = backend.why_not(square(1, 1, 8, head_dim))
        assert reason is None if takes else reason.startswith("FlashAttention-4 takes a head_dim")
    assert backend.why_not(square(1, 1, 8, 64, dtype="float32")).startswith("dtype float32")
    assert backend.why_not(UNEQUAL) is None, "its causal mask is bottom right, so lengths may differ"


@pytest.mark.parametrize(
    "options, window",
    [({"causal": True, "window_left": 7}, (7, 0)), ({"causal": False, "window_left": 7}, (7, None)),
     ({"causal": False, "window_right": 3}, (None, 3)),
     ({"causal": False, "window_left": 0, "window_right": 2}, (0, 2))],
)  # fmt: skip
def test_it_is_told_of_a_window_and_only_of_one(monkeypatch, options, window):
    told = []

    def function(q, k, v, softmax_scale=None, causal=False, window_size=(None, None)):
        told.append((causal, window_size))
        return torch.full_like(q, math.nan), torch.full((2, 4, 30), math.inf)

    install(monkeypatch, function)
    problem = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=30, seqlen_k=20, head_dim=24, **options)
    assert backends.get("fa4").why_not(problem) is None
    out, lse = backends.get("fa4").run(*make_inputs(problem), problem)
    assert told == [(problem.causal, window)]
    right = problem.window[1]
    empty = 10 - right if right >= 0 else 0
    assert not out[:, :, :empty].any() and bool((lse[:, :, :empty] == -math.inf).all())
    assert out[:, :, empty:].isnan().all()
    backends.get("fa4").run(*make_inputs(UNEQUAL), UNEQUAL)
    assert told[1:] == [(True, (None, None))], "its own default"
    assert "lengths of padded" in backends.get("fa4").why_not(UNEQUAL.with_(lengths="left"))


def test_a_softcap_and_a_sink_are_said_in_its_words_and_a_row_without_a_key_has_its_sink(monkeypatch):
    told = []

    def function(q, k, v, softmax_scale=None, causal=False, learnable_sink=None, softcap=0.0):
        told.append((learnable_sink, softcap))
        return torch.full_like(q, math.nan), torch.full((2, 4, 30), math.inf)

    install(monkeypatch, function)
    problem = UNEQUAL.with_(seqlen_q=30, seqlen_k=20, softcap=20.0, sink=True)
    masks = make_masks(problem)
    backend = backends.get("fa4")
    assert backend.why_not(problem) is None
    out, lse = backend.run(*make_inputs(problem), problem, masks=masks)
    ((sink, softcap),) = told
    assert softcap == 20.0 and sink.dtype == torch.bfloat16 and torch.equal(sink.float(), masks.sink)
    assert not out[:, :, :10].any() and torch.equal(lse[:, :, :10], masks.sink[:, None].expand(2, 4, 10))


@pytest.mark.parametrize("newer", [True, False])
def test_a_ragged_batch_goes_to_the_function_that_takes_one_with_the_words_it_knows(monkeypatch, newer):
    problem = UNEQUAL.with_(batch=3, lengths="ragged", window_left=7)
    masks = make_masks(problem, lengths="uniform")
    q, k, v = make_inputs(problem, masks=masks, spare=0)
    told = {}

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False,
                               window_size=(None, None), **more):  # fmt: skip
        told.update(more, window_size=window_size)
        found = backends.get("cpu").run(*(t.transpose(0, 1)[None] for t in (q, k, v)), problem, masks=masks)
        assert cu_seqlens_q is masks.cu_seqlens_q and cu_seqlens_k is masks.cu_seqlens_k
        return found[0][0].transpose(0, 1), found[1][0]

    def newer_form(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                   softmax_scale=None, causal=False, window_size=(None, None), return_lse=False):  # fmt: skip
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size,
                                      longest=(max_seqlen_q, max_seqlen_k), return_lse=return_lse)  # fmt: skip

    def older_form(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False,
                   window_size=(None, None)):  # fmt: skip
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size)

    install(monkeypatch, lambda q, k, v: pytest.fail("it is for dense batches"))
    module = sys.modules["flash_attn.cute"]
    monkeypatch.setattr(module, "flash_attn_varlen_func", newer_form if newer else older_form, raising=False)
    fa4._ragged.cache_clear()
    out, lse = backends.get("fa4").run(q, k, v, problem, masks=masks)
    assert told == {"window_size": (7, 0), **({"longest": (20, 50), "return_lse": True} if newer else {})}
    assert torch.equal(out, backends.get("cpu").run(q, k, v, problem, masks=masks)[0]) and lse is None
    monkeypatch.delattr(module, "flash_attn_varlen_func")
    fa4._ragged.cache_clear()
    with pytest.raises(Unsupported, match="no function for ragged batches"):
        backends.get("fa4").run(q, k, v, problem, masks=masks)
