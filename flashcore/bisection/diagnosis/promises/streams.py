"""Ask in another order of work: on a side stream, in a CUDA graph, over pages that moved."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis.calling import Answer, Candidate, Refusal
from flashcore.bisection.diagnosis.promises.asking import Asked, case_of, inputs, rows_that_see, what_is_wrong
from flashcore.measure import check
from flashcore.paging import PagedKV, paginate
from flashcore.problem import Problem

DELAY = 10 * check.DELAY_CYCLES
"""Cycles of a GPU's clock, about 10 ms: so long do inputs arrive after a call on a side stream."""
REPLAYS = 3


def side_stream(candidate: Candidate, asked: Asked) -> str | None:
    """On a stream of its own, where the inputs hold NaN until some time after the call was made."""
    problem = asked.problem
    clean = inputs(candidate, problem)
    case = case_of(candidate, *clean, problem)
    candidate.ask(*(t.clone() for t in clean), problem)  # what is compiled at the first call is compiled now
    given = [torch.full_like(t, math.nan) for t in clean]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(DELAY)
        for tensor, values in zip(given, clean, strict=True):
            tensor.copy_(values)
        # In its own layout already: a copy made here would be on the right stream, and hide who reads on another.
        answer, _ = candidate.ask(*given, problem, as_given=True)
        answer = Answer(*(None if t is None else t.clone() for t in (answer.out, answer.lse)))
    torch.cuda.synchronize()
    return what_is_wrong(answer, case, rows=rows_that_see(problem, case.q.device))


def graph_replay(candidate: Candidate, asked: Asked) -> str | None:
    """Captured once in a CUDA graph, replayed on other values at the same addresses, its output erased in between."""
    problem = asked.problem
    values = [inputs(candidate, problem, seed=seed) for seed in range(REPLAYS)]
    given = tuple(t.clone() for t in values[0])
    passed = candidate.handed(given, as_given=True)
    candidate.ask(*given, problem, as_given=True)  # a problem that it does not take is refused here, in its own words
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            candidate.call(*passed, problem, False)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result = candidate.call(*passed, problem, False)
    except Exception as error:
        said = " ".join(str(error).split())[:300] or "no message"
        raise Refusal(f"it cannot be captured in a CUDA graph: {type(error).__name__}: {said}") from error
    for number, now in enumerate((*values[1:], values[0]), start=1):
        for tensor, fresh in zip(given, now, strict=True):
            tensor.copy_(fresh)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.detach().fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        answer = candidate.answer(result, given[0])
        wrong = what_is_wrong(answer, case_of(candidate, *now, problem), rows=rows_that_see(problem, given[0].device))
        if wrong:
            return f"at replay {number} of one captured call, {wrong}"
    return None


def stale_pages(candidate: Candidate, asked: Asked) -> str | None:
    """One call, then other pages, table and lengths at the same addresses, a key fewer; NaN in every unused slot."""
    problem, backend = asked.problem, candidate.backend
    reason = backend.why_not(problem) or backend.why_not_paged(problem)
    if reason:
        raise Refusal(reason)
    q, k, v = inputs(candidate, problem)
    _, k2, v2 = inputs(candidate, problem, seed=1)
    shorter = problem.with_(seqlen_k=problem.seqlen_k - 1)
    dense = (q, k2[:, :, :-1], v2[:, :, :-1])
    case = case_of(candidate, *dense, shorter)
    cache, other = paginate(k, v, problem.page_size), _paged_among_nan(*dense[1:], problem)
    try:
        backend.run_paged(q, cache, problem)
        moved = torch.arange(cache.num_pages, device=q.device).flip(0)
        cache.k_pool.copy_(other.k_pool[moved])
        cache.v_pool.copy_(other.v_pool[moved])
        cache.page_table.copy_(moved[other.page_table.long()])
        cache.lengths.copy_(other.lengths)
        answer = Answer(*backend.run_paged(q, cache, problem))
    except Exception as error:
        raise Refusal(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return what_is_wrong(answer, case, rows=rows_that_see(shorter, q.device))


def _paged_among_nan(k: torch.Tensor, v: torch.Tensor, problem: Problem) -> PagedKV:
    """Pages for one key more than there are, NaN in the slot of that key."""
    longer = [torch.nn.functional.pad(t, (0, 0, 0, 1), value=math.nan) for t in (k, v)]
    cache = paginate(*longer, problem.page_size)
    cache.lengths.fill_(k.shape[2])
    return cache
