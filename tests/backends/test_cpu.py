"""Backend `cpu`: its page loop against the reference, and its trace against what it computed."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.reference import STAGES
from flashcore.problem import Problem

UNEQUAL = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=50, head_dim=24, causal=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [1, 7, 64, 4096])
def test_the_cpu_page_loop_agrees_with_the_reference(dtype, page_size):
    problem = UNEQUAL.with_(dtype=dtype, page_size=page_size)
    inputs = make_inputs(problem, layout="bshd")
    out, lse = backends.get("cpu").run(*inputs, problem)
    expected, expected_lse = reference.attention(*inputs, problem)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[dtype]
    assert out.dtype == getattr(torch, dtype) and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_the_cpu_trace_is_what_it_computed():
    problem = UNEQUAL.with_(page_size=16)
    inputs = make_inputs(problem)
    backend = backends.get("cpu")
    trace, (out, lse) = backend.trace(*inputs, problem), backend.run(*inputs, problem)
    assert torch.equal(trace.out, out) and torch.equal(trace.lse, lse)
    expected = reference.trace(*inputs, problem)
    for stage in STAGES:
        assert getattr(trace, stage).shape == getattr(expected, stage).shape
        torch.testing.assert_close(getattr(trace, stage).double(), getattr(expected, stage), rtol=2e-3, atol=2e-3)
