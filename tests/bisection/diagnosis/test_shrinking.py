"""The smallest case still fails, and is small."""

from __future__ import annotations

from support import wrong_attention as zoo

from flashcore.bisection.diagnosis import shrinking
from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.screening import HOME, Inputs, screen_one


def shrunk(function, inputs):
    candidate = candidate_of(function, device="cpu")
    first = screen_one(candidate, inputs)
    assert first.wrong
    found = shrinking.shrink(candidate, first, budget_s=60)
    assert screen_one(candidate, found.inputs).wrong
    return found.inputs.problem


def test_a_bug_of_the_tail_needs_one_key_past_a_tile():
    problem = shrunk(zoo.tail_dropped, Inputs(HOME))
    assert (problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k) == (1, 1, 1, 65)


def test_a_bug_of_heads_keeps_the_heads_that_it_needs():
    problem = shrunk(zoo.heads_by_remainder, Inputs(HOME))
    assert problem.batch == 1 and problem.num_heads_kv == 2 and problem.num_heads_q == 4


def test_a_bug_of_the_mask_keeps_the_mask():
    assert shrunk(zoo.one_key_too_many, Inputs(HOME.with_(causal=True))).causal


def test_each_step_is_smaller_and_a_problem():
    for inputs in shrinking.smaller(Inputs(HOME.with_(causal=True, softmax_scale=0.5), "rising", strided=True)):
        assert inputs.problem != HOME or inputs.pattern != "rising"
    halves = [i.problem for i in shrinking.halved(Inputs(HOME))]
    assert all(p.seqlen_q * p.seqlen_k < HOME.seqlen_q * HOME.seqlen_k for p in halves) and halves


def test_a_hang_is_not_tried_again():
    candidate = candidate_of(zoo.hangs, device="cpu", time_limit_s=0.1)
    first = screen_one(candidate, Inputs(HOME))
    assert shrinking.shrink(candidate, first) is first and len(candidate.calls) == 1
