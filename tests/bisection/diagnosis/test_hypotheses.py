"""Places and ranges in words, and a behaviour that a hypothesis changes."""

from __future__ import annotations

import torch

from flashcore.bisection.diagnosis.behaviour import RIGHT
from flashcore.bisection.diagnosis.hypotheses import Hypothesis, first_of, head_of, place_of, ranges, under
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=5, seqlen_k=7, head_dim=16)


def test_ranges_of_a_sorted_list():
    assert ranges([3]) == "3" and ranges([0, 1, 2, 5]) == "0 to 2 and 5"
    assert ranges([0, 2, 4, 6, 8, 10]) == "0 and 2 and 4 and 6 and 2 more ranges"


def test_the_first_of_some_places():
    wrong = torch.zeros(2, 4, 5, 7, dtype=torch.bool)
    wrong[1, 2, 3, 4] = wrong[1, 3, 0, 0] = True
    place = {"batch": 1, "head": 2, "row": 3, "column": 4}
    assert first_of(wrong) == place == place_of(wrong.flatten(0, 1), PROBLEM)
    assert first_of(wrong.any(dim=-1)) == {"batch": 1, "head": 2, "row": 3}
    assert head_of(6, PROBLEM) == {"batch": 1, "head": 2}
    assert place_of(torch.zeros(8, 5, 7), PROBLEM) == {"batch": 0, "head": 0, "row": 0, "column": 0}


def test_hypotheses_change_a_behaviour_one_after_another():
    table = torch.arange(8)
    found = [Hypothesis("a", "", ("scores",), {"scale_factor": 2.0, "q_heads": table}),
             Hypothesis("b", "", ("scores",), {"scale_factor": 3.0})]  # fmt: skip
    made = under(RIGHT, found, "meta")
    assert made.scale_factor == 3.0 and made.q_heads.device.type == "meta"
    assert under(RIGHT, [], "cpu") == RIGHT and RIGHT.scale_factor == 1.0
