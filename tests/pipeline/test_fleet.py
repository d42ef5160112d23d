"""`flashcore fleet` as a run of its own: records, environment and page, from a made-up pool."""

from __future__ import annotations

import json

import pytest
from support import synthetic_fleet as synthetic

from flashcore.measure import cards
from flashcore.measure.cluster import Place
from flashcore.pipeline import fleet as fleets


class Pool:
    """Three places; what they measure is made up."""

    places = tuple(
        Place("box", f"GPU-{i}", "NVIDIA H200", "1.0", "aa", {"torch": "2.13.0"}, name=str(i)) for i in range(3)
    )


@pytest.mark.slow
def test_a_fleet_has_a_folder_with_records_the_cards_and_a_page_that_asks_for_nothing(tmp_path, monkeypatch):
    def measure(run, pool):
        return [run.append(trial) for trial in synthetic.cards(factors={"attention": 0.5})]

    monkeypatch.setattr(cards, "measure", measure)
    run, found, page = fleets.compare_cards(Pool(), out=tmp_path)
    assert not found.ok and len(run.trials(kind="fleet")) == 8
    environment = json.loads(run.environment_path.read_text())
    assert [one["card"] for one in environment["cards"]] == ["GPU-0", "GPU-1", "GPU-2"] and environment["after"]
    text = page.read_text()
    assert page.name == "fleet.html" and "1 of 8 cards are off" in text
    assert "Content-Security-Policy" in text and "http://" not in text.replace("http://www.w3.org", "")


def test_fleets_lie_beside_the_runs_and_never_among_them():
    assert fleets.fleets_dir().name == "fleets" and fleets.fleets_dir().parent == fleets.runs_dir().parent
