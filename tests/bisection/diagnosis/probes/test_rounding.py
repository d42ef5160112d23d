"""What is kept in fewer bits is named, and nothing that is off by more than a rounding."""

from __future__ import annotations

import pytest
import torch
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import RIGHT
from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.elements import in_fewer_bits
from flashcore.bisection.diagnosis.probes import rounding
from flashcore.bisection.diagnosis.screening import Inputs, screen_one
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=150, head_dim=64)


def of(function):
    return candidate_of(function, device="cpu")


def failing(function, problem=PROBLEM):
    candidate = of(function)
    return candidate, [screen_one(candidate, Inputs(problem))]


def probs_rounded(bits):
    def rounds(q, k, v):
        a, b, c, scale = zoo.parts(q, k, v)
        scores = a @ b.mT * scale
        probs = (scores - scores.amax(-1, keepdim=True)).exp()
        return (probs.to(bits).float() @ c / probs.sum(-1, keepdim=True)).to(q.dtype)

    return rounds


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (zoo.two_pass, None), (zoo.page_loop, None), (probs_rounded(torch.bfloat16), "probabilities in fewer bits"),
        (probs_rounded(torch.float8_e4m3fn), "probabilities in fewer bits"), (zoo.parts_added_as_they_are, None),
        (zoo.scaled_twice, None), (zoo.biased_by_distance, None),
    ],
)  # fmt: skip
def test_weights(function, name):
    found = rounding.rounded_weights(reading.read_scores(of(function), PROBLEM), PROBLEM, RIGHT)
    assert (found and found.name) == name and (found is None or found.by_rounding)


@pytest.mark.parametrize(
    ("function", "name"),
    [(zoo.two_pass, None), (zoo.row_sum_in_bfloat16, "row_sum in fewer bits"), (zoo.a_large_epsilon, None)],
)
def test_sums_of_rows(function, name):
    problem = PROBLEM.with_(seqlen_k=1100)
    found = rounding.rounded_sums(of(function), problem)
    assert (found and found.name) == name


def test_outputs_and_values():
    candidate, calls = failing(zoo.through_bfloat16)
    assert "no more bits than bfloat16" in rounding.rounded_output(candidate, calls).sentence
    assert rounding.rounded_output(*failing(zoo.two_pass)) is None
    assert rounding.rounded_output(*failing(zoo.scaled_twice)) is None
    assert "V is rounded to float8_e4m3fn" in rounding.rounded_values(of(zoo.v_in_8_bits), PROBLEM).sentence
    assert rounding.rounded_values(of(zoo.two_pass), PROBLEM) is None
    assert rounding.rounded_values(of(zoo.a_tenth_too_much), PROBLEM) is None


def test_what_is_far_off_is_no_rounding():
    candidate, calls = failing(zoo.scaled_twice)
    assert rounding.far_off(candidate, calls, RIGHT)
    assert not rounding.far_off(candidate, calls, RIGHT.with_(scale_factor=PROBLEM.scale))
    assert not rounding.far_off(*failing(zoo.through_bfloat16), RIGHT)


@pytest.mark.parametrize("kind", ["bfloat16", "tfloat32", "tfloat32 cut off"])
def test_products_of_float32_in_fewer_bits(kind):
    def products(q, k, v, weights_too=True):
        a, b, c, scale = zoo.parts(q, k, v)
        a, b, c = (in_fewer_bits(t, kind).float() for t in (a, b, c))
        probs = torch.softmax(a @ b.mT * scale, -1)
        return ((in_fewer_bits(probs, kind).float() if weights_too else probs) @ c).to(q.dtype)

    single = PROBLEM.with_(dtype="float32")
    found = rounding.rounded_values(of(products), single)
    assert found.name == "products in fewer bits" and f"are computed in {kind}" in found.sentence and found.by_rounding
    found = rounding.rounded_values(of(lambda q, k, v: products(q, k, v, weights_too=False)), single)
    assert found.sentence.startswith(f"V is rounded to {kind}") and found.name == "V in fewer bits"
    for right in (zoo.two_pass, zoo.page_loop, zoo.a_large_epsilon, zoo.a_tenth_too_much):
        for problem in (single, PROBLEM, single.with_(seqlen_k=1100)):
            assert rounding.rounded_values(of(right), problem) is None
