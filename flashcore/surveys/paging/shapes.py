"""Time decode against dense attention at several page sizes and dtypes, and what serving has beside plain steps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from flashcore.problem import Problem
from flashcore.surveys.paging.caches import mixed_cache, paged_from, rows_of
from flashcore.surveys.paging.contest import (
    Judge,
    Way,
    check_room,
    contest,
    dense_ways,
    pages_way,
    peer_way,
    sheet_data,
)
from flashcore.surveys.paging.decode import kv_bytes, num_sets
from flashcore.surveys.paging.plan import Further, Plan
from flashcore.surveys.paging.serving import random_step
from flashcore.surveys.paging.serving_facts import (
    AS_ROWS,
    CASCADE,
    CUDA,
    DENSE,
    LENGTHS,
    OURS,
    PLAIN,
    PREFIX,
    SEVERAL,
    SHAPES,
    TENSOR,
    TOKENS,
)
from flashcore.surveys.paging.trials import Book

WHAT = SHAPES
PEERS = (TENSOR, CUDA)


def measure_shapes(book: Book, plan: Plan, *, seed: int = 0) -> None:
    """One record a shape, dtype and way, or of another case; what is compared shares its rounds."""
    for name, part in cases(plan):
        problem = part.shapes[0] if part.shapes else part.further.problem
        try:
            for case in part.shapes:
                problem = case.with_(dtype=part.dtypes[0])
                _plain(book, part, problem, seed)
            if part.further is not None:
                _FURTHER[name](book, part, part.further, seed)
        except Exception as error:  # out of memory, most likely; the next one may fit
            book.failed(WHAT, error, backend=plan.decode_backend, problem=problem, data={"case": name})
        if plan.gpu:
            torch.cuda.empty_cache()


def cases(plan: Plan) -> list[tuple[str, Plan]]:
    """The parts that need nothing of each other: a shape in a dtype, or one further case; the plan of each."""
    parts = [
        (PLAIN, replace(plan, shapes=(problem,), dtypes=(dtype,), further=None, further_cases=()))
        for problem in plan.shapes for dtype in plan.dtypes
    ]  # fmt: skip
    if plan.further is not None:
        names = plan.further_cases or tuple(_FURTHER)
        parts += [(name, replace(plan, shapes=(), further_cases=(name,))) for name in names]
    return parts


def _plain(book: Book, plan: Plan, problem: Problem, seed: int) -> None:
    """Ours and FlashInfer at each page size, and dense attention, over the same keys and values."""
    sets = num_sets(problem, 1.0) if plan.gpu else 1
    check_room(plan.decode_backend, plan, sets * kv_bytes(problem), times=2.0 + len(plan.pages))
    k, v, q = random_step(problem, sets, plan.device, seed)
    batch = problem.batch
    dense = list(zip(k.split(batch), v.split(batch), strict=True))
    ways: list[Way] = []
    for size in plan.pages:
        whole = paged_from(k, v, size, seed=seed)
        caches = [rows_of(whole, i * batch, batch) for i in range(sets)]
        judge = ways[0].judge if ways else Judge(q[0], caches[0])  # the keys are the same at every page size
        ways = ways or dense_ways(plan.peer, q, dense, problem, judge)
        paged, names = problem.with_(page_size=size), [f"{variant}, page {size}" for variant in PEERS]
        rivals = {"dense": (DENSE, AS_ROWS), "flashinfer": names}
        ways.append(pages_way(f"page {size}", plan.decode_backend, q, caches, paged, judge, rivals))
        ways += [peer_way(one, q, caches, paged, judge, name=name) for one, name in zip(PEERS, names, strict=True)]
    data = {"case": PLAIN, "kv_bytes": kv_bytes(problem)} | sheet_data(plan)
    timings = contest(book, WHAT, ways, plan=plan, sets=sets, data=data)
    told = [f"page {size} {timings[f'page {size}'].latency_us:.1f}" for size in plan.pages if f"page {size}" in timings]
    book.say(f"{problem.label()}: {', '.join(told) or 'nothing of ours'} µs")


def _lengths(book: Book, plan: Plan, further: Further, seed: int) -> None:
    """A batch of sequences of very unlike lengths."""
    draw, (low, high) = random.Random(seed), further.lengths
    lengths = [draw.randint(low, high) for _ in range(further.problem.batch)]
    problem = further.problem.with_(page_size=plan.page_size, seqlen_k=max(lengths))
    size = kv_bytes(problem.with_(seqlen_k=1)) // problem.batch * sum(lengths)
    check_room(plan.decode_backend, plan, size, times=1.5)
    cache = mixed_cache(lengths, problem.num_heads_kv, problem.head_dim, page_size=plan.page_size,
                        dtype=getattr(torch, problem.dtype), device=plan.device, seed=seed)  # fmt: skip
    q = _queries(problem, 1, plan.device, seed)
    data = {"case": LENGTHS, "kv_bytes": size, "shortest": min(lengths), "tokens": sum(lengths)} | sheet_data(plan)
    judge = Judge(q[0], cache)
    ways = [
        pages_way(OURS, plan.decode_backend, q, [cache], problem, judge, {"flashinfer": PEERS}),
        *(peer_way(one, q, [cache], problem, judge) for one in PEERS),
    ]
    contest(book, WHAT, ways, plan=plan, sets=1, data=data)


def _tokens(book: Book, plan: Plan, further: Further, seed: int) -> None:
    """A few query tokens a sequence, as in speculative decoding, beside one."""
    one = further.problem.with_(page_size=plan.page_size)
    sets = num_sets(one, 1.0) if plan.gpu else 1
    check_room(plan.decode_backend, plan, sets * kv_bytes(one))
    k, v, q = random_step(one, sets, plan.device, seed)
    whole = paged_from(k, v, plan.page_size, seed=seed)
    caches = [rows_of(whole, i * one.batch, one.batch) for i in range(sets)]
    dense = list(zip(k.split(one.batch), v.split(one.batch), strict=True))
    single, judge = "1 query token", Judge(q[0], caches[0])
    ways = [pages_way(single, plan.decode_backend, q, caches, one, judge, {"dense": (DENSE, AS_ROWS)}),
            *dense_ways(plan.peer, q, dense, one, judge)]  # fmt: skip
    for tokens in further.tokens:
        problem = one.with_(seqlen_q=tokens, causal=True)
        several, peer = _queries(problem, sets, plan.device, seed), f"{SEVERAL}, {tokens} query tokens"
        judge = Judge(several[0], caches[0])
        rivals = {"one": (single,), "dense": (DENSE, AS_ROWS), "flashinfer": (peer,)}
        ways.append(pages_way(f"{tokens} query tokens", plan.decode_backend, several, caches, problem, judge, rivals))
        ways.append(peer_way(SEVERAL, several, caches, problem, judge, name=peer))
    data = {"case": TOKENS, "kv_bytes": kv_bytes(one)} | sheet_data(plan)
    contest(book, WHAT, ways, plan=plan, sets=sets, data=data)


def _prefix(book: Book, plan: Plan, further: Further, seed: int) -> None:
    """Sequences that share the pages of a prefix, beside as many that share nothing."""
    problem, size = further.problem.with_(page_size=plan.page_size), plan.page_size
    whole, prefix = kv_bytes(problem), further.prefix // size * size
    check_room(plan.decode_backend, plan, whole, times=2.0)
    shape = ([problem.seqlen_k] * problem.batch, problem.num_heads_kv, problem.head_dim)
    options = {"page_size": size, "dtype": getattr(torch, problem.dtype), "device": plan.device, "seed": seed}
    shared, apart = mixed_cache(*shape, **options, prefix=prefix), mixed_cache(*shape, **options)
    q = _queries(problem, 1, plan.device, seed)
    once = whole // problem.batch // problem.seqlen_k * (prefix + problem.batch * (problem.seqlen_k - prefix))
    data = {"case": PREFIX, "kv_bytes": once, "prefix": prefix} | sheet_data(plan)
    judge, other = Judge(q[0], shared), Judge(q[0], apart)
    rivals = {"apart": ("nothing shared",), "flashinfer": (*PEERS, CASCADE)}
    ways = [
        pages_way("prefix shared", plan.decode_backend, q, [shared], problem, judge, rivals),
        *(peer_way(one, q, [shared], problem, judge, prefix=prefix) for one in (*PEERS, CASCADE)),
    ]
    other = pages_way(
        "nothing shared", plan.decode_backend, q, [apart], problem, Judge(q[0], apart), {}, kv_bytes=whole
    )
    contest(book, WHAT, [*ways, other], plan=plan, sets=1, data=data)


_FURTHER = {LENGTHS: _lengths, TOKENS: _tokens, PREFIX: _prefix}


def _queries(problem: Problem, sets: int, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    shape = (sets, problem.batch, problem.num_heads_q, problem.seqlen_q, problem.head_dim)
    dtype: Any = getattr(torch, problem.dtype)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)
