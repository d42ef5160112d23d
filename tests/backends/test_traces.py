"""Traces as kernels store them: room, what is told to the kernel, and what it rightly skips."""

from __future__ import annotations

import math

import pytest
import torch
from support import launch_structs
from support.split_traces import CAUSAL, EMPTY_ROWS, THIRDS, SplitCpu

from flashcore import backends
from flashcore.backends._traces import NOT_WRITTEN, TRACE, TraceBuffers
from flashcore.bisection.bisecting import judge
from flashcore.numerics import masking, reference
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.numerics.reference import interleaved
from flashcore.problem import Problem


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


MASKED = Problem(batch=3, num_heads_q=2, num_heads_kv=1, seqlen_q=70, seqlen_k=90, head_dim=16, page_size=16)
MASKS = {
    "left": {"causal": True, "window_left": 20}, "both sides": {"window_left": 5, "window_right": 3},
    "right": {"window_right": 9}, "hides all": {"causal": True, "window_left": 2, "seqlen_q": 90, "seqlen_k": 40},
    "lengths": {"lengths": "right"}, "left padding": {"lengths": "left", "causal": True, "sink": True},
    "ragged": {"batch": 6, "lengths": "ragged", "causal": True, "window_left": 11},
}  # fmt: skip


def seen_by(problem, masks):
    """bool ``[B, Sq, Sk]``, of real rows first."""
    lengths = None
    if problem.lengths:
        lengths = [masking.rows_of(problem, masks, name, "cpu").count for name in "qk"]
    seen = reference.visible(problem, slice(0, problem.seqlen_q), slice(0, problem.seqlen_k), "cpu", lengths)
    return seen.expand(problem.batch, -1, -1)


def store_seen(trace, problem, masks, tile_m: int, forgotten=None) -> TraceBuffers:
    """Buffers of a kernel whose tiles store no page of which none of their rows sees a key, nor the `forgotten` one."""
    buffers, seen = TraceBuffers.make(problem, problem.page_size, tile_m, trace.scores.device), seen_by(problem, masks)
    for b in range(problem.batch):
        for first in range(0, problem.seqlen_q, tile_m):
            rows = slice(first, min(first + tile_m, problem.seqlen_q))
            for j, page in enumerate(reference.pages(problem, problem.page_size)):
                if not seen[b, rows, page].any() or (b, first, j) == forgotten:
                    continue
                for stage in ("scores", "probs"):
                    getattr(buffers, stage)[b, :, rows, page] = getattr(trace, stage)[b, :, rows, page].float()
                for stage in ("row_max", "rescale", "row_sum", "accum"):
                    getattr(buffers, stage)[b, :, j, rows] = getattr(trace, stage)[b, :, j, rows]
    return buffers


@pytest.mark.parametrize("name", MASKS)
def test_pages_that_a_mask_hides_may_be_skipped_and_no_other(name):
    problem = MASKED.with_(**MASKS[name])
    inputs, masks, backend = make_inputs(problem), make_masks(problem), backends.get("cpu")
    given = backends.with_masks(masks)
    trace, (out, lse) = backend.trace(*inputs, problem, **given), backend.run(*inputs, problem, **given)
    buffers = store_seen(trace, problem, masks, 16)
    skipped = int(buffers.row_max.isnan().sum())
    read = buffers.trace(problem, 16, out, lse, masks=masks)
    result = judge(read, *inputs, problem, backend="stored", out=out, lse=lse, masks=masks)
    assert skipped and result.passed, result.finding()
    b, row, key = (int(x) for x in seen_by(problem, masks).nonzero()[-1])
    place = b, row // 16 * 16, key // 16
    read = store_seen(trace, problem, masks, 16, forgotten=place).trace(problem, 16, out, lse, masks=masks)
    result = judge(read, *inputs, problem, backend="stored", masks=masks)
    bad = result.first_row[1].first_bad
    assert bad["kind"] == "NaN" and (bad["batch"], bad["row"] // 16 * 16, bad["page"]) == place


# ------------------------------------------------------------------------------------------------ room for stages

TWO_TILES = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=50, head_dim=64, causal=True)
CPU = torch.device("cpu")


