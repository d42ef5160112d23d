"""Dense inputs go into pages among others, so that nothing which a paged kernel must look up is right by chance."""

from __future__ import annotations

import pytest
import torch

from flashcore.backends._paged import PagedBackend
from flashcore.backends.cublaslt_paged import _as_one
from flashcore.measure.check import check_attention
from flashcore.numerics.inputs import make_inputs
from flashcore.paged_ops import paged_attention
from flashcore.paging import PagedKV, PageSelection, TopK, among_others, gather, paged_reference, paginate
from flashcore.paging.paginate import _first_length
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=3, seqlen_k=200, head_dim=64, page_size=64,
                  causal=True)  # fmt: skip


class OnCpu(PagedBackend):
    """A paged backend on the CPU; `change` is what it makes of a cache before it reads it."""

    id = "paged-on-cpu"
    device = "cpu"
    masks = paged_masks = ("window", "softcap", "sink")

    def __init__(self, change=lambda cache: cache):
        self.change = change

    def availability(self):
        from flashcore.backends import AVAILABLE

        return AVAILABLE

    def source_hash(self, problem=None):
        return None

    def run_paged(self, q, cache, problem, selection=None, masks=None):
        out, lse = paged_reference(
            q, self.change(cache), selection, causal=problem.causal, window_left=problem.window_left,
            window_right=problem.window_right, softcap=problem.softcap, sink=masks.sink if problem.sink else None,
        )  # fmt: skip
        return out.to(q.dtype), lse.float()


def replaced(cache, **changes):
    names = ("k_pool", "v_pool", "page_table", "lengths")
    return PagedKV(*(changes.get(name, getattr(cache, name)) for name in names))


def first_length_for_all(cache):
    return replaced(cache, lengths=cache.lengths[:1].expand(cache.batch).contiguous())


def rows_by_columns(cache):
    return replaced(cache, page_table=cache.page_table.as_strided(cache.page_table.shape, (cache.max_pages, 1)))


def last_column_is_the_last_page(cache):
    return replaced(cache, lengths=torch.full_like(cache.lengths, cache.max_pages * cache.page_size))


def v_like_k(cache):
    return replaced(cache, v_pool=cache.v_pool.as_strided(cache.v_pool.shape, cache.k_pool.stride()))


@pytest.mark.parametrize("seqlen", [1, 2, 64, 65, 128, 129, 200])
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "apart"])
def test_a_right_backend_is_right(seqlen, page_size, layout):
    trial = check_attention(OnCpu(), PROBLEM.with_(seqlen_k=seqlen, page_size=page_size), layout=layout)
    assert trial.status == "ok", trial.reason


@pytest.mark.parametrize(
    "masks", [{"window_left": 63}, {"window_left": 90, "softcap": 2.0, "sink": True}, {"window_right": 1}]
)
def test_masks_of_dense_calls_reach_the_pages(masks):
    problem = PROBLEM.with_(causal="window_right" not in masks, **masks)
    trial = check_attention(OnCpu(), problem)
    assert trial.status == "ok", trial.reason
    wider = OnCpu()
    wider.run_paged = lambda q, cache, problem, *others, **more: OnCpu.run_paged(
        wider, q, cache, problem.with_(window_left=-1, window_right=-1), *others, **more
    )
    assert check_attention(wider, problem).status == "failed"


@pytest.mark.parametrize("change", [first_length_for_all, rows_by_columns, last_column_is_the_last_page, v_like_k])
def test_what_is_alike_by_chance_is_not(change):
    assert check_attention(OnCpu(change), PROBLEM).status == "failed"
    assert check_attention(OnCpu(change), PROBLEM.with_(batch=1)).status == "failed"


def test_what_goes_into_pages():
    q, k, v = make_inputs(PROBLEM, layout="bshd")
    q_more, cache, more = among_others(q, k, v, PROBLEM)
    assert more == PROBLEM.with_(batch=3) and cache.lengths.tolist() == [199, 200, 200]
    assert torch.equal(q_more[1:], q) and q_more.transpose(1, 2).is_contiguous()
    for row in range(2):
        found_k, found_v, present = gather(cache, row + 1)
        assert torch.equal(found_k, k[row]) and torch.equal(found_v, v[row]) and present.all()
    assert cache.k_pool.stride() != cache.v_pool.stride()
    assert cache.max_pages == 5 and cache.page_table.stride(0) > cache.max_pages
    spare = cache.page_table[:, -1].unique().tolist()
    assert len(spare) == 1 and cache.k_pool[spare[0]].isnan().all() and spare[0] not in cache.page_table[:, :4]
    cache.check()


