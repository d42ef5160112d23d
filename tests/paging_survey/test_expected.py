"""What attention over pages has to give: two references that agree, and bounds that let rounding through alone."""

from __future__ import annotations

import pytest
import torch

from flashcore.paging import AllPages, paged_reference
from flashcore.paging_survey.expected import by_positions, expect
from flashcore.paging_survey.matrix import POLICIES, PagedCase, make


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
