"""What each policy loses on each pattern, as records: a lost needle shows."""

from __future__ import annotations

from support.paging_surveys import records

from flashcore.paging_survey import facts


def test_a_lost_needle_shows_and_a_found_one_too(surveyed):
    at = {(t.data["pattern"], t.data["policy"]): t for t in records(surveyed, "accuracy") if t.data["share"] == 0.3}
    assert facts.verdict_on_needle(at["needle", "sink_window"]) == "LOST"
    assert facts.verdict_on_needle(at["needle", "top_k"]) == "FOUND"
    assert at["needle", "sink_window"].data["mass_mean"] < 0.1 < 0.8 < at["needle", "top_k"].data["mass_least"]
    assert at["drifting", "sink_window"].data["mass_mean"] > 0.9
    assert len(at) == 10
