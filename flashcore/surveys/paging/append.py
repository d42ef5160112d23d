"""Time the append of one token to each of many sequences, in one layer: the device's part, as a graph replays it."""

from __future__ import annotations

import torch

from flashcore.measure.timing import Candidate
from flashcore.paging import PagedKVCache
from flashcore.records import Timing
from flashcore.surveys.paging.plan import Plan
from flashcore.surveys.paging.trials import Book, compact, time_calls, worth

WHAT = "append"
TOKENS = 64
"""Appended before the lengths are put back; that one fill of `lengths` in so many calls counts as part of them."""


def measure_append(book: Book, plan: Plan, *, seed: int = 0) -> None:
    """One record: `PagedKVCache.write` of a token a sequence, key bounds kept; `reserve` and `advance` are outside."""
    problem = plan.append.with_(page_size=plan.page_size)
    try:
        cache, k, v = _filled(plan, seed)
        wrong = _check(cache, k, v)
        start = problem.seqlen_k

        def call(i: int) -> None:
            if i == 0:
                cache.lengths.fill_(start)
            cache.write(k, v)

        timing = time_calls([Candidate("append", call)], problem, gpu=plan.gpu, sets=TOKENS if plan.gpu else 1,
                            rounds=plan.rounds, l2="warm")["append"]  # fmt: skip
        if isinstance(timing, Exception):
            raise timing
    except Exception as error:
        book.failed(WHAT, error, problem=problem)
        return
    assert isinstance(timing, Timing)
    data = {
        "sequences": problem.batch, "key_bounds": True,
        "bytes": 2 * k.numel() * k.element_size(), "latency_us": timing.latency_us,
    }  # fmt: skip
    status, reason = worth(wrong)
    book.write(WHAT, problem=problem, timing=compact(timing), data=data, status=status, reason=reason)
    book.say(f"one token for {problem.batch} sequences: {timing.latency_us:.2f} µs")


def _filled(plan: Plan, seed: int) -> tuple[PagedKVCache, torch.Tensor, torch.Tensor]:
    """A cache whose sequences have their prompt and pages for `TOKENS` more, and one token for each."""
    problem = plan.append
    pages = -(-(problem.seqlen_k + TOKENS) // plan.page_size)
    cache = PagedKVCache(
        num_pages=problem.batch * pages, batch=problem.batch, num_heads_kv=problem.num_heads_kv,
        head_dim=problem.head_dim, max_pages=pages, page_size=plan.page_size, device=plan.device,
    )  # fmt: skip
    generator = torch.Generator(device=plan.device).manual_seed(seed)

    def tokens(count: int) -> torch.Tensor:
        shape = (problem.batch, problem.num_heads_kv, count, problem.head_dim)
        return torch.randn(shape, generator=generator, device=plan.device, dtype=torch.float16)

    for _ in range(problem.batch):
        cache.add()
    prompt = tokens(problem.seqlen_k)
    cache.append(prompt, prompt)
    cache.reserve(TOKENS)
    return cache, tokens(1), tokens(1)


def _check(cache: PagedKVCache, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """What one write did other than to put the token into its slot; None when that is what it did."""
    start = cache.lengths.clone()
    page = cache.page_table[torch.arange(cache.batch, device=cache.device), (start // cache.page_size).long()].long()
    offset = (start % cache.page_size).long()
    cache.write(k, v)
    for name, pool, new in (("k", cache.k_pool, k), ("v", cache.v_pool, v)):
        if not torch.equal(pool[page, :, offset], new[:, :, 0]):
            return f"the token's {name} is not in its slot"
    return None if torch.equal(cache.lengths, start + 1) else "lengths did not grow by one"
