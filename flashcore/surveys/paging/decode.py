"""Time a decode step: all pages and some of them, beside dense attention over contiguous K and V and the floor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from flashcore import backends
from flashcore.backends import Backend
from flashcore.gpu import device
from flashcore.measure.timing import Candidate
from flashcore.paged_ops import paged_attention
from flashcore.paging import PageSelection, Policy, SinkWindow, TopK
from flashcore.problem import Problem
from flashcore.records import Timing
from flashcore.surveys.paging.caches import dense_of, pages_share, random_cache, rows_of
from flashcore.surveys.paging.expected import Expected, expect
from flashcore.surveys.paging.plan import Plan
from flashcore.surveys.paging.read_speed import read_speed
from flashcore.surveys.paging.trials import Book, compact, over, ready, time_calls, worth

WHAT = "decode"
MAX_SETS = 16


@dataclass(frozen=True)
class Step:
    """One way to take the step, and what it reads."""

    name: str
    backend: str
    policy: Policy | None = None
    policy_name: str = "none"
    share: float = 1.0
    """Of the pages, asked for."""
    paged: bool = True


def steps_of(plan: Plan, problem: Problem) -> list[Step]:
    """All pages without a selection, then each policy at each share; the window is as large as the other's choice."""
    pages = -(-problem.seqlen_k // plan.page_size)
    steps = [Step("all pages", plan.decode_backend)]
    for share in plan.shares:
        window = SinkWindow(1, max(1, math.ceil(share * pages) - 1))
        for name, policy in (("top_k", TopK(share=share)), ("sink_window", window)):
            if name == "sink_window" and share == 1:
                continue  # all pages, chosen without a look at them: nothing that the other two do not say
            steps.append(Step(f"{name} {100 * share:g} %", plan.decode_backend, policy, name, share))
    steps.append(Step("dense", plan.peer, paged=False))
    if problem.num_heads_q > problem.num_heads_kv:
        # The query heads of a group as rows of one head: the same numbers, and what a careful caller would do.
        steps.append(Step("dense, group as rows", plan.peer, paged=False))
    return steps


def num_sets(problem: Problem, smallest_share: float) -> int:
    """Caches to rotate over, so that even the smallest selection of all of them exceeds twice the L2 cache."""
    return max(1, min(MAX_SETS, math.ceil(2 * device.l2_bytes() / (smallest_share * kv_bytes(problem)))))


def kv_bytes(problem: Problem) -> int:
    """Bytes of K and V of one layer, 16-bit."""
    return 2 * problem.batch * problem.num_heads_kv * problem.seqlen_k * problem.head_dim * 2


def measure_decode(book: Book, plan: Plan, *, seed: int = 0) -> None:
    """Every shape of the plan: each step checked against float64, then all timed in the same rounds."""
    speed = read_speed(book.run).data["value"]
    for problem in (one.with_(page_size=plan.page_size) for one in plan.decode):
        try:
            _one_shape(book, plan, problem, speed, seed)
        except Exception as error:  # out of memory, most likely; the next shape may fit
            book.failed(WHAT, error, backend=plan.decode_backend, problem=problem)
        if plan.gpu:
            torch.cuda.empty_cache()


class Inputs:
    """Queries, pages and contiguous copies for each set that calls rotate over."""

    def __init__(self, plan: Plan, problem: Problem, sets: int, seed: int, *, dense: bool):
        self.problem, self.sets = problem, sets
        dtype = getattr(torch, problem.dtype)
        whole = random_cache(problem.batch * sets, problem.seqlen_k, problem.num_heads_kv, problem.head_dim,
                             page_size=plan.page_size, dtype=dtype, device=plan.device, seed=seed)  # fmt: skip
        self.caches = [rows_of(whole, i * problem.batch, problem.batch) for i in range(sets)]
        generator = torch.Generator(device=plan.device).manual_seed(seed + 1)
        shape = (sets, problem.batch, problem.num_heads_q, problem.seqlen_q, problem.head_dim)
        self.q = torch.randn(shape, generator=generator, device=plan.device).to(dtype)
        self.dense = [dense_of(cache, problem.seqlen_k) for cache in self.caches] if dense else []

    def call(self, step: Step, i: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take one step on set i; the selection is part of it."""
        if step.paged:
            return paged_attention(self.q[i], self.caches[i], policy=step.policy, causal=self.problem.causal,
                                   backend=step.backend, return_lse=True, batch_invariant=False)  # fmt: skip
        backend, (k, v), q, problem = backends.get(step.backend), self.dense[i], self.q[i], self.problem
        if "rows" not in step.name:
            return backend.run(q, k, v, problem)[0], None
        group = problem.num_heads_q // problem.num_heads_kv
        packed = problem.with_(num_heads_q=problem.num_heads_kv, seqlen_q=group)
        out, _ = backend.run(q.view(problem.batch, problem.num_heads_kv, group, -1), k, v, packed)
        return out.reshape(q.shape), None

    def selection(self, step: Step) -> PageSelection | None:
        """What the step selects on set 0."""
        return step.policy.select(self.q[0], self.caches[0]) if step.policy else None

    def expected(self, step: Step, backend: Backend) -> Expected:
        """What it has to give on set 0."""
        return expect(self.q[0], self.caches[0], self.selection(step), causal=self.problem.causal,
                      round_scores=backend.rounds_scores)  # fmt: skip


def checked(inputs: Inputs, step: Step) -> str | None:
    """What is wrong with the step's result on set 0, in a sentence; raises what the backend raises."""
    backend = ready(step.backend, inputs.problem, paged=step.paged, selected=step.policy is not None)
    return inputs.expected(step, backend).judge(*inputs.call(step, 0))[1]


def _one_shape(book: Book, plan: Plan, problem: Problem, speed_tbs: float, seed: int) -> None:
    sets = num_sets(problem, min(plan.shares))
    inputs = Inputs(plan, problem, sets, seed, dense=True)
    wrong: dict[str, str | None] = {}
    steps: list[Step] = []
    for step in steps_of(plan, problem):
        try:
            wrong[step.name] = checked(inputs, step)
            steps.append(step)
        except Exception as error:
            _failed(book, step, problem, error)
    candidates = [Candidate(s.name, lambda i, s=s: inputs.call(s, i)) for s in steps]
    timings = time_calls(candidates, problem, gpu=plan.gpu, sets=sets, rounds=plan.rounds)
    good = {name: t for name, t in timings.items() if isinstance(t, Timing) and not wrong[name]}
    dense = [s.name for s in steps if not s.paged and s.name in good]
    peer = min(dense, key=lambda name: good[name].latency_us, default=None)
    for step in steps:
        timing = timings[step.name]
        if isinstance(timing, Exception):
            _failed(book, step, problem, timing)
            continue
        share = pages_share(inputs.caches[0], inputs.selection(step))
        data = _data(step) | {
            "pages_share": share, "kv_bytes": round(share * kv_bytes(problem)),
            "floor_us": share * kv_bytes(problem) / speed_tbs / 1e6,
        }  # fmt: skip
        data["of_floor"] = data["floor_us"] / timing.latency_us
        if step.paged and "all pages" in good:
            data["of_dense"] = timing.latency_us / good["all pages"].latency_us
        if step.paged and peer:
            ratio, quartiles = over(timing, good[peer])
            data |= {"over_peer": ratio, "over_peer_quartiles": quartiles}
            data |= {"peer": f"{plan.peer}, {peer}"} if step.policy is None else {}  # the same for all steps
        status, reason = worth(wrong[step.name])
        book.write(WHAT, backend=step.backend, variant=step.name, problem=problem, status=status, reason=reason,
                   timing=compact(timing), data=data)  # fmt: skip
    if "all pages" in good:
        against = f", {plan.peer} {good[peer].latency_us:.1f}" if peer else ""
        floor = kv_bytes(problem) / speed_tbs / 1e6
        book.say(f"{problem.label()}: {good['all pages'].latency_us:.1f} µs{against}, floor {floor:.1f}")


def _failed(book: Book, step: Step, problem: Problem, error: Exception) -> None:
    book.failed(WHAT, error, backend=step.backend, variant=step.name, problem=problem, data=_data(step))


def _data(step: Step) -> dict[str, Any]:
    return {"policy": step.policy_name if step.paged else "dense", "share": step.share}
