"""Time prefill through a page table beside the same kernel over contiguous K and V."""

from __future__ import annotations

import torch

from flashcore import backends
from flashcore.gpu import device
from flashcore.measure.timing import Candidate, input_sets
from flashcore.problem import Problem
from flashcore.records import Timing
from flashcore.surveys.paging.decode import Inputs, Step, checked
from flashcore.surveys.paging.plan import Plan
from flashcore.surveys.paging.trials import Book, compact, over, ready, time_calls, worth

WHAT = "prefill"


def measure_prefill(book: Book, plan: Plan, *, seed: int = 0) -> None:
    """Two records a problem, paged and dense, interleaved; the ratio of their times stands with the paged one."""
    for problem in (one.with_(page_size=plan.page_size) for one in plan.prefill):
        try:
            _one_problem(book, plan, problem, seed)
        except Exception as error:
            book.failed(WHAT, error, backend=plan.prefill_backend, problem=problem)
        if plan.gpu:
            torch.cuda.empty_cache()


def _one_problem(book: Book, plan: Plan, problem: Problem, seed: int) -> None:
    sets = input_sets(problem, l2="rotating", l2_bytes=device.l2_bytes()) if plan.gpu else 1
    inputs = Inputs(plan, problem, sets, seed, dense=True)
    paged = Step("paged", plan.prefill_backend)
    dense = Step("dense", plan.dense_backend, paged=False)
    wrong = {paged.name: checked(inputs, paged)}
    ready(dense.backend, problem, paged=False)
    out, lse = backends.get(dense.backend).run(inputs.q[0], *inputs.dense[0], problem)
    wrong[dense.name] = inputs.expected(dense, backends.get(dense.backend)).judge(out, lse)[1]
    candidates = [Candidate(s.name, lambda i, s=s: inputs.call(s, i)) for s in (paged, dense)]
    timings = time_calls(candidates, problem, gpu=plan.gpu, sets=sets, rounds=plan.rounds)
    both = all(isinstance(t, Timing) for t in timings.values())
    for step in (paged, dense):
        timing, data = timings[step.name], {}
        if isinstance(timing, Exception):
            book.failed(WHAT, timing, backend=step.backend, variant=step.name, problem=problem, data=data)
            continue
        if step.paged and both and not any(wrong.values()):
            ratio, quartiles = over(timing, timings[dense.name])
            data |= {"over_dense": ratio, "over_dense_quartiles": quartiles, "dense": dense.backend}
            book.say(f"{problem.label()}: {timing.latency_us:.1f} µs paged, {ratio:.3f} × as fast as dense")
        status, reason = worth(wrong[step.name])
        book.write(WHAT, backend=step.backend, variant=step.name, problem=problem, status=status, reason=reason,
                   timing=compact(timing), data=data)  # fmt: skip
