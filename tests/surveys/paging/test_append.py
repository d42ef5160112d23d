"""The append of one token: its record, and the check that every token came into its slot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.paging_surveys import PLAN

from flashcore.paging import PagedKVCache
from flashcore.surveys.paging.append import TOKENS, _check, _filled, measure_append
from flashcore.surveys.paging.plan import decode_problem
from flashcore.surveys.paging.trials import Book

SMALL = replace(PLAN, append=decode_problem(3, 2, 2, 31, 8), page_size=16, rounds=2)
"""Three sequences whose prompts end one token before a page does."""


@pytest.fixture
def book(run) -> Book:
    return Book(run, lambda line: None)


def test_the_record_says_what_was_appended_and_how_long_it_took(book):
    measure_append(book, SMALL)
    (trial,) = book.trials
    assert trial.status == "ok" and trial.problem.page_size == 16 and trial.problem.seqlen_k == 31
    assert trial.data["sequences"] == 3 and trial.data["key_bounds"] is True
    assert trial.data["bytes"] == 2 * 3 * 2 * 8 * 2, "k and v of one token for each sequence"
    assert trial.timing.n == 2 and trial.data["latency_us"] == pytest.approx(trial.timing.latency_us, rel=1e-3)


def test_prompts_have_room_for_every_token_that_is_timed():
    cache, k, v = _filled(SMALL, seed=0)
    assert cache.lengths.tolist() == [31] * 3 and k.shape == v.shape == (3, 2, 1, 8) and not torch.equal(k, v)
    assert [len(cache.pages(s)) * 16 for s in cache.sequences] == [96] * 3 and 96 >= 31 + TOKENS
    for _ in range(TOKENS):
        cache.write(k, v)
    assert cache.lengths.tolist() == [31 + TOKENS] * 3
    again, k_again, _ = _filled(SMALL, seed=0)
    assert torch.equal(k_again, k) and not torch.equal(_filled(SMALL, seed=1)[1], k)
    assert torch.equal(
        again.k_pool[again.pages(again.sequences[0])[0]], cache.k_pool[cache.pages(cache.sequences[0])[0]]
    )


def forgets_a_value(write):
    def changed(self, k, v, **rest):
        write(self, k, torch.zeros_like(v), **rest)

    return changed


def mixes_sequences_up(write):
    def changed(self, k, v, **rest):
        write(self, k.flip(0), v.flip(0), **rest)

    return changed


def counts_twice(write):
    def changed(self, k, v, **rest):
        write(self, k, v, **rest)
        self.lengths += 1

    return changed


@pytest.mark.parametrize(("plant", "words"), [
    (forgets_a_value, "the token's v is not in its slot"), (mixes_sequences_up, "the token's k is not in its slot"),
    (counts_twice, "lengths did not grow by one"),
])  # fmt: skip
def test_a_wrong_append_is_found_and_its_speed_counts_for_nothing(book, monkeypatch, plant, words):
    assert _check(*_filled(SMALL, seed=0)) is None
    monkeypatch.setattr(PagedKVCache, "write", plant(PagedKVCache.write))
    measure_append(book, SMALL)
    (trial,) = book.trials
    assert trial.status == "failed" and trial.timing and trial.reason.endswith(f"counts for nothing ({words})")


def test_an_append_that_raises_is_a_record(book):
    measure_append(book, replace(SMALL, page_size=48))
    (trial,) = book.trials
    assert trial.status == "error" and trial.timing is None and "page_size is 48" in trial.reason
