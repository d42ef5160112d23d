"""Wrong weights are placed, and the shape of what is wrong says which stage it is."""

from __future__ import annotations

import pytest
import torch
from support import wrong_attention as zoo
from support.inquiries import PROBLEM, inquiry_of

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import RIGHT
from flashcore.bisection.diagnosis.probes import weights


def right_weights():
    q, k = reading.anchored(PROBLEM, "cpu")
    return reading.simulated_weights(q, k, PROBLEM)


def by_page(found):
    found[:, :, 16:32] *= 1.5
    return found


def one_key(found):
    found[3, 7, 9] *= 2
    return found


@pytest.mark.parametrize(
    ("change", "stages", "words"),
    [
        (lambda found: found * 1.25, ("row_sum",), "do not add up to 1"),
        (lambda found: found.masked_fill(found < 0.01, 0.0), ("probs",), "of the largest of their row become 0"),
        (by_page, ("rescale", "probs", "accum"), "one factor a page"),
        (one_key, ("scores", "probs"), "1 of 32,000 as it should not be"),
    ],
)
def test_where_weights_go_wrong(change, stages, words):
    inquiry = inquiry_of(zoo.two_pass)
    wanted = right_weights()
    said = weights.suspect(inquiry, change(wanted.clone()), wanted, "as it should not be")
    (suspicion,) = inquiry.suspicions
    assert words in said == suspicion.sentence and suspicion.stages == stages
    assert change is not one_key or suspicion.place == {"batch": 0, "head": 3, "row": 7, "column": 9}


def test_weights_that_a_behaviour_predicts_do_not_disagree():
    inquiry = inquiry_of(zoo.scaled_twice)
    found = reading.read_scores(inquiry.candidate, PROBLEM)
    assert weights.disagreement(inquiry, found, RIGHT.with_(scale_factor=PROBLEM.scale)) == 0.0
    assert weights.disagreement(inquiry, found, RIGHT) > 0.5
    nan = torch.full((2, 2), torch.nan)
    assert (
        not weights.bad_weights(inquiry, nan, nan).any() and weights.bad_weights(inquiry, nan, nan.nan_to_num(0)).all()
    )
