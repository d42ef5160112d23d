"""The decode step: what is timed is checked first, and a wrong result has no speed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.paging_surveys import PLAN

from flashcore import backends
from flashcore.paging import SinkWindow, TopK
from flashcore.surveys.paging import correctness as checking
from flashcore.surveys.paging import decode as decoding
from flashcore.surveys.paging.caches import random_cache
from flashcore.surveys.paging.decode import MAX_SETS, Inputs, Step, checked, kv_bytes, num_sets, steps_of
from flashcore.surveys.paging.measuring import measure
from flashcore.surveys.paging.plan import decode_problem
from flashcore.surveys.paging.trials import Book


def test_a_wrong_step_is_timed_and_counts_for_nothing(run, monkeypatch):
    real = decoding.Inputs.call

    def call(self, step, i):
        out, lse = real(self, step, i)
        return (out + 1, lse) if step.name == "all pages" else (out, lse)

    monkeypatch.setattr(decoding.Inputs, "call", call)
    trials = {t.variant: t for t in measure(run, PLAN, what="decode")}
    assert trials["all pages"].status == "failed" and "counts for nothing" in trials["all pages"].reason
    assert trials["top_k 50 %"].status == "ok" and "of_dense" not in trials["top_k 50 %"].data


@pytest.mark.gpu
def test_a_selection_can_be_captured_with_the_step_that_uses_it():
    cache = random_cache(2, 512, 2, 64, page_size=64, dtype=torch.float16, device="cuda")
    q = torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.float16)
    selection = TopK(share=0.5).select(q, cache)
    out, _ = backends.get("reference").run_paged(q, cache, checking.paged_problem_of(q, cache), selection)
    assert bool(out.isfinite().all())


SHAPE = decode_problem(2, 4, 2, 100, 64)


def test_the_ways_a_step_is_taken():
    plan = replace(PLAN, shares=(1.0, 0.3), page_size=16)
    steps = {s.name: s for s in steps_of(plan, SHAPE)}
    assert list(steps) == [
        "all pages",
        "top_k 100 %",
        "top_k 30 %",
        "sink_window 30 %",
        "dense",
        "dense, group as rows",
    ]
    assert steps["all pages"].policy is None and steps["top_k 30 %"].policy == TopK(share=0.3)
    assert steps["sink_window 30 %"].policy == SinkWindow(1, 2), "3 of 7 pages, as the other takes"
    assert steps["dense"].backend == PLAN.peer and not steps["dense"].paged
    assert "dense, group as rows" not in {s.name for s in steps_of(plan, decode_problem(2, 4, 4, 100, 64))}


def test_sets_together_exceed_twice_the_cache(monkeypatch):
    assert kv_bytes(SHAPE) == 2 * 2 * 2 * 100 * 64 * 2
    for l2, share, sets in (
        (kv_bytes(SHAPE), 1.0, 2),
        (kv_bytes(SHAPE), 0.5, 4),
        (10, 1.0, 1),
        (1 << 40, 1.0, MAX_SETS),
    ):
        monkeypatch.setattr(decoding.device, "l2_bytes", lambda l2=l2: l2)
        assert num_sets(SHAPE, share) == sets


def test_every_way_gives_the_same_result_on_every_set():
    plan = replace(PLAN, page_size=16)
    inputs = Inputs(plan, SHAPE, 3, 0, dense=True)
    every = Step("all pages", "reference")
    dense, rows = (Step(name, "reference", paged=False) for name in ("dense", "dense, group as rows"))
    outs = []
    for i in range(3):
        out, lse = inputs.call(every, i)
        assert lse is not None and out.shape == (2, 4, 1, 64)
        for other in (dense, rows):
            torch.testing.assert_close(inputs.call(other, i)[0], out, rtol=2e-3, atol=2e-3)
        outs.append(out)
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2]), "sets hold other numbers"
    assert inputs.selection(every) is None
    some = Step("top_k", "reference", TopK(pages=2), "top_k", 0.3)
    assert inputs.selection(some).counts.eq(2).all() and not torch.equal(inputs.call(some, 0)[0], outs[0])
    assert checked(inputs, some) is None and checked(inputs, every) is None
    wrong = Step("top_k", "reference", SinkWindow(1, 1), "top_k", 0.3)
    inputs.call = lambda step, i: Inputs.call(inputs, wrong, i)
    assert "batch 0" in checked(inputs, every)


def test_a_shape_that_breaks_does_not_end_the_next(run, monkeypatch):
    real = decoding.random_cache

    def cache(sequences, length, *rest, **more):
        if length == 100:
            raise MemoryError("no room")
        return real(sequences, length, *rest, **more)

    monkeypatch.setattr(decoding, "random_cache", cache)
    book = Book(run, lambda line: None)
    plan = replace(PLAN, decode=(SHAPE, SHAPE.with_(seqlen_k=64)), shares=(0.5,), page_size=16)
    decoding.measure_decode(book, plan)
    first, *rest = book.trials
    assert first.status == "error" and first.reason == "MemoryError: no room" and first.problem.seqlen_k == 100
    assert [t.variant for t in rest] == ["all pages", "top_k 50 %", "sink_window 50 %", "dense", "dense, group as rows"]
    assert {t.status for t in rest} == {"ok"} and {t.problem.seqlen_k for t in rest} == {64}
