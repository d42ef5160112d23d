"""Tokens a second of attention alone: the rate from one layer's time, and what is left out or wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.paging_surveys import PLAN

from flashcore.surveys.paging import decode
from flashcore.surveys.paging.plan import ModelShape
from flashcore.surveys.paging.tokens import HEADROOM, measure_tokens
from flashcore.surveys.paging.trials import Book

MODEL = ModelShape("tiny", 3, 4, 2, 64, 80, stated_batch=2)
SMALL = replace(PLAN, models=(MODEL,), batches=(1, 2), page_size=16)


def measured(run, plan=SMALL):
    said = []
    book = Book(run, said.append)
    measure_tokens(book, plan)
    return book.trials, said


def test_a_rate_is_of_all_layers_and_the_stated_batch_is_defined(run):
    trials, said = measured(run)
    assert [(t.data["batch"], t.data["stated"], t.status) for t in trials] == [(1, False, "ok"), (2, True, "ok")]
    for trial in trials:
        batch, data = trial.data["batch"], trial.data
        assert data["tokens_per_s"] == pytest.approx(batch / (3 * trial.timing.latency_us) * 1e6, rel=1e-3)
        assert data["sparse_tokens_per_s"] == pytest.approx(batch / (3 * data["sparse_us"]) * 1e6, rel=1e-3)
        assert data["sparse_share"] == 0.3 and trial.timing.samples_us == [] and trial.timing.n >= 3
        assert trial.problem.batch == batch and trial.problem.seqlen_k == 80 and trial.variant == "tiny"
    assert "definition" not in trials[0].data
    assert trials[1].data["definition"] == (
        "attention only, batch 2, 3 layers, 4 query heads, 2 KV heads, head_dim 64, context 80: "
        "batch / (layers x time of one layer)"
    )
    assert len(said) == 2 and all(line.endswith("attention only") for line in said)


@pytest.mark.parametrize("wrong_step", ["all pages", "top_k"])
def test_a_wrong_result_fails_with_or_without_a_selection(run, monkeypatch, wrong_step):
    real = decode.Inputs.call

    def call(self, step, i):
        out, lse = real(self, step, i)
        return (out + (step.name == wrong_step), lse)

    monkeypatch.setattr(decode.Inputs, "call", call)
    trials, _ = measured(run)
    assert {t.status for t in trials} == {"failed"} and all("counts for nothing" in t.reason for t in trials)


def test_a_batch_that_does_not_fit_is_left_out_and_said(run, monkeypatch):
    bytes_of_one = decode.kv_bytes(MODEL.problem(1))
    assert bytes_of_one == 2 * 2 * 80 * 64 * 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (HEADROOM * bytes_of_one - 1, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    trials, said = measured(run, replace(SMALL, gpu=True))
    assert trials == [] and [line.split(":")[0] for line in said] == ["tiny, batch 1", "tiny, batch 2"]
    assert all("does not fit" in line for line in said)


def test_a_batch_that_breaks_does_not_end_the_next(run, monkeypatch):
    def inputs(plan, problem, *rest, **more):
        if problem.batch == 1:
            raise MemoryError("no room")
        return decode.Inputs(plan, problem, *rest, **more)

    monkeypatch.setattr("flashcore.surveys.paging.tokens.Inputs", inputs)
    trials, _ = measured(run)
    assert [t.status for t in trials] == ["error", "ok"] and trials[0].reason == "MemoryError: no room"
    assert trials[0].data["shape"] == "tiny" and trials[0].data["layers"] == 3
