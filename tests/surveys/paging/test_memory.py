"""Memory as records: what each case saves and against what; a case that breaks does not end the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.paging_surveys import PLAN

from flashcore.paging.memory import KVShape, memory_cases, no_sharing
from flashcore.surveys.paging import memory
from flashcore.surveys.paging.trials import Book


@pytest.mark.slow
def test_each_record_agrees_with_the_books_of_its_case(run):
    said = []
    memory.measure_memory(Book(run, said.append), PLAN)
    trials = {t.data["case"]: t.data for t in run.trials(kind="paging")}
    for case in memory_cases(KVShape()):
        data, stats = trials[case.name], case.stats
        assert data["saved_percent"] == pytest.approx(100 * case.saved, rel=1e-3)
        assert data["saved_percent"] == pytest.approx(
            100 * (1 - data["resident_bytes"] / data["baseline_bytes"]), abs=0.01
        )
        assert data["resident_bytes"] == stats.resident_bytes and data["pages_used"] == stats.pages_used
        assert data["pool"] == "meta" and data["kv"] == "8 KV heads, head_dim 128, fp16"
        assert data["definition"].endswith(case.words) and "128 tokens, one layer" in data["definition"]
    assert {name: data["baseline"] for name, data in trials.items()} == {
        "shared_prefix": "dense", "mixed_lengths": "padded", "no_sharing": "dense",
    }  # fmt: skip
    assert len(said) == 3 and said[0].endswith("70.3 % saved") and said[2].endswith("-0.8 % saved")


@pytest.mark.slow
def test_a_case_that_breaks_is_a_record_and_the_rest_goes_on(run, monkeypatch):
    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setitem(memory.MEMORY_CASES, "mixed_lengths", full)
    book = Book(run, lambda line: None)
    memory.measure_memory(book, PLAN)
    assert [(t.data["case"], t.status) for t in book.trials] == [
        ("shared_prefix", "ok"), ("mixed_lengths", "error"), ("no_sharing", "ok"),
    ]  # fmt: skip
    assert book.trials[1].reason == "MemoryError: no room"


@pytest.mark.parametrize(("share_free", "where"), [(2.1, ["meta", "cuda"]), (1.9, ["meta"])])
def test_a_pool_is_real_where_a_gpu_has_room_for_it(run, monkeypatch, share_free, where):
    made = []
    case = no_sharing(KVShape(num_heads_kv=1, head_dim=4, page_size=16), sequences=2, length=33)

    def make(shape, device):
        made.append(device)
        return case

    monkeypatch.setattr(memory, "MEMORY_CASES", {"shared_prefix": make})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (share_free * case.stats.pool_bytes, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    book = Book(run, lambda line: None)
    memory.measure_memory(book, replace(PLAN, gpu=True))
    assert made == where and book.trials[0].data["pool"] == where[-1]