def test_buffers_are_declared_as_the_kernels_take_them():
    letters = launch_structs.declared("attention_scalar", "TraceBuffers")
    assert letters == launch_structs.packed(TRACE) == "QQQQQQii" and TRACE.size == launch_structs.size_in_c(letters)


def test_room_is_made_for_whole_tiles_and_told_in_order():
    buffers = TraceBuffers.make(TWO_TILES, 16, 32, CPU)
    assert buffers.scores.shape == buffers.probs.shape == (2, 4, 70, 50)
    assert buffers.row_max.shape == buffers.rescale.shape == buffers.row_sum.shape == (2, 4, 4, 70)
    assert buffers.accum.shape == (2, 4, 4, 96, 64), "70 rows are rounded up to three tiles of 32"
    stages = [buffers.scores, buffers.row_max, buffers.rescale, buffers.probs, buffers.row_sum, buffers.accum]
    assert TRACE.unpack(buffers.packed()) == (*(stage.data_ptr() for stage in stages), 4, 96)
    assert len({stage.data_ptr() for stage in stages}) == 6
    for stage in stages:
        assert stage.is_contiguous() and bool(stage.isnan().all())
        assert bool((stage.view(torch.int32) == NOT_WRITTEN).all())


def test_what_was_not_written_is_told_from_a_nan_that_was_computed():
    """A kernel's own NaN in a page that it might have skipped stays, so that it is found."""
    problem = TWO_TILES.with_(seqlen_q=50)
    buffers = TraceBuffers.make(problem, 16, 1, CPU)
    buffers.row_max[0, 0, 3, 5] = math.nan
    out, lse = torch.zeros(2, 4, 50, 64), torch.zeros(2, 4, 50)
    trace = buffers.trace(problem, 16, out, lse)
    assert torch.isnan(trace.row_max[0, 0, 3, 5]) and torch.isnan(trace.row_max[0, 0, 2, 40])
    assert trace.rescale[0, 0, 3, 5] == 1 and trace.scores[0, 0, 5, 48] == -math.inf and trace.probs[0, 0, 5, 48] == 0
    assert trace.out is out and trace.lse is lse and trace.page_size == 16


def test_a_skipped_page_carries_over_and_the_first_one_begins_with_nothing():
    """Rows 0 to 19 of 70 see none of the 50 keys; row 20 sees key 0, and so no page but the first."""
    buffers = TraceBuffers.make(TWO_TILES, 16, 32, CPU)
    for stage, value in ((buffers.row_max, 3.0), (buffers.row_sum, 2.0), (buffers.accum, 7.0), (buffers.rescale, 0.0)):
        stage[:, :, 0, 20] = value
    trace = buffers.trace(TWO_TILES, 16, torch.zeros(2, 4, 70, 64), torch.zeros(2, 4, 70))
    assert trace.accum.shape == (2, 4, 4, 70, 64), "rows that fill up a tile are left out"
    for stage, carried, empty in (("row_max", 3.0, -math.inf), ("row_sum", 2.0, 0.0), ("accum", 7.0, 0.0)):
        assert bool((getattr(trace, stage)[:, :, :, 20] == carried).all())
        assert bool((getattr(trace, stage)[:, :, :, :20] == empty).all())
    assert bool((trace.rescale[:, :, 1:, 20] == 1).all()) and bool((trace.rescale[:, :, :, :20] == 1).all())
    assert bool(trace.row_max[:, :, 0, 21:].isnan().all()), "a page that is seen and was not written"


def test_without_a_mask_no_page_may_be_skipped():
    problem = TWO_TILES.with_(causal=False)
    trace = TraceBuffers.make(problem, 16, 32, CPU).trace(problem, 16, torch.zeros(1), torch.zeros(1))
    for stage in ("scores", "row_max", "rescale", "probs", "row_sum", "accum"):
        assert bool(getattr(trace, stage).isnan().all())
