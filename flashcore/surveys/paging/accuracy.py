"""Measure what leaving pages out costs: attention recalled and output error of each policy on constructed patterns."""

from __future__ import annotations

import math
from typing import Any

import torch

from flashcore.paging import ATTENTION_PATTERNS, PagedKV, Policy, SinkWindow, TopK, make_attention, recalled
from flashcore.problem import Problem
from flashcore.surveys.paging.caches import pages_share
from flashcore.surveys.paging.plan import Plan
from flashcore.surveys.paging.trials import Book

WHAT = "accuracy"
SPREAD = "needle, spread thin"
"""The needle along all of head_dim, where a page's key bounds cannot see it: a known weakness, shown and not hidden."""
KEPT = 0.5
"""Of the attention: with less than that recalled, a query's answer comes from other keys than the dense one's."""


def policies(share: float, pages: int) -> dict[str, Policy]:
    """The policies at one share of the pages, by name; the window has as many pages as the other, one of them first."""
    return {"top_k": TopK(share=share), "sink_window": SinkWindow(1, max(1, math.ceil(share * pages) - 1))}


def measure_accuracy(book: Book, plan: Plan, *, seed: int = 0) -> None:
    """One record a pattern, policy and share of pages, against dense attention in float64."""
    problem, pages = plan.accuracy, plan.accuracy.num_pages()
    for pattern in (*ATTENTION_PATTERNS, SPREAD):
        try:
            q, cache = pattern_cache(problem, pattern, plan.device, seed)
        except Exception as error:
            book.failed(WHAT, error, data={"pattern": pattern})
            continue
        for share in plan.accuracy_shares:
            for name, policy in policies(share, pages).items():
                data = {"pattern": pattern, "policy": name, "share": share, "pages": pages}
                try:
                    book.write(WHAT, data=data | _judge(q, cache, policy))
                except Exception as error:  # a policy of a user's own may raise anything
                    book.failed(WHAT, error, data=data)
        book.say(f"{pattern}: {len(plan.accuracy_shares)} shares of {pages} pages")


def pattern_cache(problem: Problem, pattern: str, device: str, seed: int) -> tuple[torch.Tensor, PagedKV]:
    """Queries, and their keys and values in pages in order, with key bounds."""
    spread = pattern == SPREAD
    q, k, v = make_attention(problem, "needle" if spread else pattern, seed=seed, device=device,
                             channels=problem.head_dim if spread else 4)  # fmt: skip
    size, columns = problem.page_size, problem.num_pages()

    def pool(dense: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(dense, (0, 0, 0, columns * size - problem.seqlen_k))
        return padded.unflatten(2, (columns, size)).transpose(1, 2).flatten(0, 1).contiguous()

    table = torch.arange(problem.batch * columns, dtype=torch.int32, device=device).view(problem.batch, columns)
    lengths = torch.full((problem.batch,), problem.seqlen_k, dtype=torch.int32, device=device)
    return q, PagedKV.from_tables(pool(k), pool(v), table, lengths, key_bounds=True, max_length=problem.seqlen_k)


def _judge(q: torch.Tensor, cache: PagedKV, policy: Policy) -> dict[str, Any]:
    selection = policy.select(q, cache)
    mass, error = recalled(q, cache, selection)  # every query here sees a key, so that none is NaN
    return {
        "pages_share": pages_share(cache, selection), "mass_mean": float(mass.mean()), "mass_least": float(mass.min()),
        "error_mean": float(error.mean()), "error_largest": float(error.max()), "queries": mass.numel(),
        "lost": int((mass < KEPT).sum()),
    }  # fmt: skip