@pytest.mark.parametrize("seqlen", range(1, 200, 7))
def test_the_first_sequence_ends_in_the_same_block_of_keys(seqlen):
    """A traced call of the decode kernel gives each head blocks of its own, as many as its units take."""
    q, k, v = make_inputs(PROBLEM.with_(seqlen_k=seqlen, head_dim=8))
    _, cache, _ = among_others(q, k, v, PROBLEM.with_(seqlen_k=seqlen, head_dim=8))
    first, others = cache.lengths.tolist()[:2]
    assert abs(first - others) == 1 and others == seqlen
    assert -(-first // 64) == -(-others // 64)


@pytest.mark.parametrize("even", [64, 128])
@pytest.mark.parametrize(("tokens", "left"), [(1, 0), (1, 63), (3, 61), (8, 100), (5, 300)])
def test_with_a_window_as_many_blocks_of_the_first_sequence_are_read(even, tokens, left):
    """Whatever the lengths; nearly always it is still a sequence of another length."""
    as_long = 0
    for seqlen in range(1, 700):
        problem = PROBLEM.with_(seqlen_q=tokens, seqlen_k=seqlen, window_left=left)
        first = _first_length(problem, even)
        blocks = [-(-n // even) - max(0, n - tokens - left) // even for n in (first, seqlen)]
        assert blocks[0] == blocks[1] and 0 < first and -(-first // even) <= -(-seqlen // even), seqlen
        as_long += first == seqlen
        assert abs(_first_length(problem, None) - seqlen) == 1, "where nothing is traced, one key more or less"
    assert as_long <= 1


def test_cublaslt_finds_the_pages_of_a_v_that_lies_in_another_order():
    _, cache, _ = among_others(*make_inputs(PROBLEM), PROBLEM)
    for pool in (cache.k_pool, cache.v_pool):
        rows, apart = _as_one(pool)
        for page in range(cache.num_pages):
            piece = rows[0, :, page * apart : page * apart + 1]
            assert torch.equal(piece.nan_to_num(), pool[page, :, :1].nan_to_num())
    assert _as_one(cache.k_pool)[1] != _as_one(cache.v_pool)[1]


def test_a_policy_looks_for_what_the_softmax_will_see():
    """Below zero the scale makes the highest products the lowest scores, so pages are sought the other way round."""
    _, k, v = make_inputs(PROBLEM.with_(seqlen_k=640), pattern="normal")
    cache = paginate(k, v, 64)
    cache.refresh_bounds()
    q = make_inputs(PROBLEM)[0][:, :, :1] * 4
    policy = TopK(pages=3)
    turned = policy.select(-q, cache)
    out = paged_attention(q, cache, policy=policy, softmax_scale=-0.5)
    assert torch.equal(out, paged_attention(q, cache, policy=turned, softmax_scale=-0.5))
    assert torch.equal(out, paged_attention(-q, cache, policy=policy, softmax_scale=0.5))
    assert not torch.equal(turned.pages, policy.select(q, cache).pages) and isinstance(turned, PageSelection)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("seqlen", [1, 65, 129, 200, 1000])
@pytest.mark.parametrize("name", ["decode", "decode-paired", "hopper-paged", "cublaslt-paged"])
def test_paged_backends_among_others(name, seqlen, page_size):
    from flashcore.bisection import bisect

    for head_dim in (64, 128):
        problem = PROBLEM.with_(seqlen_k=seqlen, page_size=page_size, head_dim=head_dim)
        trial = check_attention(name, problem)
        assert trial.status == "ok", trial.reason
        found = bisect(name, problem)
        assert found.passed, found.finding()


@pytest.mark.gpu
@pytest.mark.parametrize("masks", [
    {"causal": True, "window_left": 63}, {"causal": True, "window_left": 200, "softcap": 2.0, "sink": True},
    {"window_left": 130, "window_right": 1}, {"causal": True, "softcap": 30.0}, {"sink": True},
])  # fmt: skip
@pytest.mark.parametrize("seqlen", [5, 129, 256, 1000])
@pytest.mark.parametrize("name", ["decode", "decode-paired", "hopper-paged"])
def test_masked_backends_over_pages_are_right_stage_by_stage(name, seqlen, masks):
    from flashcore.bisection import bisect

    for head_dim, page_size in ((64, 16), (128, 256)):
        problem = PROBLEM.with_(**{"causal": False, **masks}, seqlen_k=seqlen, page_size=page_size, head_dim=head_dim)
        trial = check_attention(name, problem)
        assert trial.status == "ok", trial.reason
        found = bisect(name, problem)
        assert found.passed, found.finding()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["decode", "decode-paired", "hopper-paged", "cublaslt-paged", "reference"])
def test_pools_of_two_orders_on_the_gpu(backend):
    q, cache, problem = among_others(*make_inputs(PROBLEM, device="cuda"), PROBLEM)
    out = paged_attention(q, cache, backend=backend, causal=problem.causal)
    assert float((out.double() - paged_reference(q, cache)[0]).abs().max()) < 4e-3
