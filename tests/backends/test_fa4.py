"""Backend `fa4`: called as FlashAttention-4 wants it, with a stand-in for it, and what is said without it."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from flashcore import backends
from flashcore.backends import fa4
from flashcore.numerics.inputs import make_inputs
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
    assert "softcap" in backends.get("fa4").why_not(UNEQUAL.with_(softcap=30.0))
