"""An answer is judged on the rows asked."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis.calling import Answer
from flashcore.bisection.diagnosis.promises import asking
from flashcore.measure.check import expected
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import Problem

SMALL = Problem(batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=5, seqlen_k=7, head_dim=8)


def test_an_answer_is_judged_on_the_rows_asked_and_may_not_hide_a_nan():
    q, k, v = make_inputs(SMALL)
    case = expected(q, k, v, SMALL, round_scores=False)
    good = Answer(case.out.to(q.dtype), case.lse)
    assert asking.what_is_wrong(good, case) is None
    bad = Answer(good.out.clone(), good.lse)
    bad.out[1, 0, 2] = math.nan
    assert "8 of 160 elements are wrong" in asking.what_is_wrong(bad, case)
    assert asking.what_is_wrong(bad, case, rows=torch.tensor([True, True, False, True, True])) is None
    truth = (case.out.clone(), case.lse)
    truth[0][1, 0, 2] = math.nan
    assert asking.what_is_wrong(bad, case, truth=truth) is None
    assert "8 elements are finite where float64 gives NaN; first at batch 1, head 0, row 2" in asking.what_is_wrong(
        good, case, truth=truth
    )
    shifted = Answer(good.out, good.lse + 1)
    assert asking.what_is_wrong(shifted, case).startswith("lse: 20 of 20 elements are wrong")


def test_rows_without_a_key_are_left_to_their_own_promise():
    problem = SMALL.with_(causal=True, seqlen_q=9)
    assert asking.rows_that_see(problem, "cpu").tolist() == [False] * 2 + [True] * 7
    assert bool(asking.rows_that_see(SMALL, "cpu").all())
