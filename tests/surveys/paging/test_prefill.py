"""Prefill through a page table beside the dense kernel: both are checked, and only right results are compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.paging_surveys import PLAN

from flashcore.problem import square
from flashcore.surveys.paging import decode
from flashcore.surveys.paging.prefill import measure_prefill
from flashcore.surveys.paging.trials import Book

SMALL = replace(PLAN, prefill=(square(1, 2, 40, 64, causal=True),), page_size=16)


def measured(run, plan=SMALL):
    said = []
    book = Book(run, said.append)
    measure_prefill(book, plan)
    return book.trials, said


def test_paged_and_dense_share_a_round_and_the_ratio_stands_with_the_paged_one(run):
    (paged, dense), said = measured(run)
    assert (paged.variant, dense.variant) == ("paged", "dense") and {paged.status, dense.status} == {"ok"}
    assert paged.timing.round == dense.timing.round and paged.problem.page_size == 16
    ratio = dense.timing.latency_us / paged.timing.latency_us
    assert paged.data["over_dense"] == pytest.approx(ratio, rel=1e-3) and paged.data["dense"] == "reference"
    low, high = paged.data["over_dense_quartiles"]
    assert 0 < low <= high and "over_dense" not in dense.data
    assert len(said) == 1 and "as fast as dense" in said[0]


def test_a_wrong_paged_result_has_no_ratio(run, monkeypatch):
    real = decode.Inputs.call

    def call(self, step, i):
        out, lse = real(self, step, i)
        return (out.roll(1, dims=2), lse) if step.paged else (out, lse)

    monkeypatch.setattr(decode.Inputs, "call", call)
    (paged, dense), said = measured(run)
    assert paged.status == "failed" and "counts for nothing" in paged.reason and "over_dense" not in paged.data
    assert dense.status == "ok" and said == []


def test_a_dense_backend_that_is_not_here_is_a_record(run):
    (trial,), _ = measured(run, replace(SMALL, dense_backend="no-such-kernel"))
    assert trial.status == "unavailable" and "no-such-kernel" in trial.reason and trial.timing is None


def test_a_problem_that_breaks_does_not_end_the_next(run):
    odd = SMALL.prefill[0].with_(num_heads_q=2, num_heads_kv=2, head_dim=64, dtype="float32")
    trials, _ = measured(run, replace(SMALL, prefill=(odd, *SMALL.prefill)))
    assert [t.status for t in trials] == ["error", "ok", "ok"] and "float32" in trials[0].reason
