"""Probes one after another: each bug shows in its own, and what explains everything ends the search."""

from __future__ import annotations

from support import wrong_attention as zoo

from flashcore.bisection.diagnosis import peeling
from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.screening import Inputs, screen_one
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=150, head_dim=32)


def peel(function, problem=PROBLEM, patterns=("normal", "rising")):
    candidate = candidate_of(function, device="cpu")
    failing = [screen_one(candidate, Inputs(problem, pattern), again=True) for pattern in patterns]
    return peeling.peel(candidate, problem, [one for one in failing if one.wrong])


def test_what_explains_everything_ends_the_search():
    found = peel(zoo.heads_by_remainder)
    assert [h.name for h in found.hypotheses] == ["K of another head", "V of another head"]
    assert found.explained == found.wrong > 0 and found.spoiled == 0
    assert [p.name for p in found.probes if not p.right] == ["marks"]
    assert "moving maximum" not in [p.name for p in found.probes]


def test_each_probe_says_what_it_cost():
    found = peel(zoo.accum_not_rescaled)
    assert all(p.calls >= 0 and p.seconds >= 0 and p.showed for p in found.probes)
    assert sum(p.calls for p in found.probes) > 20
    assert found.hypotheses[0].changes["loop"].page_size == 64


def test_one_score_is_named_with_its_place_and_what_is_added_to_it():
    found = peel(zoo.one_score)
    assert [h.name for h in found.hypotheses] == ["scores shifted"] and found.explained == found.wrong > 0
    assert "0.25 is added to the score of key 149 in row 69 of batch 1, head 3" in found.hypotheses[0].sentence
    assert found.hypotheses[0].place == {"batch": 1, "head": 3, "row": 69, "column": 149}


def test_what_nothing_explains_is_a_suspicion_with_its_place():
    found = peel(zoo.roots_of_scores)
    assert found.hypotheses == () and found.suspicions[0].stages == ("scores", "probs")
    assert set(found.suspicions[0].place) == {"batch", "head", "row", "column"}


def test_a_race_is_called_one_and_nothing_else():
    found = peel(zoo.a_race)
    assert found.hypotheses == () and "other results each time" in found.suspicions[0].sentence


def test_a_nan_in_every_element_is_placed_by_lse():
    def out_alone(q, k, v, return_lse=True):
        out, lse = zoo.with_lse(q, k, v, return_lse=True)
        return out * float("nan"), lse

    candidate = candidate_of(out_alone, device="cpu", lse="natural")
    failing = [screen_one(candidate, Inputs(PROBLEM))]
    assert peeling.peel(candidate, PROBLEM, failing).suspicions[0].stages == ("accum", "out")


def test_a_closer_look_finds_what_bounds_let_pass_and_accuses_nobody_right():
    for function in zoo.RIGHT.values():
        candidate = candidate_of(function, device="cpu")
        found = peeling.look_closer(candidate, PROBLEM)
        assert found.hypotheses == () and found.suspicions == ()
    found = peeling.look_closer(candidate_of(zoo.accum_in_half, device="cpu"), PROBLEM)
    assert [h.name for h in found.hypotheses] == ["accumulation in 16 bits"]
