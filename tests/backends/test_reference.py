"""Backend `reference`: float64 inside, rounded results, dense and over pages."""

from __future__ import annotations

import pytest
import torch
from support.paged_tables import cache_of, queries

from flashcore import backends
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PageSelection, gather
from flashcore.problem import Problem, square


def test_the_reference_rounds_its_results_and_not_its_trace():
    problem = square(1, 1, 20, 8)
    inputs = make_inputs(problem)
    backend = backends.get("reference")
    out, lse = backend.run(*inputs, problem)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    assert backend.trace(*inputs, problem).out.dtype == torch.float64


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_results_are_those_of_float64_rounded_once(dtype):
    problem = square(2, 2, 30, 16, dtype=dtype, causal=True)
    inputs = make_inputs(problem)
    out, lse = backends.get("reference").run(*inputs, problem)
    expected, expected_lse = reference.attention(*inputs, problem)
    assert torch.equal(out, expected.to(getattr(torch, dtype))) and torch.equal(lse, expected_lse.float())


@pytest.mark.parametrize("causal", [False, True])
def test_over_pages_it_is_what_it_is_over_the_keys_that_are_in_them(causal):
    """Three sequences of other lengths, in pages out of order: each is a dense problem of its own."""
    cache = cache_of((17, 64, 200), 2, 64, 64, torch.float16, "cpu")
    q = queries(cache, 4, 3)
    problem = paged_problem_of(q, cache, causal).with_(softmax_scale=0.3)
    out, lse = backends.get("reference").run_paged(q, cache, problem)
    for row, length in enumerate(cache.lengths.tolist()):
        k, v, _ = gather(cache, row)
        one = problem.with_(batch=1, seqlen_k=length)
        expected, expected_lse = reference.attention(q[row : row + 1], k[None], v[None], one)
        assert torch.equal(out[row : row + 1], expected.half())
        assert torch.equal(lse[row : row + 1], expected_lse.float())


def test_a_selection_leaves_out_the_keys_of_other_pages():
    cache = cache_of((200,), 2, 64, 64, torch.float16, "cpu")
    q = queries(cache, 4, 1)
    problem = paged_problem_of(q, cache)
    pages = torch.tensor([[[1, 3], [0, -1]]], dtype=torch.int32)
    selection = PageSelection(pages, torch.tensor([[2, 1]], dtype=torch.int32))
    out, lse = backends.get("reference").run_paged(q, cache, problem, selection)
    k, v, _ = gather(cache, 0)
    keys = (torch.cat([torch.arange(64, 128), torch.arange(192, 200)]), torch.arange(64))
    for head, kept in enumerate(keys):
        group = slice(2 * head, 2 * head + 2)
        part = Problem(batch=1, num_heads_q=2, num_heads_kv=1, seqlen_q=1, seqlen_k=len(kept), head_dim=64)
        expected, expected_lse = reference.attention(
            q[:, group], k[None, head : head + 1, kept], v[None, head : head + 1, kept], part
        )
        assert torch.equal(out[:, group], expected.half())
        torch.testing.assert_close(lse[:, group].double(), expected_lse, rtol=1e-6, atol=1e-6)
