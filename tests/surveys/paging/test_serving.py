"""Served models: every way of a layer's step on the CPU, what is refused, and what breaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import stand_in_flashinfer
from support.paging_surveys import PLAN

from flashcore.records import Ledger
from flashcore.surveys.paging import serving, serving_facts
from flashcore.surveys.paging.serving_facts import AS_ROWS, CUDA, DENSE, INVARIANT, OURS, TENSOR
from flashcore.surveys.paging.trials import Book


def measured(plan=PLAN):
    said = []
    book = Book(Ledger(), said.append)
    serving.measure_serving(book, plan)
    return book.trials, said


@pytest.mark.slow
def test_every_way_is_right_or_says_why_it_is_not_there(monkeypatch):
    stand_in_flashinfer.install(monkeypatch)
    trials, said = measured(replace(PLAN, served_batches=(2,)))
    found = {t.variant: t for t in trials}
    assert set(found) == {OURS, INVARIANT, DENSE, AS_ROWS, TENSOR, CUDA}
    assert {t.status for t in trials if t.variant != INVARIANT} == {"ok"}
    assert found[INVARIANT].status == "unsupported" and "batch_invariant" in found[INVARIANT].reason
    assert found[INVARIANT].problem.batch_invariant and not found[OURS].problem.batch_invariant
    ours = found[OURS].data
    assert (ours["shape"], ours["layers"], ours["batch"], ours["card"]) == ("tiny", 2, 2, "nobody/tiny")
    assert ours["kv_bytes"] == 2 * 2 * 2 * 96 * 64 * 2 and {"over_dense", "over_flashinfer"} <= set(ours)
    assert found[OURS].problem.dtype == "bfloat16" and "sheet_tbs" not in ours
    assert len(said) == 1 and "attention only" in said[0]
    assert len({t.timing.round for t in trials if t.timing}) <= 1, "what is compared was interleaved"


def test_without_flashinfer_one_record_says_so():
    if torch.cuda.is_available():
        pytest.skip("the peer may be here")
    trials, _ = measured()
    assert serving_facts.absent(trials, "serving").keys() == {"flashinfer"}
    assert [t.backend for t in trials].count("flashinfer") == 1


def test_a_batch_that_breaks_does_not_end_the_next(monkeypatch):
    real = serving.random_step

    def step(problem, *rest):
        if problem.batch == 1:
            raise MemoryError("no room")
        return real(problem, *rest)

    monkeypatch.setattr(serving, "random_step", step)
    trials, _ = measured()
    assert trials[0].status == "error" and trials[0].reason == "MemoryError: no room" and trials[0].data["batch"] == 1
    assert {t.status for t in trials if t.data.get("batch") == 2} <= {"ok", "unsupported"}


def test_a_rate_is_of_every_layer():
    assert serving.tokens_per_s(32, 64, 100.0) == 64 / (32 * 100e-6)


def test_random_numbers_depend_on_the_seed_alone():
    problem = PLAN.served[0].problem(2)
    first, same, other = (serving.random_step(problem, 2, "cpu", seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True)) and not torch.equal(first[0], other[0])
    assert first[0].shape == (4, 2, 96, 64) and first[2].shape == (2, 2, 4, 1, 64)
