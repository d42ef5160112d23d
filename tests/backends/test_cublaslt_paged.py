"""Backend `cublaslt-paged`: right over pages in any order, page for page as a trace shows, and what it does not take.

Its products and its softmax are emulated (`support.emulated_cublaslt`): the host side runs here as it does on a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.emulated_cublaslt import Emulated
from support.paged_tables import cache_of, queries

from flashcore import backends
from flashcore.backends._page_tables import Page
from flashcore.backends.cublaslt_paged import CublasLtPaged, _as_one
from flashcore.bisection.bisecting import bisect
from flashcore.errors import PageTableError
from flashcore.measure.check import check_attention
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PagedKV, paged_reference
from flashcore.problem import Problem, square

pytestmark = pytest.mark.usefixtures("emulated")


class Paged(Emulated, CublasLtPaged):
    """On the CPU."""


DENSE = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=30, seqlen_k=150, head_dim=64, page_size=64)


def assert_right(q, cache, causal):
    problem = paged_problem_of(q, cache, causal)
    with poisoned_outputs():
        out, lse = Paged().run_paged(q, cache, problem)
    expected, expected_lse = paged_reference(q, cache, causal=causal)
    assert torch.allclose(out.double(), expected, atol=4e-3)
    assert torch.allclose(lse.double(), expected_lse, atol=4e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("tokens", [1, 20])
def test_every_sequence_is_right_whatever_its_length(causal, page_size, tokens):
    """NaN lies past every length, and traps past every row of the table: nothing may be read there."""
    cache = cache_of((1, 17, 64, 200), 2, 64, page_size, torch.float16, "cpu")
    assert_right(queries(cache, 4, tokens), cache, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_a_page_that_was_dropped_is_skipped_and_the_others_keep_their_positions(causal):
    cache = cache_of((300, 17), 2, 64, 64, torch.float16, "cpu", drop=True)
    assert bool((cache.page_table[0] == -1).any())
    assert_right(queries(cache, 4, 3), cache, causal)


def test_an_empty_sequence_gives_zero_and_minus_infinity():
    cache = cache_of((20, 0), 2, 64, 16, torch.float16, "cpu")
    q = queries(cache, 4, 2)
    with poisoned_outputs():
        out, lse = Paged().run_paged(q, cache, paged_problem_of(q, cache))
    assert bool((out[1] == 0).all()) and bool((lse[1] == -math.inf).all()) and bool(lse[0].isfinite().all())


@pytest.mark.parametrize("causal", [False, True])
def test_dense_keys_are_copied_into_pages_first_and_every_stage_is_right(causal):
    problem = DENSE.with_(causal=causal)
    checked = check_attention(Paged(), problem, device="cpu")
    assert checked.status == "ok", checked.reason
    found = bisect(Paged(), problem, device="cpu")
    assert found.passed, found.finding()
    assert (found.coverage["page_size"], found.coverage["pages"]) == (64, 3), "pages of the problem, one a step"


def test_a_table_given_with_dense_keys_is_read_as_cublaslt_reads_it():
    q, k, v = make_inputs(DENSE)
    out, lse = Paged().run(q, k, v, DENSE, page_table=[2, 0])
    keys = torch.cat([torch.arange(128, 150), torch.arange(64)])
    scores = q.double() @ k[:, :, keys].double().repeat_interleave(2, dim=1).mT * DENSE.scale
    expected = scores.softmax(-1) @ v[:, :, keys].double().repeat_interleave(2, dim=1)
    assert torch.allclose(out.double(), expected, atol=4e-3)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=4e-3)
    trace = Paged().trace(q, k, v, DENSE, page_table=[0, 2])
    assert trace.scores.shape[-1] == 64 + 22


def test_pages_are_given_by_the_row_of_the_pool_and_the_position_of_their_first_key():
    cache = cache_of((100, 17), 2, 64, 32, torch.float16, "cpu")
    cache.page_table[0, 1] = -1
    problem = paged_problem_of(queries(cache, 4, 1), cache)
    (long, pages), (short, others) = Paged()._sequences(cache, problem, 32, 64)
    assert (long.batch, long.seqlen_k, short.batch, short.seqlen_k) == (1, 100, 1, 17)
    first, _, third, last = cache.page_table[0, :4].tolist()
    assert pages == [
        Page(32 * first, 32, 0, 64 * first), Page(32 * third, 32, 64, 64 * third), Page(32 * last, 4, 96, 64 * last),
    ]  # fmt: skip
    other = int(cache.page_table[1, 0])
    assert others == [Page(32 * other, 17, 0, 64 * other)]


def test_rows_of_a_pool_that_lie_apart_are_reached_where_they_are():
    """A pool whose K and V share memory: each page's rows are twice as far apart as they are wide."""
    cache = cache_of((100, 40), 2, 64, 32, torch.float16, "cpu")
    both = torch.cat([cache.k_pool, cache.v_pool], dim=-1)
    k_pool, v_pool = both[..., :64], both[..., 64:]
    shared = PagedKV.from_tables(k_pool, v_pool, cache.page_table, cache.lengths)
    q = queries(cache, 4, 2)
    assert_right(q, shared, True)


