"""What a wrong function gave, element by element: weights, output and lse beside what was meant."""

from __future__ import annotations

import functools

import pytest
import torch
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis import candidate_of, diagnose, see
from flashcore.problem import parse_problem

SMALL = "B=1,H=4,Hkv=2,S=130,D=32"


def seen(function, problem: str = SMALL, **options):
    found = diagnose(function, problem, device="cpu", pattern="normal", **options)
    return see(candidate_of(function, device="cpu", **options), found)


def test_a_mask_shows_in_the_weights_at_the_key_that_it_let_pass():
    one = seen(zoo.one_key_too_many, SMALL + ",causal")
    assert tuple(one.parts) == ("weights", "out")
    first = one.first_bad
    assert (first["stage"], first["row"], first["column"]) == ("weights", 0, 0)
    got, expected, _ = one.parts["weights"]
    keys = torch.arange(130)
    late = (keys[None] == keys[:, None] + 1)[None]  # the one key that each row must not see
    assert bool((got > 0)[late.expand_as(got)].all()) and not bool((expected > 0)[late.expand_as(got)].any())
    tile = one.tile({"stage": "weights", "batch": 0, "head": 3, "row": 40, "column": 41})
    assert tile["at"] == [8, 41] and tile["shares"][8][41] > 1 and tile["shares"][8][42] == 0.0


def test_heads_that_read_another_head_fail_and_the_others_do_not():
    one = seen(zoo.heads_by_remainder)
    rows = one.grid()["rows"]
    wrong = {name for name, shares in rows.items() if max(shares) > 1}
    assert wrong == {"batch 0, head 1", "batch 0, head 2"}, "heads 0 and 3 are the same by either rule"
    assert one.grid()["columns"][-1] == "128-129"


def test_a_window_holds_got_and_expected_of_its_element():
    one = seen(zoo.heads_by_remainder)
    first = one.first_bad
    window = one.window(first)
    down, across = window["at"]
    assert window["got"][down][across] == first["got"] and window["expected"][down][across] == first["expected"]
    assert window["across"] == "key" and len(window["got"]) == 5 and len(window["got"][0]) == 8


def test_a_wrong_lse_is_seen_where_out_is_right():
    one = seen(functools.partial(zoo.with_lse, base=2.0), lse="natural")
    assert one.first_bad["stage"] == "lse" and one.first_bad["column"] == 0
    assert all(max(shares) <= 1 for shares in one.grid()["rows"].values())


def test_weights_that_are_too_many_are_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr("flashcore.bisection.diagnosis.seeing.READABLE", {"cpu": 100})
    problem = parse_problem(SMALL)
    found = diagnose(zoo.heads_by_remainder, problem, device="cpu", pattern="normal")
    one = see(candidate_of(zoo.heads_by_remainder, device="cpu"), found)
    assert tuple(one.parts) == ("out",) and one.why_no_weights == "there are 67,600 of them, and 100 are read at most"
    assert one.first_bad["stage"] == "out" and one.grid()["across"] == "columns"


@pytest.mark.parametrize("function", [zoo.two_pass, zoo.nothing, zoo.raises])
def test_there_is_nothing_to_see_without_a_wrong_answer(function):
    assert seen(function) is None
