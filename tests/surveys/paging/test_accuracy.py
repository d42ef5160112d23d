"""What each policy loses on each pattern, as records: a lost needle shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.paging_surveys import PLAN, records

from flashcore.paging import SinkWindow, TopK, gather, make_attention
from flashcore.surveys.paging import accuracy, facts
from flashcore.surveys.paging.accuracy import SPREAD, _judge, pattern_cache, policies
from flashcore.surveys.paging.trials import Book


@pytest.mark.slow
def test_a_lost_needle_shows_and_a_found_one_too(surveyed):
    at = {(t.data["pattern"], t.data["policy"]): t for t in records(surveyed, "accuracy") if t.data["share"] == 0.3}
    assert facts.verdict_on_needle(at["needle", "sink_window"]) == "LOST"
    assert facts.verdict_on_needle(at["needle", "top_k"]) == "FOUND"
    assert at["needle", "sink_window"].data["mass_mean"] < 0.1 < 0.8 < at["needle", "top_k"].data["mass_least"]
    assert at["drifting", "sink_window"].data["mass_mean"] > 0.9
    assert len(at) == 10


SMALL = replace(PLAN, accuracy=PLAN.accuracy.with_(seqlen_k=600, page_size=64), accuracy_shares=(0.3,))


def test_a_window_has_as_many_pages_as_the_other_policy():
    assert policies(0.3, 10) == {"top_k": TopK(share=0.3), "sink_window": SinkWindow(1, 2)}
    assert policies(0.31, 10)["sink_window"] == SinkWindow(1, 3)
    assert policies(0.01, 10)["sink_window"] == SinkWindow(1, 1), "the last page is always there"


def test_the_pages_hold_the_patterns_keys_in_order():
    q, cache = pattern_cache(SMALL.accuracy, "needle", "cpu", 3)
    _, k, v = make_attention(SMALL.accuracy, "needle", seed=3)
    assert cache.num_pages == 2 * 10 and cache.max_length == 600 and q.shape[0] == 2
    for row in range(2):
        k_row, v_row, _ = gather(cache, row)
        assert torch.equal(k_row, k[row]) and torch.equal(v_row, v[row])
    page = cache.page_table[1, 9]  # of the last one 24 slots hold a key
    assert torch.equal(cache.key_bounds[page, :, 0], k[1, :, 576:].amin(dim=1))
    spread = make_attention(SMALL.accuracy, "needle", seed=3, channels=64)[1]
    assert torch.equal(gather(pattern_cache(SMALL.accuracy, SPREAD, "cpu", 3)[1], 0)[0], spread[0])


def test_figures_of_a_policy_that_takes_every_page():
    found = _judge(*pattern_cache(SMALL.accuracy, "peaked", "cpu", 0), SinkWindow(0, 10))
    assert found["pages_share"] == 1.0 and found["lost"] == 0 and found["queries"] == 2 * 8
    assert found["mass_mean"] == pytest.approx(1.0) and found["error_largest"] < 1e-12
    lost = _judge(*pattern_cache(SMALL.accuracy, "needle", "cpu", 0), SinkWindow(0, 1))
    assert lost["lost"] == 16 and lost["mass_mean"] < 0.2 and lost["pages_share"] == pytest.approx(0.1)


class Broken:
    def select(self, q, cache):
        raise IndexError("past the end")


def test_a_policy_or_pattern_that_breaks_is_a_record_and_the_rest_goes_on(run, monkeypatch):
    real = accuracy.pattern_cache

    def some(problem, pattern, *rest):
        if pattern == "diffuse":
            raise MemoryError("no room")
        return real(problem, pattern, *rest)

    monkeypatch.setattr(accuracy, "pattern_cache", some)
    monkeypatch.setattr(accuracy, "policies", lambda share, pages: {"broken": Broken(), "window": SinkWindow(1, 2)})
    book = Book(run, lambda line: None)
    accuracy.measure_accuracy(book, SMALL)
    by = {(t.data["pattern"], t.data.get("policy")): t for t in book.trials}
    assert len(by) == 4 * 2 + 1 and by["diffuse", None].reason == "MemoryError: no room"
    assert {t.status for (_, policy), t in by.items() if policy == "window"} == {"ok"}
    assert {t.reason for (_, policy), t in by.items() if policy == "broken"} == {"IndexError: past the end"}
