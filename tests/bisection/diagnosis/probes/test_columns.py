"""Columns and rows of the output, and what rows add up to."""

from __future__ import annotations

import pytest
import torch
from support import wrong_attention as zoo
from support.inquiries import inquiry_of

from flashcore.bisection.diagnosis.probes import columns
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=40, seqlen_k=100, head_dim=64)
ROW = torch.arange(1, 65).double()
SEEN = torch.ones(40, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda got: got * 1.1, "the output is 1.1 times what it should be"),
        (lambda got: got.roll(1, -1), "column 0 holds column 63"),
        (lambda got: got * (torch.arange(64) < 56), "columns 56 to 63 of the output are 0"),
        (lambda got: got * (torch.arange(40)[:, None] < 38), "rows 38 to 39 of the output are 0"),
        (lambda got: got * (torch.arange(8)[:, None, None] < 6), "the results of 2 of 8 heads are 0"),
    ],
)
def test_columns_of_the_output(change, words):
    got = ROW.expand(8, 40, 64)
    assert columns.of_columns(got, ROW, SEEN, PROBLEM) == []
    assert words in "; ".join(h.sentence for h in columns.of_columns(change(got), ROW, SEEN, PROBLEM))


def test_rows_that_add_up_to_another_number_are_no_matter_of_columns():
    got = ROW * torch.linspace(0.5, 1.0, 40)[:, None].double()
    assert columns.of_columns(got.expand(8, 40, 64), ROW, SEEN, PROBLEM) == []
    added = torch.zeros(8, 40, 64).double()
    assert columns.of_nothing(added, PROBLEM) is None
    added[5, 7, 9] = 0.5
    found = columns.of_nothing(added, PROBLEM)
    assert "0.5 stands at batch 1, head 1, row 7, column 9" in found.sentence


def test_values_that_are_all_alike_show_what_rows_add_up_to():
    for function, named in (
        (zoo.a_large_epsilon, ["a constant in row_sum"]),
        (zoo.last_columns_left, ["columns left 0"]),
        (zoo.one_element, ["a number added to the output"]),
        (zoo.scaled_twice, []),
    ):
        inquiry = inquiry_of(function)
        columns.equal_values(inquiry)
        assert [h.name for h in inquiry.found] == named


def test_an_output_that_is_not_the_sum_of_v_is_placed():
    def squared(q, k, v):
        return zoo.two_pass(q, k, v.float() ** 2).to(q.dtype)

    inquiry = inquiry_of(squared)
    assert "not the sum of V by the weights that were read" in columns.linear(inquiry)
    assert inquiry.suspicions[0].stages == ("accum",) and set(inquiry.suspicions[0].place) > {"row", "column"}


def test_heads_whose_output_is_another_size():
    def scaled(q, k, v):
        out = zoo.two_pass(q, k, v)
        out[1, 3] *= 1.5
        return out

    inquiry = inquiry_of(scaled)
    assert "the output of 1 of 8 heads is multiplied" in columns.equal_values(inquiry)
    assert inquiry.found[0].place == {"batch": 1, "head": 3} and not inquiry.unexplained()
    assert "by 1.5" in inquiry.found[0].sentence and inquiry.state.tells_heads_apart
