"""What attention over pages has to give: two references that agree, and bounds that let rounding through alone."""

from __future__ import annotations

import pytest
import torch

from flashcore.paging import AllPages, gather, paged_reference
from flashcore.surveys.paging.expected import by_positions, expect, same_precision
from flashcore.surveys.paging.matrix import POLICIES, PagedCase, make


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("causal", [True, False])
def test_two_references_that_share_no_line_agree(policy, causal):
    case = PagedCase("random", (130, 3, 0, 64), page_size=32, q_tokens=5, policy=policy, causal=causal, dropped=(1,))
    q, cache = make(case, "cpu")
    selection = POLICIES[policy].select(q, cache) if POLICIES[policy] else None
    for mine, theirs in zip(by_positions(q, cache, selection, causal=causal),
                            paged_reference(q, cache, selection, causal=causal), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_bounds_let_rounding_through_and_nothing_more():
    q, cache = make(PagedCase("random", (200, 7), page_size=16, q_tokens=2), "cpu")
    wanted = expect(q, cache, AllPages().select(q, cache))
    out, lse = paged_reference(q, cache)
    assert wanted.judge(out.to(q.dtype), lse.float())[0].passed
    off = out.to(q.dtype)
    off[1, 3, 1, 5] += 0.05
    judged, reason = wanted.judge(off, lse.float())
    assert judged.first_bad["head"] == 3 and "batch 1, head 3, row 1, column 5" in reason
    assert not wanted.judge(out.to(q.dtype), lse.float() + 0.01)[0].passed
    assert "expected torch.float16" in wanted.judge(out, None)[1]


def case(**changes):
    return make(PagedCase("random", (100, 7), page_size=16, **changes), "cpu")


def right(q, cache):
    out, lse = paged_reference(q, cache)
    return out.to(q.dtype), lse.float()


def test_a_result_of_another_shape_or_dtype_is_wrong_whatever_it_holds():
    q, cache = case()
    wanted, (out, lse) = expect(q, cache), right(q, cache)
    for got, words in (
        ((out.float(), lse), "out is torch.float32"), ((out[:1], lse), r"out is torch.float16 [1, 4, 1, 64]"),
        ((out, lse.double()), "lse is torch.float64"), ((out, lse[..., None]), "lse is torch.float32 [2, 4, 1, 1]"),
    ):  # fmt: skip
        judged, reason = wanted.judge(*got)
        assert not judged.passed and judged.checked == 0 and words in reason
    assert wanted.judge(out, None)[0].passed, "a backend may return no lse"


def test_nan_never_passes_and_a_wrong_lse_is_named():
    q, cache = case()
    wanted, (out, lse) = expect(q, cache), right(q, cache)
    assert wanted.judge(out, lse)[1] is None
    out[1, 2, 0, 3] = torch.nan
    judged, reason = wanted.judge(out, lse)
    assert judged.num_nan == 1 and reason.startswith("out: 1 of 512") and "head 2" in reason
    out, lse = right(q, cache)
    lse[0, 1, 0] = torch.inf
    judged, reason = wanted.judge(out, lse)
    assert not judged.passed and reason.startswith("lse: 1 of 8")


def test_stored_scores_are_given_more_room():
    q, cache = case(dtype="bfloat16", head_dim=128)
    plain, stored = (expect(q, cache, round_scores=r) for r in (False, True))
    assert stored.out_atol > plain.out_atol and stored.lse_atol > 2 * plain.lse_atol
    assert torch.equal(plain.out, stored.out) and torch.equal(plain.lse, stored.lse)


def test_results_worked_out_otherwise_are_taken_as_they_are():
    q, cache = case()
    out, lse = paged_reference(q, cache)
    given = expect(q, cache, exact=(out + 0.5, lse))
    assert torch.equal(given.out, out + 0.5) and given.out_atol > 0.9, "the bound covers what it is off by"


def test_the_same_precision_is_near_and_sees_what_lies_in_the_pages():
    q, cache = case(q_tokens=3)
    out, lse, longest, largest = same_precision(q, cache, None, causal=True, round_scores=False)
    exact_out, exact_lse = paged_reference(q, cache)
    assert out.dtype == q.dtype and 0 < float((out - exact_out).abs().max()) < 4e-3
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)
    gathered = [gather(cache, row) for row in range(2)]
    assert longest == pytest.approx(max(float(k.float().norm(dim=-1).max()) for k, _, _ in gathered))
    assert largest == pytest.approx(max(float(v.float().abs().max()) for _, v, _ in gathered))


def test_queries_that_see_no_key_give_zero_and_minus_infinity():
    """More queries than tokens: the first ones lie before the sequence's first position."""
    q, cache = make(PagedCase("random", (3, 40), page_size=16, q_tokens=5), "cpu")
    for out, lse in (by_positions(q, cache, None, causal=True), paged_reference(q, cache)):
        assert (out[0, :, :2] == 0).all() and (lse[0, :, :2] == -torch.inf).all() and lse[0, :, 2:].isfinite().all()
        assert lse[1].isfinite().all()