def by_tokens(pool):
    """The same pool, whose pages hold all heads of a token side by side."""
    return pool.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("of_k", [by_tokens, torch.clone])
def test_pools_of_k_and_v_may_lie_in_different_orders(of_k):
    """From page to page there are as many rows as tokens in one order, and heads times as many in the other."""
    of_v = torch.clone if of_k is by_tokens else by_tokens
    cache = cache_of((100, 40, 64), 2, 64, 32, torch.float16, "cpu")
    apart = PagedKV.from_tables(of_k(cache.k_pool), of_v(cache.v_pool), cache.page_table, cache.lengths)
    assert _as_one(apart.k_pool)[1] != _as_one(apart.v_pool)[1]
    assert_right(queries(cache, 4, 2), apart, True)


def at_an_odd_place(pool):
    return torch.empty(pool.numel() + 1, dtype=pool.dtype)[1:].view(pool.shape).copy_(pool)


@pytest.mark.parametrize("page_last", range(5))
def test_a_pool_that_cublaslt_cannot_take_is_copied_whole(page_last):
    """The rows of the last page too, whichever sequence it belongs to."""
    cache = cache_of((40, 30), 2, 64, 32, torch.float16, "cpu")
    turned = cache.page_table.where(cache.page_table > 100, (cache.page_table + page_last) % cache.num_pages)
    pools = (at_an_odd_place(pool.roll(page_last, 0)) for pool in (cache.k_pool, cache.v_pool))
    assert_right(queries(cache, 4, 2), PagedKV.from_tables(*pools, turned, cache.lengths), True)


def test_pages_whose_tokens_are_one_row_expanded():
    cache = cache_of((40, 30), 2, 64, 32, torch.float16, "cpu")
    row = torch.randn(cache.num_pages, 2, 1, 64, dtype=torch.float16).expand(cache.k_pool.shape)
    assert_right(queries(cache, 4, 2), PagedKV.from_tables(row, row, cache.page_table, cache.lengths), False)


def test_pages_at_a_distance_that_is_no_whole_number_of_rows_are_an_error():
    room = torch.zeros(3 * (2 * 16 * 64 + 8), dtype=torch.float16)
    pool = room.as_strided((3, 2, 16, 64), (2 * 16 * 64 + 8, 16 * 64, 64, 1))
    lengths = torch.tensor([10], dtype=torch.int32)
    cache = PagedKV.from_tables(pool, pool, torch.zeros(1, 1, dtype=torch.int32), lengths)
    q = queries(cache, 2, 1)
    with pytest.raises(PageTableError, match="pages of this pool lie 2056 elements apart, no multiple of its rows' 64"):
        Paged().run_paged(q, cache, paged_problem_of(q, cache))


def test_what_it_does_not_take():
    backend = backends.get("cublaslt-paged")
    problem = square(1, 2, 64, 64, page_size=64)
    assert backend.why_not(problem) is None and backend.why_not_paged(problem) is None
    assert backend.why_not(problem.with_(page_size=48)).startswith("page_size 48 is not among 16, ")
    assert backend.why_not_paged(problem, selected=True) == "it attends to all pages and takes no selection"
    assert backend.why_not_paged(problem.with_(head_dim=32)) == "head_dim 32 is not among 64, 128"
    assert (backend.variant_of, backend.dense, backend.swept, backend.lanes) == ("cublaslt", False, False, 1)


def test_it_is_cublaslt_over_pages_and_is_not_timed_on_dense_tensors():
    paged, dense = backends.get("cublaslt-paged"), backends.get("cublaslt")
    assert paged.kernel == dense.kernel and paged.paged and not paged.dense and not dense.paged
    assert paged.rounds_scores and paged.traceable, "its stages are those of cublaslt, 16-bit scores among them"


def test_it_takes_what_cublaslt_takes_and_no_selection_of_pages():
    paged = backends.get("cublaslt-paged")
    assert paged.why_not_paged(square(1, 2, 256, 64)) is None
    assert "float32" in paged.why_not(square(1, 2, 256, 64, dtype="float32"))
    assert paged.why_not_paged(square(1, 2, 256, 64), selected=True)
