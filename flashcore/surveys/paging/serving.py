"""Count the tokens a second that attention of public models leaves room for, beside every peer, by batch."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.problem import Problem
from flashcore.surveys.paging.caches import paged_from, rows_of
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
from flashcore.surveys.paging.plan import ModelShape, Plan
from flashcore.surveys.paging.serving_facts import AS_ROWS, CUDA, DENSE, INVARIANT, OURS, SERVING, TENSOR
from flashcore.surveys.paging.trials import Book

WHAT = SERVING
DTYPE = "bfloat16"
"""What these models are served in."""


def measure_serving(book: Book, plan: Plan, *, seed: int = 0) -> None:
    """One record a model, batch and way: one layer's decode step, timed; a model takes it once a layer and token."""
    for model in plan.served:
        for batch in plan.served_batches:
            problem = model.problem(batch).with_(page_size=plan.page_size, dtype=DTYPE)
            data = {"shape": model.name, "layers": model.layers, "batch": batch, "card": model.card}
            try:
                _one_batch(book, plan, model, problem, data | {"kv_bytes": kv_bytes(problem)} | sheet_data(plan), seed)
            except Exception as error:  # out of memory, most likely; the next batch may fit
                book.failed(WHAT, error, backend=plan.decode_backend, variant=OURS, problem=problem, data=data)
            if plan.gpu:
                torch.cuda.empty_cache()


def _one_batch(book: Book, plan: Plan, model: ModelShape, problem: Problem, data: dict[str, Any], seed: int) -> None:
    sets = num_sets(problem, 1.0) if plan.gpu else 1
    check_room(plan.decode_backend, plan, sets * kv_bytes(problem))
    k, v, q = random_step(problem, sets, plan.device, seed)
    batch = problem.batch
    whole = paged_from(k, v, plan.page_size, seed=seed)
    caches = [rows_of(whole, i * batch, batch) for i in range(sets)]
    dense = list(zip(k.split(batch), v.split(batch), strict=True))
    timings = contest(book, WHAT, ways_of(plan, problem, q, caches, dense), plan=plan, sets=sets, data=data)
    if OURS in timings:
        rate = tokens_per_s(model.layers, batch, timings[OURS].latency_us)
        book.say(f"{model.name}, batch {batch}: {rate:,.0f} tokens/s, attention only")


def ways_of(plan: Plan, problem: Problem, q, caches, dense) -> list[Way]:
    """Ours, ours with bits that do not depend on the batch, dense attention, FlashInfer."""
    rivals = {"dense": (DENSE, AS_ROWS), "flashinfer": (TENSOR, CUDA)}
    asked, judge = problem.with_(batch_invariant=True), Judge(q[0], caches[0])
    return [
        pages_way(OURS, plan.decode_backend, q, caches, problem, judge, rivals),
        pages_way(INVARIANT, plan.invariant_backend, q, caches, asked, judge, {"ordinary": (OURS,), **rivals}),
        *dense_ways(plan.peer, q, dense, problem, judge),
        *(peer_way(variant, q, caches, problem, judge) for variant in (TENSOR, CUDA)),
    ]


def tokens_per_s(layers: int, batch: int, latency_us: float) -> float:
    """A token of each sequence takes one step in each layer, and nothing else is counted."""
    return batch / (layers * latency_us) * 1e6


def random_step(problem: Problem, sets: int, device: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random K and V, ``[sets * batch, num_heads_kv, seqlen_k, head_dim]``, and queries, ``[sets, batch, num_heads_q,
    seqlen_q, head_dim]``, made where they lie."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, problem.dtype))

    k, v = (normal(sets * problem.batch, problem.num_heads_kv, problem.seqlen_k, problem.head_dim) for _ in range(2))
    return k, v, normal(sets, problem.batch, problem.num_heads_q, problem.seqlen_q, problem.head_dim)
