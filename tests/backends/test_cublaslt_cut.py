"""How the cuBLASLt backends cut their work: every head and page once, and no page for rows that see none of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flashcore.backends._cublaslt_cut import Span, Workspace
from flashcore.backends.cublaslt import CublasLt, CublasLtBatched, CublasLtLoop
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.problem import PRESETS, Problem, square

GROUPED = Problem(batch=3, num_heads_q=8, num_heads_kv=4, seqlen_q=32, seqlen_k=48, head_dim=64)


class Fixed(CublasLt):
    """Three query heads at a time, so that no GPU has to be asked for its L2 cache."""

    id = "fixed"
    heads_at_once = 6


def heads_of(backend, problem, layout):
    q, k, v = make_inputs(problem, layout=layout)
    found = []
    for span in backend.spans(problem, q, k, v, 64):
        first, count = backend.heads_of(span, problem)
        found += range(first, first + count)
    return found


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("backend", [Fixed(), CublasLtBatched(), CublasLtLoop()])
@pytest.mark.parametrize("problem", [GROUPED, square(1, 3, 16, 64), square(2, 4, 16, 64)])
def test_every_head_is_in_one_group_whatever_the_memory_order(backend, problem, layout):
    assert sorted(heads_of(backend, problem, layout)) == list(range(problem.batch * problem.num_heads_q))


def test_a_group_of_bshd_views_stays_inside_one_sequence():
    """Their heads are not at equal distances across sequences, so no strided batch covers two of them."""
    q, k, v = make_inputs(GROUPED, layout="bshd")
    assert [s.batch for s in CublasLtBatched().spans(GROUPED, q, k, v, 64)] == [0, 1, 2]
    q, k, v = make_inputs(GROUPED, layout="bhsd")
    assert len(list(CublasLtBatched().spans(GROUPED, q, k, v, 64))) == 1


def test_the_loop_takes_the_problems_page_and_one_head_at_a_time():
    assert CublasLtLoop().page_size(PRESETS["report"]) == 128
    assert CublasLtLoop().group_of(PRESETS["report"], torch.device("cpu"), 128) == 1
    assert CublasLtBatched().page_size(PRESETS["report"]) == 2048
    assert CublasLtBatched().page_size(square(1, 1, 333, 64)) == 336, "short rows: one page, a multiple of 16 bytes"
    assert CublasLtBatched().page_size(square(1, 1, 100_000, 64)) == 2048, "a row of a page fits a warp's registers"


SEES = [
    ((64, 64), 0, 0),
    ((64, 64), 32, 32),
    ((64, 96), 32, 0),
    ((64, 96), 64, 32),
    ((96, 64), 0, 32),
    ((16, 64), 63, 15),
]
"""(seqlen_q, seqlen_k), the page's first key, the first row that sees it."""


@pytest.mark.parametrize(("lengths", "key", "row"), SEES)
def test_the_first_row_of_a_page_is_the_first_that_sees_it(lengths, key, row):
    problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim=64)
    assert CublasLt().first_row(problem, key) == 0
    causal = problem.with_(causal=True)
    assert CublasLt().first_row(causal, key) == row
    visible = [min(causal.seqlen_k, max(0, r + 1 + causal.seqlen_k - causal.seqlen_q)) for r in range(causal.seqlen_q)]
    assert row == next((r for r, keys in enumerate(visible) if keys > key), causal.seqlen_q)


def test_what_sixteen_bits_cost_is_said():
    assert CublasLt.rounds_scores and CublasLtBatched.rounds_scores and not CublasLtLoop.rounds_scores
    assert CublasLt().scores_type(square(1, 1, 8, 64, dtype="bfloat16")) == "bfloat16"
    assert CublasLtLoop().scores_type(square(1, 1, 8, 64)) == "float32"


def workspace() -> Workspace:
    rows = torch.empty(1)
    return Workspace(rows, rows, rows, rows, rows, 8)


