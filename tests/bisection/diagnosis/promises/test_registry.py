"""The registry of promises, and the cases of each."""

from __future__ import annotations

import pytest

from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.promises.registry import PROMISES, chosen
from flashcore.bisection.diagnosis.screening import HOME
from flashcore.errors import UnknownName
from flashcore.problem import Problem

SMALL = Problem(batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=5, seqlen_k=7, head_dim=8)


def a_function(q, k, v, causal=False, softmax_scale=None):
    return q


def test_every_promise_has_a_number_a_sentence_and_cases_of_its_own():
    assert [one.id for one in PROMISES] == [f"P{n}" for n in range(1, len(PROMISES) + 1)]
    candidate = candidate_of(a_function, device="cpu")
    for one in PROMISES:
        assert one.sentence.endswith(".") and one.how and not one.how.endswith(".")
        cases = list(one.all_cases(candidate, HOME))
        assert cases and len({case.label() for case in cases}) == len(cases), one.id
        assert all(one.suits(case) for case in cases)
    assert {one.id for one in PROMISES if not one.binding} == {"P7", "P17"}


def test_promises_are_chosen_by_id():
    assert chosen(None) == PROMISES
    assert [one.id for one in chosen("p6, P1")] == [one.id for one in chosen(["P1", "P6"])] == ["P1", "P6"]
    with pytest.raises(UnknownName, match="There is no promise 'P0'"):
        chosen("P0")


def test_a_function_without_a_mask_is_asked_nothing_causal():
    candidate = candidate_of(lambda q, k, v: q, device="cpu")
    for one in PROMISES:
        assert not any(case.problem.causal for case in one.all_cases(candidate, HOME))
    reasons = {one.id: one.why_not(candidate) for one in PROMISES if one.why_not(candidate)}
    assert set(reasons) == {"P2", "P7", "P13", "P19", "P20", "P21"} and "no causal option" in reasons["P2"]
