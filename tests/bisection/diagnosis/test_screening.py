"""What a function is asked, and how its answers are judged."""

from __future__ import annotations

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis import screening
from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.screening import HOME, Inputs
from flashcore.numerics.inputs import PATTERNS
from flashcore.problem import square


def of(function, **options):
    return candidate_of(function, device="cpu", **options)


@pytest.mark.slow
def test_the_home_is_the_richest_problem_that_is_taken():
    assert screening.find_home(of(zoo.two_pass))[0] == HOME

    def no_groups(q, k, v):
        assert q.shape == k.shape and q.shape[2] % 128 == 0 and q.dtype == torch.bfloat16
        return zoo.two_pass(q, k, v)

    home, tried = screening.find_home(of(no_groups))
    assert (home.num_heads_kv, home.seqlen_k, home.dtype) == (4, 256, "bfloat16")
    assert all("AssertionError" in one.refused for one in tried[:-1])
    assert screening.find_home(of(zoo.raises))[0] is None


def test_what_is_asked_goes_by_what_the_function_takes():
    plain = list(screening.ordinary(of(zoo.page_loop), HOME))
    assert {i.pattern for i in plain} == set(PATTERNS)
    assert not any(i.problem.causal or i.problem.softmax_scale for i in plain)
    rich = list(screening.ordinary(of(zoo.two_pass), HOME))
    assert any(i.problem.causal for i in rich) and any(i.default_scale for i in rich)
    assert {i.problem.softmax_scale for i in rich} == {None, 0.3, -0.125}
    assert {i.problem.head_dim for i in rich} == {64, 96, 128}
    assert {i.problem.dtype for i in rich} == {"float16", "bfloat16", "float32"}
    assert any(i.strided for i in rich) and any(i.problem.seqlen_q == 1 for i in rich)


def test_rows_that_see_no_key_are_judged_only_where_they_are_asked_about_by_name():
    def without_a_guard(q, k, v, causal=False):
        a, b, c, scale = zoo.parts(q, k, v)
        scores = a @ b.mT * scale
        scores = zoo.masked(scores, k.shape[2] - q.shape[2]) if causal else scores
        return (torch.softmax(scores, dim=-1) @ c).to(q.dtype)

    asked = [i for i in screening.ordinary(of(without_a_guard), HOME) if i.problem.seqlen_q > i.problem.seqlen_k]
    inputs = next(i for i in asked if i.problem.causal)
    candidate = of(without_a_guard)
    assert screening.screen_one(candidate, inputs).wrong, "empty rows of the reference are 0"
    forgiving = dataclasses.replace(candidate, forgiven=True, empty_rows=set())
    assert not screening.screen_one(forgiving, inputs).wrong and forgiving.empty_rows == {"NaN"}

    def sees_the_future(q, k, v, causal=False):
        return without_a_guard(q, k, v, causal and q.shape[2] <= k.shape[2])

    other = dataclasses.replace(of(sees_the_future), forgiven=True, empty_rows=set())
    assert screening.screen_one(other, inputs).wrong and other.empty_rows == {"numbers"}


def test_a_result_that_the_next_call_writes_over_is_judged_as_it_was_and_said():
    room: dict = {}

    def into_one_room(q, k, v):
        kept = room.setdefault(q.shape, torch.empty_like(q))
        return kept.copy_(zoo.two_pass(q, k, v))

    found = screening.screen_one(of(into_one_room), Inputs(HOME), again=True)
    assert (
        not found.wrong
        and found.shares_memory
        and found.answer.out.data_ptr() != room[found.answer.out.shape].data_ptr()
    )
    assert not screening.screen_one(of(zoo.two_pass), Inputs(HOME), again=True).shares_memory


def test_a_case_that_is_asked_for_again_is_the_same_to_the_bit_and_stays_as_it_was_made():
    candidate = of(zoo.two_pass)
    asked = Inputs(HOME.with_(seqlen_q=9, seqlen_k=11), "outlier", seed=5)
    plain, kept = asked.case(candidate), asked.case(candidate, again=True)
    assert asked.case(candidate, again=True) is kept, "a diagnosis that looks at one call often makes it once"
    names = ("q", "k", "v", "out", "lse")
    for name in names:
        one, other = getattr(plain, name), getattr(kept, name)
        assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
    assert (kept.out_atol, kept.lse_atol, kept.bad_inputs) == (plain.out_atol, plain.lse_atol, plain.bad_inputs)
    for name in names:  # as a kernel does that writes out of bounds
        getattr(kept, name).fill_(7.0)
    anew = asked.case(candidate)
    assert all(torch.equal(getattr(anew, name), getattr(plain, name)) for name in names)


def test_a_case_with_room_between_its_rows_or_a_large_one_is_made_anew(monkeypatch):
    candidate = of(zoo.two_pass)
    strided = Inputs(HOME.with_(seqlen_q=9, seqlen_k=13), strided=True)
    assert strided.case(candidate, again=True).q.stride() == strided.make("cpu")[0].stride() != ()
    assert not strided.case(candidate, again=True).q.is_contiguous()
    monkeypatch.setattr(screening, "_cases", screening._Cases())
    monkeypatch.setattr(screening, "KEPT_BYTES", 0)
    Inputs(HOME).case(candidate, again=True)
    assert not screening._cases._kept


def test_threads_that_ask_for_cases_get_each_its_own(monkeypatch):
    """More cases than are kept, so that each forgets another one; and the last one asked for is another thread's."""
    monkeypatch.setattr(screening, "KEPT_CASES", 2)
    cases = screening._Cases()
    asked = [(square(1, 1, size, 16), 0, "normal", "bhsd", "cpu") for size in (8, 9, 10, 11)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda one: cases.case(one, True).q.shape[2], asked * 50))
    finally:
        sys.setswitchinterval(before)
    assert found == [8, 9, 10, 11] * 50


def test_only_so_many_cases_are_kept(monkeypatch):
    monkeypatch.setattr(screening, "_cases", screening._Cases())
    monkeypatch.setattr(screening, "KEPT_CASES", 2)
    for seed in range(4):
        Inputs(HOME.with_(seqlen_q=3, seqlen_k=3), seed=seed).case(of(zoo.two_pass), again=True)
    assert [asked[1] for asked in screening._cases._kept] == [2, 3]


def test_answers_are_judged_to_the_element():
    found = screening.screen_one(of(zoo.one_score), Inputs(HOME))
    assert found.wrong and found.out_wrong and found.out.first_bad["head"] == 3
    assert not screening.screen_one(of(zoo.two_pass), Inputs(HOME)).wrong
    assert screening.screen_one(of(zoo.a_race), Inputs(HOME), again=True).repeats is False
    found = screening.screen_one(of(zoo.with_lse, lse="log2"), Inputs(HOME))
    assert found.lse_alone and not found.out_wrong
