"""Decode against dense attention, and what serving has beside it: every case on the CPU, at its sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import stand_in_flashinfer
from support.paging_surveys import PLAN

from flashcore.records import Ledger
from flashcore.surveys.paging import shapes
from flashcore.surveys.paging.plan import plan_for
from flashcore.surveys.paging.serving_facts import AS_ROWS, CASCADE, DENSE, LENGTHS, OURS, PLAIN, PREFIX, TOKENS
from flashcore.surveys.paging.trials import Book


@pytest.fixture(scope="module")
def trials():
    with pytest.MonkeyPatch.context() as patch:
        stand_in_flashinfer.install(patch)
        book = Book(Ledger(), lambda line: None)
        shapes.measure_shapes(book, PLAN)
    return book.trials


def of(trials, case):
    return {t.variant: t for t in trials if t.data["case"] == case}


@pytest.mark.slow
def test_everything_is_right(trials):
    assert [(t.variant, t.reason) for t in trials if t.status != "ok"] == []
    assert {t.data["case"] for t in trials} == {PLAIN, LENGTHS, TOKENS, PREFIX}


@pytest.mark.slow
def test_every_page_size_shares_its_rounds_with_the_same_dense_step(trials):
    found = of(trials, PLAIN)
    assert {DENSE, AS_ROWS, "page 16", "page 32", "FlashInfer, CUDA cores, page 16"} <= set(found) and len(found) == 8
    assert len({t.timing.round for t in found.values()}) == 1
    for size in (16, 32):
        data = found[f"page {size}"].data
        assert found[f"page {size}"].problem.page_size == size and data["flashinfer"].endswith(f"page {size}")
        assert data["over_dense"] > 0 and data["dense"] in (DENSE, AS_ROWS)


@pytest.mark.slow
def test_lengths_are_drawn_and_their_bytes_counted(trials):
    found = of(trials, LENGTHS)[OURS]
    assert 5 <= found.data["shortest"] < found.problem.seqlen_k <= 200
    assert found.data["kv_bytes"] == 2 * 2 * 64 * 2 * found.data["tokens"]
    assert found.data["over_flashinfer"] > 0


@pytest.mark.slow
def test_query_tokens_stand_beside_one_and_a_shared_prefix_beside_none(trials):
    tokens = of(trials, TOKENS)
    two = tokens["2 query tokens"]
    assert two.problem.seqlen_q == 2 and two.problem.causal and {"over_one", "over_flashinfer"} <= set(two.data)
    prefix = of(trials, PREFIX)
    shared, apart = prefix["prefix shared"].data, prefix["nothing shared"].data
    assert shared["over_apart"] > 0 and CASCADE in prefix
    # 64 of the 96 tokens of three sequences lie there once.
    assert apart["kv_bytes"] == 2 * 3 * 2 * 96 * 64 * 2 and shared["kv_bytes"] * 9 == apart["kv_bytes"] * 5


def test_a_case_that_breaks_does_not_end_the_next(monkeypatch):
    def cache(*rest, **more):
        raise MemoryError("no room")

    monkeypatch.setattr(shapes, "mixed_cache", cache)
    book = Book(Ledger(), lambda line: None)
    shapes.measure_shapes(book, replace(PLAN, shapes=()))
    broken = {t.data.get("case"): t.reason for t in book.trials if t.status == "error"}
    assert broken == {LENGTHS: "MemoryError: no room", PREFIX: "MemoryError: no room"}
    assert any(t.status == "ok" and t.data["case"] == TOKENS for t in book.trials)


def test_the_cases_of_a_plan_are_parts_that_measure_it_whole():
    plan = plan_for("full", True)
    parts = shapes.cases(plan)
    assert [name for name, _ in parts] == [PLAIN] * 10 + [LENGTHS, TOKENS, PREFIX]
    for name, part in parts:
        assert [(n, p) for n, p in shapes.cases(part)] == [(name, part)], "a part is its own only part"
    assert {(p.shapes[0], p.dtypes[0]) for n, p in parts if n == PLAIN} == {
        (problem, dtype) for problem in plan.shapes for dtype in ("float16", "bfloat16")
    }
    assert shapes.cases(plan_for("quick", True))[-1][0] == PLAIN
