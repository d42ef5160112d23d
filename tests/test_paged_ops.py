"""Attention over pages as a user calls it, on every backend that reads a page table."""

from __future__ import annotations

import math

import pytest
import torch
from support.paged_tables import LENGTHS, cache_of, queries

import flashcore
from flashcore.errors import InvalidProblem, PageTableError, Unsupported
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PagedKVCache, PageSelection, SinkWindow, TopK, paged_reference
from flashcore.problem import Problem


class Three:
    """A policy that returns no selection."""

    def select(self, q, cache):
        return 3


def test_pages_selected_by_a_policy_on_the_cpu():
    cache = PagedKVCache(num_pages=12, batch=2, num_heads_kv=2, head_dim=64, page_size=64, device="cpu")
    for _ in range(2):
        cache.add()
    k, v = (torch.randn(2, 2, 300, 64).half() for _ in range(2))
    cache.append(k, v)
    q = queries(cache, 4, 1)
    for policy in (None, SinkWindow(1, 1), TopK(pages=2)):
        out, lse = flashcore.paged_attention(q, cache, policy=policy, return_lse=True)
        selection = policy and policy.select(q, cache)
        expected, expected_lse = paged_reference(q, cache, selection)
        assert torch.equal(out, expected.half()) and torch.equal(lse, expected_lse.float())
    dense = flashcore.attention(q, k, v, causal=True, backend="reference")
    assert torch.equal(flashcore.paged_attention(q, cache), dense)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda q, c: (q[0], c, {}), InvalidProblem, "4"),
        (lambda q, c: (q, "a cache", {}), InvalidProblem, "cache is a str; pass a"),
        (lambda q, c: (q.bfloat16(), c, {}), InvalidProblem, "bfloat16"),
        (lambda q, c: (q, c, {"softmax_scale": math.nan}), InvalidProblem, "finite"),
        (lambda q, c: (q, c, {"softmax_scale": "x"}), InvalidProblem, "number"),
        (lambda q, c: (q, c, {"backend": "cpu"}), Unsupported, "it reads no page table"),
        (lambda q, c: (q, c, {"policy": Three()}), PageTableError, "returned a int"),
        (lambda q, c: (q, c, {"policy": "top"}), InvalidProblem, "policy is 'top'; it has to be an object with"),
        (lambda q, c: (q, c, {"policy": TopK}), InvalidProblem, "policy is <class .*TopK'>; it has to be an object"),
        (lambda q, c: (q.requires_grad_(), c, {}), InvalidProblem, "gradients"),
        (lambda q, c: (q, c, {"policy": PageSelection(*torch.zeros(2, 1))}), PageTableError, "pages of the"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(change, error, words):
    cache = cache_of(LENGTHS, 2, 64, 64, torch.float16, "cpu")
    q, cache, options = change(queries(cache, 4, 1), cache)
    with pytest.raises(error, match=words):
        flashcore.paged_attention(q, cache, **options)


def test_a_problem_says_what_the_table_can_hold():
    cache = cache_of(LENGTHS, 2, 64, 64, torch.float16, "cpu")
    problem = paged_problem_of(queries(cache, 4, 3), cache)
    assert problem == Problem(
        batch=5, num_heads_q=4, num_heads_kv=2, seqlen_q=3, seqlen_k=18 * 64, head_dim=64, causal=True, page_size=64
    )


@pytest.mark.gpu
def test_a_captured_decode_replays_with_the_lengths_and_pages_of_the_day():
    cache = cache_of((100, 300, 900), 2, 128, 64, torch.float16, "cuda")
    q = queries(cache, 8, 1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        flashcore.paged_attention(q, cache, backend="decode")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flashcore.paged_attention(q, cache, backend="decode")
            again = flashcore.paged_attention(q, cache, backend="decode")
    for lengths in ((100, 300, 900), (7, 299, 650), (64, 1, 0)):
        cache.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        cache.page_table[1, :2] = cache.page_table[1, :2].flip(0)
        graph.replay()
        expected, _ = paged_reference(q, cache)
        assert float((out.double() - expected).abs().max()) < 4e-3 and torch.equal(out, again)
