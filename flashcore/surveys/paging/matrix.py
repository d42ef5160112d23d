"""The cases on which paged backends are judged: page sizes, lengths, sharing, holes, policies, heads, query tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from flashcore.paging import PAGE_SIZES, AllPages, PagedKV, PagedKVCache, Policy, SinkWindow, TopK
from flashcore.problem import Problem
from flashcore.surveys.paging.caches import shuffled_and_poisoned

GROUPS = ("page sizes", "query tokens", "heads", "policies", "sharing", "dropped pages", "prefill", "random")
POLICIES: dict[str, Policy | None] = {
    "none": None, "all": AllPages(), "sink_window": SinkWindow(1, 2), "top_k": TopK(share=0.4, sink_pages=1),
}  # fmt: skip
"""By name; `none` hands the backend no selection at all."""
HEADS = ((2, 2), (8, 2), (8, 1))
"""Query and KV heads: groups of 1, 4 and 8."""


@dataclass(frozen=True)
class PagedCase:
    """One call on one cache."""

    group: str
    lengths: tuple[int, ...]
    page_size: int = 64
    q_tokens: int = 1
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 64
    dtype: str = "float16"
    causal: bool = True
    policy: str = "none"
    prefix: int = 0
    """Tokens that the sequences share, by fork; those shorter than that share nothing."""
    dropped: tuple[int, ...] = ()
    """Logical pages given up in every sequence that has them and keeps its last one."""

    def problem(self) -> Problem:
        """The call as records name it."""
        return Problem(
            batch=len(self.lengths), num_heads_q=self.num_heads_q, num_heads_kv=self.num_heads_kv,
            seqlen_q=self.q_tokens, seqlen_k=max(self.lengths), head_dim=self.head_dim, dtype=self.dtype,
            causal=self.causal, page_size=self.page_size,
        )  # fmt: skip

    def label(self) -> str:
        """The case in one line."""
        more = [f"lengths {'/'.join(map(str, self.lengths))}", f"policy {self.policy}"]
        more += [f"prefix {self.prefix}"] if self.prefix else []
        more += [f"dropped {'/'.join(map(str, self.dropped))}"] if self.dropped else []
        return f"{self.problem().label()}, {', '.join(more)}"


def lengths_for(page_size: int) -> tuple[int, ...]:
    """Lengths of a batch: no token, one, around a page's end, several pages and a part of one."""
    return (1, page_size - 1, page_size, page_size + 1, 0, 3 * page_size + 5, 5 * page_size)


def paged_cases(profile: str, gpu: bool, *, seed: int = 0) -> list[PagedCase]:
    """The matrix of a profile; each group has every kind of its subject, on every profile."""
    every = profile == "full"
    dtypes = ("float16", "bfloat16") if every else ("float16",)
    cases = [
        PagedCase("page sizes", lengths_for(size), page_size=size, dtype=dtype, head_dim=dim)
        for size in (PAGE_SIZES if every else (16, 256)) for dtype in dtypes for dim in ((64, 128) if every else (64,))
    ]  # fmt: skip
    cases += [
        PagedCase("query tokens", (1, 3, 64, 70, 200), q_tokens=tokens, causal=causal, dtype=dtype)
        for tokens in ((1, 2, 3, 5, 7, 8) if every else (2, 8)) for causal in (True, False) for dtype in dtypes[-1:]
    ]  # fmt: skip
    cases += [
        PagedCase("heads", (130, 64, 1), q_tokens=tokens, num_heads_q=hq, num_heads_kv=hkv, head_dim=dim, dtype=dtype)
        for hq, hkv in HEADS for tokens in (1, 4) for dim in ((64, 128) if every else (128,)) for dtype in dtypes[:1]
    ]  # fmt: skip
    cases += [
        PagedCase("policies", (7 * size + 3, size, 1), page_size=size, q_tokens=tokens, policy=policy)
        for policy in POLICIES for size in ((16, 128) if every else (16,)) for tokens in (1, 4)
    ]  # fmt: skip
    cases += [
        PagedCase("sharing", (300, 300, 257, 128), page_size=64, q_tokens=tokens, prefix=prefix, policy=policy)
        for prefix in (128, 150) for policy in ("none", "top_k") for tokens in (1, 3)
    ]  # fmt: skip
    cases += [
        PagedCase("dropped pages", (400, 130, 64), page_size=32, q_tokens=tokens, dropped=dropped, policy=policy)
        for dropped in ((0,), (1, 2), (0, 3, 5)) for policy in ("none", "sink_window") for tokens in (1, 8)
    ]  # fmt: skip
    cases += [
        PagedCase("prefill", (333, 64, 130, 1), page_size=size, q_tokens=tokens, causal=causal, dtype=dtype,
                  head_dim=dim, num_heads_q=4, num_heads_kv=hkv)
        for size in ((64, 128) if every else (64,)) for tokens, causal in ((130, True), (64, False))
        for dtype in dtypes for dim in ((64, 128) if every else (64,)) for hkv in (4, 1)
    ]  # fmt: skip
    return cases + list(_random_cases(40 if gpu and profile == "full" else 8, gpu, seed))


def _random_cases(count: int, gpu: bool, seed: int) -> Iterator[PagedCase]:
    """Cases drawn from all of it at once, longer ones on a GPU."""
    draw = random.Random(seed)
    longest = 3000 if gpu else 500
    for _ in range(count):
        heads_q, heads_kv = draw.choice(HEADS)
        size = draw.choice(PAGE_SIZES)
        one = PagedCase(
            "random", tuple(draw.choice((1, size, draw.randint(1, longest))) for _ in range(draw.randint(1, 6))),
            page_size=size, q_tokens=draw.choice((1, 1, 2, 4, 8)), num_heads_q=heads_q, num_heads_kv=heads_kv,
            head_dim=draw.choice((64, 128)), dtype=draw.choice(("float16", "bfloat16")),
            causal=draw.random() < 0.7, policy=draw.choice(tuple(POLICIES)),
        )  # fmt: skip
        prefix, dropped = draw.choice((0, 0, size, size + size // 2)), draw.choice(((), (), (0,), (1,)))
        yield replace(one, prefix=prefix, dropped=dropped)


def make(case: PagedCase, device: str, *, seed: int = 0) -> tuple[torch.Tensor, PagedKV]:
    """Queries and the cache of a case: filled by append, fork and drop, then shuffled, and NaN where no token lies."""
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    pages = [-(-length // case.page_size) for length in case.lengths]
    cache = PagedKVCache(
        num_pages=sum(pages) + 3, batch=len(case.lengths), num_heads_kv=case.num_heads_kv, head_dim=case.head_dim,
        max_pages=max(pages) + 1, page_size=case.page_size, dtype=dtype, device=device,
    )  # fmt: skip
    parent = None
    for length in case.lengths:
        shared = case.prefix if 0 < case.prefix <= length and parent is not None else 0
        sequence = cache.fork(parent, shared) if shared else cache.add()
        if parent is None and length >= case.prefix:
            parent = sequence
        if length > shared:
            heads = (1, case.num_heads_kv, length - shared, case.head_dim)
            cache.append(normal(*heads), normal(*heads), [sequence])
    for sequence, count in zip(cache.sequences, pages, strict=True):
        cache.drop(sequence, [page for page in case.dropped if page < count - 1])
    q = normal(len(case.lengths), case.num_heads_q, case.q_tokens, case.head_dim)
    return q, shuffled_and_poisoned(cache, seed=seed)