def test_two_lanes_never_share_an_algorithms_room():
    """Products of two lanes run at the same time, on streams that the allocator knows nothing of."""
    first, second = workspace(), workspace()
    assert first.room(0) == 0 and first.rooms == []
    kept = first.room(1000)
    assert first.room(500) == kept and first.room(1000) == kept, "one after the other, products share it"
    assert second.room(1000) != kept
    larger = first.room(5000)
    assert larger != kept and [t.numel() for t in first.rooms] == [1000, 5000], "what is in use is not given back"


# ------------------------------------------------------------------------------------------------ by hand


@pytest.fixture
def l2(monkeypatch):
    """A GPU with 50 MB of L2 cache."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50_000_000)
    )  # fmt: skip


def test_a_group_keeps_its_scores_in_its_lanes_share_of_l2(l2):
    """2048 rows of 1024 scores in 16 bits are 4 MiB a head; 0.55 of 50 MB is shared by two lanes."""
    backend, cuda = CublasLt(), torch.device("cuda", 0)
    assert backend.group_of(square(16, 16, 2048, 64), cuda, 1024) == 3 == int(0.55 * 50e6 / 2 / (2048 * 1024 * 2))
    grouped = Problem(batch=16, num_heads_q=16, num_heads_kv=8, seqlen_q=2048, seqlen_k=2048, head_dim=64)
    assert backend.group_of(grouped, cuda, 1024) == 1, "a K/V head brings two query heads"
    assert backend.group_of(square(1, 2, 2048, 64), cuda, 1024) == 2, "no more than there are"
    assert backend.group_of(square(1, 2, 100_000, 64), cuda, 1024) == 1, "one at least, though it does not fit"
    backend.wide_scores = True
    assert backend.group_of(square(16, 16, 2048, 64), cuda, 1024) == 1, "float32 scores, and probs beside them"


@pytest.mark.parametrize(("keys", "page", "pages"), [(1, 8, 1), (1000, 1000, 1), (1024, 1024, 1), (1025, 1024, 2)])
def test_pages_hold_all_keys_and_start_at_16_bytes(keys, page, pages):
    problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=4, seqlen_k=keys, head_dim=64)
    backend = CublasLt()
    assert backend.page_size(problem) == page and backend.num_pages(problem, page) == pages
    assert page % 8 == 0 and (pages - 1) * page < keys <= pages * page


def test_query_heads_of_a_span_by_hand():
    """Two sequences of four K/V heads, each shared by two query heads: heads 8 to 15 are the second sequence's."""
    span = Span(batch=1, head_kv=1, count=2)
    backend = CublasLt()
    assert backend.heads_of(span, GROUPED) == (8 + 2, 4)
    assert [backend.queries_of(span, member, GROUPED) for member in (0, 1)] == [(2, 2), (3, 2)]
    across = Span(batch=0, head_kv=3, count=4)
    assert backend.heads_of(across, GROUPED) == (6, 8), "from one sequence into the next, where memory is regular"


def test_a_workspace_has_rows_at_16_bytes_and_probs_of_their_own_only_beside_wide_scores():
    problem = GROUPED.with_(dtype="bfloat16")
    with poisoned_outputs():
        narrow = Fixed().workspace(problem, torch.device("cpu"), 45)
        wide = CublasLtLoop().workspace(problem, torch.device("cpu"), 45)
    assert narrow.row_stride == 48 and narrow.scores.shape == (6, 32, 48) and narrow.scores.dtype == torch.bfloat16
    assert narrow.probs is narrow.scores and narrow.accum.shape == (6, 32, 64)
    assert wide.scores.dtype == torch.float32 and wide.probs.dtype == torch.bfloat16
    assert wide.probs.data_ptr() != wide.scores.data_ptr() and wide.scores.shape == (2, 32, 48)
    for work in (narrow, wide):
        for tensor in (work.scores, work.probs, work.row_max, work.row_sum, work.accum):
            assert bool(tensor.isnan().all()), "what is never written has to show"
        assert work.row_max.shape == work.row_sum.shape == work.scores.shape[:2]


def test_scores_are_stored_with_the_scale_in_them():
    assert CublasLt().alpha(square(1, 1, 8, 64)) == 0.125
    assert CublasLt().alpha(square(1, 1, 8, 64, softmax_scale=-2.0)) == -2.0
