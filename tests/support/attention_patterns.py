"""Attention made to order, in a cache and as probabilities, for tests of what a selection loses."""

from __future__ import annotations

from flashcore.paging import PagedKVCache, make_attention
from flashcore.problem import Problem

PATTERN = Problem(batch=1, num_heads_q=8, num_heads_kv=2, seqlen_q=1, seqlen_k=2048, head_dim=64, causal=True)


def pattern_cache(pattern, problem=PATTERN, **options):
    q, k, v = make_attention(problem, pattern, **options)
    cache = PagedKVCache(num_pages=problem.seqlen_k // 32, batch=1, num_heads_kv=2, head_dim=64, page_size=32,
                         dtype=k.dtype, device="cpu")  # fmt: skip
    cache.add()
    cache.append(k, v)
    return q, cache


def probabilities(pattern, problem=PATTERN):
    q, k, _ = make_attention(problem, pattern)
    group = problem.num_heads_q // problem.num_heads_kv
    return ((q.double() @ k.double().repeat_interleave(group, dim=1).mT) * problem.scale).softmax(-1)[:, :, 0]
