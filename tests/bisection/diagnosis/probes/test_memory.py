"""Results that vary, and elements that nobody wrote."""

from __future__ import annotations

import math

import torch
from support import wrong_attention as zoo
from support.inquiries import PROBLEM, inquiry_of

from flashcore.bisection.diagnosis.probes import memory


def test_a_race_is_placed_and_ends_the_search_for_rules():
    inquiry = inquiry_of(zoo.a_race)
    assert "other results each time" in memory.repeats(inquiry)
    assert inquiry.varies and set(inquiry.suspicions[0].place) == {"batch", "head", "row", "column"}
    steady = inquiry_of(zoo.scaled_twice)
    assert memory.repeats(steady) is None and not steady.varies


def left_by_others(like):
    """Memory that nobody wrote: of NaN where a probe fills it, and of 0.5 otherwise, where it may hold anything."""
    found = torch.empty_like(like)
    return found if bool(found.isnan().all()) else found.fill_(0.5)


def test_rows_and_an_lse_that_nobody_wrote():
    unfilled = []
    """Outputs of calls whose memory no probe filled."""

    def last_rows_left(q, k, v):
        out = left_by_others(q)
        if not bool(out.isnan().any()):
            unfilled.append(out)
            if len(unfilled) == 1:
                out[0, 0, 66, :3] = math.nan  # as others may have left one there
        out[:, :, :64] = zoo.two_pass(q, k, v)[:, :, :64]
        return out

    inquiry = inquiry_of(last_rows_left, PROBLEM.with_(seqlen_q=70))
    unfilled.clear()
    words = memory.unwritten(inquiry)
    assert words.startswith("1536 elements of the output come from memory that was never written: rows 64 to 69")
    assert [int(out.isnan().sum()) for out in unfilled] == [3, 0]
    assert memory.unwritten(inquiry_of(zoo.two_pass)) is None

    def half_an_lse(q, k, v, return_lse=True):
        out, right = zoo.with_lse(q, k, v, return_lse=True)
        lse = left_by_others(right)
        lse[:, :, :20] = right[:, :, :20]
        return out, lse

    inquiry = inquiry_of(half_an_lse, lse="natural")
    assert "elements of lse come from memory that was never written: rows 20 to 39" in memory.unwritten(inquiry)
    assert inquiry.found[0].stages == ("lse",)


def test_memory_is_full_of_nan_only_inside():
    with memory.full_of_nan():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
