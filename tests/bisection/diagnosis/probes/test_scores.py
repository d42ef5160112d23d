"""Scores beside those of keys that are known: one factor, one order, one maximum a lane, or nothing that has a name."""

from __future__ import annotations

import pytest
from support import wrong_attention as zoo
from support.inquiries import PROBLEM, inquiry_of

from flashcore.bisection.diagnosis.probes import scores


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (zoo.base_two, "base 2 for e"), (zoo.rows_shifted, "Q of another row"),
        (zoo.last_rows_of_tiles_doubled, "Q of another row"),
        (zoo.k_pages_swapped, "pages swapped"), (zoo.four_lanes, "maximum not reduced over lanes"),
        (zoo.swizzled, "columns of head_dim in another order"), (zoo.last_head_not_scaled, "scale of some heads"),
    ],
)  # fmt: skip
def test_scores_are_named(function, name):
    inquiry = inquiry_of(function, PROBLEM.with_(seqlen_q=70, seqlen_k=150))
    assert scores.anchored(inquiry)
    assert [h.name for h in inquiry.found] == [name] and inquiry.suspicions == []


def test_right_scores_are_read_and_left_alone():
    inquiry = inquiry_of(zoo.two_pass)
    assert scores.anchored(inquiry) is None and inquiry.scores.factor == pytest.approx(1, abs=1e-3)


def test_scores_without_a_name_may_be_bent():
    inquiry = inquiry_of(zoo.roots_of_scores)
    assert scores.anchored(inquiry) and inquiry.found == []
    assert [inquiry.bendable] == inquiry.suspicions and inquiry.bendable.stages == ("scores", "probs")


def test_a_scale_beside_pages_that_are_swapped():
    inquiry = inquiry_of(zoo.scaled_twice_and_pages_swapped, PROBLEM.with_(seqlen_q=70, seqlen_k=150, head_dim=64))
    assert scores.anchored(inquiry)
    assert [h.name for h in inquiry.found] == ["scale twice", "pages swapped"] and not inquiry.unexplained()
