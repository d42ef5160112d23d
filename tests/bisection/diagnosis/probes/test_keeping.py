"""What a function keeps of earlier calls is told from a race, and a right function keeps nothing."""

from __future__ import annotations

import pytest
import torch
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis.behaviour import RIGHT
from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.probes.keeping import kept_between_calls
from flashcore.bisection.diagnosis.screening import Inputs
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=40, seqlen_k=50, head_dim=32)


def found_in(function):
    candidate = candidate_of(function, device="cpu")
    return kept_between_calls(candidate, PROBLEM, RIGHT)


@pytest.mark.parametrize("name", ["two_pass", "page_loop"])
def test_a_right_function_keeps_nothing(name):
    assert found_in(zoo.RIGHT[name]) is None


def test_inputs_of_the_first_call_and_of_one_in_the_same_memory():
    kept: dict = {}

    def by_shape(q, k, v):
        return zoo.two_pass(q, k, kept.setdefault(v.shape, v.clone()))

    candidate = candidate_of(by_shape, device="cpu")
    candidate(*Inputs(PROBLEM).make("cpu"), PROBLEM)
    found = kept_between_calls(candidate, PROBLEM, RIGHT)
    assert found.sentence.startswith("V of the first call with this shape is used again") and found.stages == ("accum",)

    by_place: dict = {}

    def by_address(q, k, v):
        again = (q.data_ptr(), k.data_ptr(), q.shape)
        mine = by_place.setdefault(again, (q.clone(), k.clone()))
        return zoo.two_pass(*mine, v)

    # Every tensor stays where it is, so that no address comes again but where a test writes into the same memory.
    held = []

    def held_apart(q, k, v):
        held.extend((q, k, v))
        return by_address(q, k, v)

    words = "Q and K of an earlier call that had its tensors in the same memory are used again in place of its own"
    assert found_in(held_apart).sentence == words


def test_a_result_that_is_added_to_and_a_first_call_that_differs():
    total: dict = {}

    def adds(q, k, v):
        room = total.setdefault(q.shape, torch.zeros(q.shape))
        return room.add_(zoo.two_pass(q, k, v).float()).to(q.dtype)

    def adds_where_lengths_are_known(q, k, v):
        return adds(q, k, v) if q.shape[2] == PROBLEM.seqlen_q else zoo.two_pass(q, k, v)

    assert found_in(adds_where_lengths_are_known).name == "result of an earlier call"
    seen = set()

    def warms_up(q, k, v):
        new = q.shape not in seen
        seen.add(q.shape)
        return zoo.two_pass(q, k, v) * (0.5 if new else 1.0)

    found = found_in(warms_up)
    assert (
        found.name == "first call differs" and found.of_calls and set(found.place) == {"batch", "head", "row", "column"}
    )


def test_a_function_that_takes_few_lengths_is_asked_about_those():
    def of_its_own_lengths(q, k, v):
        assert q.shape[2] == PROBLEM.seqlen_q
        return zoo.two_pass(q, k, v)

    assert found_in(of_its_own_lengths) is None
