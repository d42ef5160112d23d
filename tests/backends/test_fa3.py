"""Backend `fa3`: both forms of FlashAttention-3's interface, and what is said without it."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from flashcore import backends
from flashcore.numerics.inputs import make_inputs
from flashcore.ops import problem_of
from flashcore.problem import Problem

UNEQUAL = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=50, head_dim=24, causal=True)


def test_fa3_without_its_module_says_so():
    backend = backends.get("fa3")
    try:
        import flash_attn_interface  # noqa: F401
    except ImportError:
        assert not backend.availability().ok and "flash_attn_interface" in backend.availability().reason


@pytest.mark.parametrize("newer", [True, False])
def test_fa3_calls_both_forms_of_its_interface(monkeypatch, newer):
    """A stand-in for FlashAttention-3 that takes [B, S, H, D], as it does, and returns `lse` as each release does."""
    from flashcore.backends import fa3

    def compute(q, k, v, softmax_scale, causal):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        problem = problem_of(q, k, v, causal, softmax_scale)
        out, lse = backends.get("cpu").run(q, k, v, problem)
        return out.transpose(1, 2), lse

    def newer_form(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        out, lse = compute(q, k, v, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    def older_form(q, k, v, softmax_scale=None, causal=False):
        return compute(q, k, v, softmax_scale, causal)

    module = types.SimpleNamespace(flash_attn_func=newer_form if newer else older_form)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    fa3._interface.cache_clear()
    problem = UNEQUAL.with_(seqlen_q=20)
    inputs = make_inputs(problem)
    out, lse = backends.get("fa3").run(*inputs, problem)
    fa3._interface.cache_clear()
    expected, expected_lse = backends.get("cpu").run(*inputs, problem)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
