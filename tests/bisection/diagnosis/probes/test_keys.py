"""Weight that went to no key is named, and what hides behind a mask is found."""

from __future__ import annotations

import math

import pytest
import torch
from support import wrong_attention as zoo
from support.inquiries import CAUSAL, PROBLEM, inquiry_of

from flashcore.bisection.diagnosis.probes import keys


def test_weight_that_went_nowhere():
    assert keys.of_extra(torch.zeros(40), PROBLEM) is None
    assert keys.of_extra(torch.full((40,), 28.02), PROBLEM).name == "last partial page taken as whole"
    assert keys.of_extra(torch.full((40,), 1.0), PROBLEM).name == "keys that do not exist"
    assert keys.of_extra(torch.full((40,), 0.5), PROBLEM) is None
    assert keys.of_extra(torch.full((40,), math.inf), PROBLEM) is None


def test_what_hides_behind_a_mask_is_found_by_scores_below_it():
    inquiry = inquiry_of(zoo.masked_by_a_small_number, CAUSAL)
    assert "hidden keys get a score of -100 where -inf is meant" in keys.hidden(inquiry)
    assert inquiry.state.masked_score == -100.0
    assert keys.hidden(inquiry_of(zoo.two_pass, CAUSAL)) is None


def test_equal_keys_show_a_mask_keys_of_zeros_and_a_sum_that_is_not_divided_by():
    def said(function, problem=PROBLEM):
        inquiry = inquiry_of(function, problem)
        keys.equal_keys(inquiry)
        return [h.name for h in inquiry.found]

    assert said(zoo.one_key_too_many, CAUSAL) == ["diagonal off by one"]
    assert said(zoo.tail_padded) == ["last partial page taken as whole"]
    assert said(zoo.not_divided) == ["not normalised"]
    assert said(zoo.two_pass, CAUSAL) == said(zoo.scaled_twice) == []


@pytest.mark.parametrize(
    ("function", "words", "field", "value"),
    [
        (zoo.ten_thousand_subtracted, "-10000 is added to the scores of hidden keys", "masked_added", -1e4),
        (zoo.a_hundred_subtracted, "-100 is added to the scores of hidden keys", "masked_added", -100.0),
        (zoo.masked_by_a_small_number, "hidden keys get a score of -100 where", "masked_score", -100.0),
        (zoo.masked_before_the_scale, "(-1000 before the scale)", "masked_score", -1000 * CAUSAL.scale),
    ],
)
def test_what_is_set_is_told_from_what_is_added(function, words, field, value):
    inquiry = inquiry_of(function, CAUSAL)
    assert words in keys.hidden(inquiry)
    assert getattr(inquiry.state, field) == pytest.approx(value) and len(inquiry.found[0].changes) == 1


def test_weights_that_are_no_whole_multiples_are_a_suspicion_even_where_none_stands_out():
    inquiry = inquiry_of(zoo.two_pass)
    even = torch.ones(8, 40, 100, dtype=torch.float64)
    odd = even.clone()
    odd[3, 5, 7] = 1.5
    for counts, words in ((even, "0 of 32,000 keys"), (odd, "1 of 32,000 keys have another weight")):
        assert words in keys._unclear(inquiry, counts, even[0])
    assert inquiry.suspicions[1].place == {"batch": 0, "head": 3, "row": 5, "column": 7}
    assert "the first 1.5 times theirs" in inquiry.suspicions[1].sentence


def test_rows_without_keys_show_a_mask_that_nothing_else_does():
    wide = PROBLEM.with_(causal=True, seqlen_q=60, seqlen_k=40)

    def lowest(q, k, v, causal=False):
        return zoo._added(q, k, v, torch.finfo(torch.float32).min, causal)

    for function, words in ((lowest, "hold the mean of V where 0 is meant"), (zoo.ten_thousand_subtracted, "-10000")):
        inquiry = inquiry_of(function, wide)
        assert words in keys.hidden(inquiry)
        assert inquiry.unexplained() == []
    assert keys.hidden(inquiry_of(zoo.two_pass, wide)) is None
