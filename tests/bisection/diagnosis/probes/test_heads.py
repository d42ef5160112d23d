"""Tables of heads get a name and a rule, and heads of the output are told from heads of the inputs."""

from __future__ import annotations

import pytest
import torch
from support import wrong_attention as zoo
from support.inquiries import inquiry_of

from flashcore.bisection.diagnosis.probes import heads
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=40, seqlen_k=100, head_dim=64)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], None),
        ([0, 1, 0, 1, 2, 3, 2, 3], "by remainder"),
        ([0, 0, 0, 0, 2, 2, 2, 2], "head 0 is taken for all heads"),
        ([0, 0, 1, 1, 0, 0, 1, 1], "batch 0 is taken for all batches"),
        ([2, 2, 3, 3, 0, 0, 1, 1], "batches are counted backwards"),
        ([0, 0, 1, 1, 2, 2, 3, 2], "reads K of batch 1, head 0 where batch 1, head 1 is meant"),
    ],
)
def test_heads(table, words):
    found = heads.of_heads("K", torch.tensor(table), PROBLEM)
    assert (found is None) if words is None else (words in found.sentence and found.stages == ("scores",))


def test_heads_of_the_output_are_told_from_heads_of_the_inputs():
    back = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])
    own = torch.tensor(heads.right_heads("K", PROBLEM))
    marks = {"Q": back, "K": own[back], "V": own[back]}
    assert heads.of_output(marks, PROBLEM).stages == ("out",)
    assert heads.of_output({**marks, "V": own}, PROBLEM) is None
    assert heads.of_output({**marks, "V": None}, PROBLEM) is None


def test_marks_show_which_heads_are_read():
    for function, named in (
        (zoo.heads_by_remainder, ["K of another head", "V of another head"]),
        (zoo.heads_of_v_shifted, ["V of another head"]),
        (zoo.heads_written_backwards, ["result of another head"]),
        (zoo.two_pass, []),
    ):
        inquiry = inquiry_of(function)
        heads.marks(inquiry)
        assert [h.name for h in inquiry.found] == named
