"""Traces as kernels store them: room, what is told to the kernel, and what it rightly skips."""

from __future__ import annotations

import pytest
from support.split_traces import CAUSAL, EMPTY_ROWS, THIRDS, SplitCpu

from flashcore.backends._traces import TraceBuffers
from flashcore.bisection.bisecting import judge
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.reference import interleaved


def stored_by_a_kernel(trace, problem, tile_m: int) -> TraceBuffers:
    """Buffers as a causal kernel leaves them: a tile of rows stores no page that none of its rows sees."""
    buffers = TraceBuffers.make(problem, problem.page_size, tile_m, trace.scores.device)
    for first in range(0, problem.seqlen_q, tile_m):
        rows = slice(first, min(first + tile_m, problem.seqlen_q))
        for j, page in enumerate(reference.pages(problem, problem.page_size)):
            if page.start >= rows.stop + problem.seqlen_k - problem.seqlen_q:
                continue
            for stage in ("scores", "probs"):
                getattr(buffers, stage)[:, :, rows, page] = getattr(trace, stage)[:, :, rows, page].float()
            for stage in ("row_max", "rescale", "row_sum", "accum"):
                getattr(buffers, stage)[:, :, j, rows] = getattr(trace, stage)[:, :, j, rows]
    return buffers


@pytest.mark.parametrize("problem", [CAUSAL, EMPTY_ROWS.with_(seqlen_k=90)], ids=["causal", "empty rows"])
@pytest.mark.parametrize("make_chains", [*THIRDS, lambda n: interleaved(n, 6), lambda n: (-1, *range(n - 1))])
def test_skipped_pages_carry_over_from_the_page_that_they_continue(problem, make_chains):
    inputs = make_inputs(problem)
    backend = SplitCpu(make_chains)
    trace, previous = backend.trace(*inputs, problem), backend.previous(problem)
    read = stored_by_a_kernel(trace, problem, 16).trace(problem, 16, trace.out, trace.lse, previous)
    assert read.previous == previous
    result = judge(read, *inputs, problem, backend="stored", out=trace.out, lse=trace.lse)
    assert result.passed, result.finding()
    if len(reference.ends(previous)) == 1:
        return
    unaware = stored_by_a_kernel(trace, problem, 16).trace(problem, 16, trace.out, trace.lse)
    assert not judge(unaware, *inputs, problem, backend="stored").passed


def test_a_page_skipped_wrongly_is_found():
    inputs = make_inputs(CAUSAL)
    trace = SplitCpu().trace(*inputs, CAUSAL)
    buffers = stored_by_a_kernel(trace, CAUSAL, 16)
    never = TraceBuffers.make(CAUSAL, 16, 16, trace.scores.device)
    for stage in ("row_max", "rescale", "row_sum", "accum"):
        getattr(buffers, stage)[:, :, 2] = getattr(never, stage)[:, :, 2]
    read = buffers.trace(CAUSAL, 16, trace.out, trace.lse, trace.previous)
    result = judge(read, *inputs, CAUSAL, backend="stored")
    first = next(row for row in result.stages if row.role == "producer")
    assert first.stage == "row_max" and first.local.first_bad.items() >= {"page": 2, "row": 32, "kind": "NaN"}.items()
