"""Results that vary, and elements that nobody wrote."""

from __future__ import annotations

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


def test_rows_and_an_lse_that_nobody_wrote():
    words = memory.unwritten(inquiry_of(zoo.last_rows_not_written, PROBLEM.with_(seqlen_q=70)))
    assert words.startswith("1536 elements of the output come from memory that was never written: rows 64 to 69")
    assert memory.unwritten(inquiry_of(zoo.two_pass)) is None

    def half_an_lse(q, k, v, return_lse=True):
        out, right = zoo.with_lse(q, k, v, return_lse=True)
        lse = torch.empty_like(right)
        lse[:, :, :20] = right[:, :, :20]
        return out, lse

    inquiry = inquiry_of(half_an_lse, lse="natural")
    assert "elements of lse come from memory that was never written: rows 20 to 39" in memory.unwritten(inquiry)
    assert inquiry.found[0].stages == ("lse",)


def test_memory_is_full_of_nan_only_inside():
    with memory.full_of_nan():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
