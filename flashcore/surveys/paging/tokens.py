"""Count tokens a second of attention alone: decode over a cache, nothing else of a model, by batch."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.gpu import device
from flashcore.measure.timing import Candidate
from flashcore.paging import TopK
from flashcore.problem import Problem
from flashcore.records import Timing
from flashcore.surveys.paging.decode import Inputs, Step, checked, kv_bytes, num_sets
from flashcore.surveys.paging.plan import ModelShape, Plan
from flashcore.surveys.paging.trials import Book, compact, time_calls, worth

WHAT = "tokens"
HEADROOM = 2.5
"""Free memory over the size of the cache: bounds and the check's copies lie beside it."""


def measure_tokens(book: Book, plan: Plan, *, seed: int = 0) -> None:
    """One record a shape and batch: tokens a second = batch / (layers x time of one layer's decode attention)."""
    for model in plan.models:
        for batch in plan.batches:
            problem = model.problem(batch).with_(page_size=plan.page_size)
            data = {"shape": model.name, "layers": model.layers, "batch": batch}
            try:
                if plan.gpu and torch.cuda.mem_get_info()[0] < HEADROOM * kv_bytes(problem):
                    book.say(f"{model.name}, batch {batch}: left out, it does not fit this GPU's memory")
                    continue
                _one_batch(book, plan, model, problem, data, seed)
            except Exception as error:
                book.failed(WHAT, error, backend=plan.decode_backend, problem=problem, data=data)
            if plan.gpu:
                torch.cuda.empty_cache()


def _one_batch(book: Book, plan: Plan, model: ModelShape, problem: Problem, data: dict[str, Any], seed: int) -> None:
    sets = num_sets(problem, plan.sparse_share) if device.has_gpu() and plan.gpu else 1
    inputs = Inputs(plan, problem, sets, seed, dense=False)
    every = Step("all pages", plan.decode_backend)
    sparse = Step("top_k", plan.decode_backend, TopK(share=plan.sparse_share), "top_k", plan.sparse_share)
    wrong = next(filter(None, (checked(inputs, step) for step in (every, sparse))), None)
    candidates = [Candidate(s.name, lambda i, s=s: inputs.call(s, i)) for s in (every, sparse)]
    timings = time_calls(candidates, problem, gpu=plan.gpu, sets=sets, rounds=max(3, plan.rounds // 2))
    timing, selected = timings[every.name], timings[sparse.name]
    if isinstance(timing, Exception):
        raise timing
    data |= {
        "tokens_per_s": _rate(model, problem, timing), "stated": problem.batch == model.stated_batch,
    }  # fmt: skip
    if data["stated"]:
        data["definition"] = (
            f"attention only, batch {problem.batch}, {model.words()}: batch / (layers x time of one layer)"
        )
    if isinstance(selected, Timing):
        data |= {"sparse_share": plan.sparse_share, "sparse_us": selected.latency_us,
                 "sparse_tokens_per_s": _rate(model, problem, selected)}  # fmt: skip
    status, reason = worth(wrong)
    kept = compact(timing).model_copy(update={"samples_us": []})
    book.write(WHAT, backend=plan.decode_backend, variant=model.name, problem=problem, data=data, timing=kept,
               status=status, reason=reason)  # fmt: skip
    book.say(f"{model.name}, batch {problem.batch}: {data['tokens_per_s']:,.0f} tokens/s, attention only")


def _rate(model: ModelShape, problem: Problem, timing: Timing) -> float:
    return problem.batch / (model.layers * timing.latency_us) * 1e6
