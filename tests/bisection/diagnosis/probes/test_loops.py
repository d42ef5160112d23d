"""Faults of the page loop: each is tried, few at once, and each has words and stages."""

from __future__ import annotations

from typing import get_args

import pytest
from support import wrong_attention as zoo
from support.inquiries import inquiry_of

from flashcore.bisection.diagnosis.pages import Loop, LoopFault
from flashcore.bisection.diagnosis.probes import loops
from flashcore.numerics.reference import STAGES
from flashcore.problem import Problem

PROBLEM = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=200, seqlen_k=200, head_dim=64)


def test_every_fault_is_tried_the_plain_ones_first():
    tried = list(loops.loops_of(PROBLEM))
    assert {loop.kind for one in tried for loop in one} == set(get_args(LoopFault))
    assert all(loop.page is None for one in tried[:2] for loop in one)
    assert tried[0][0] == Loop("accum not rescaled", PROBLEM.page_size)
    assert {loop.page for one in tried[2:] for loop in one if loop.page_size == 64} == {1, 2, 3}
    assert {loop.page_size for loop in tried[1] if loop.kind == "pages averaged"} >= {100, 67, 50, 64}
    assert all(0 < (loop.page or 1) * loop.page_size < 200 for one in tried for loop in one)


def test_a_long_row_is_not_cut_into_thousands_of_pages():
    tried = [loop for one in loops.loops_of(PROBLEM.with_(seqlen_k=5000, page_size=64)) for loop in one]
    assert min(loop.page_size for loop in tried) == 64
    assert -(-5000 // 64) <= loops.MOST_PAGES


@pytest.mark.parametrize("kind", get_args(LoopFault))
def test_every_fault_has_words_and_stages(kind):
    words, stages = loops.words_of(Loop(kind, 64))
    assert "64 keys" in words and stages and set(stages) <= set(STAGES)
    if kind in loops.PAGE_FAULTS:
        assert "on page 3 of 64 keys, last page first" in loops.words_of(Loop(kind, 64, 3, backwards=True))[0]


def test_a_loop_is_found_by_simulation():
    inquiry = inquiry_of(zoo.accum_not_rescaled, patterns=("normal", "rising"))
    assert loops.moving_maximum(inquiry) == (
        "the accumulator is not rescaled when the maximum moves, on every page of 64 keys"
    )
    assert inquiry.state.loop == Loop("accum not rescaled", 64) and not inquiry.unexplained()
    assert loops.moving_maximum(inquiry_of(zoo.page_loop)) is None


@pytest.mark.parametrize("name", ["rescaled_late_accum", "rescaled_late"])
def test_of_loops_that_explain_one_call_alike_the_others_decide(name):
    wrong = zoo.ZOO[name]
    inquiry = inquiry_of(wrong.function, PROBLEM.with_(seqlen_q=60, seqlen_k=200), ("normal", "rising", "steep"))
    loops.moving_maximum(inquiry)
    assert [h.name for h in inquiry.found] == [wrong.named] and not inquiry.unexplained()
