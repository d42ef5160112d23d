"""The trend of many runs, machine by machine."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from support import synthetic_records as synthetic
from support.synthetic_history import OURS_US, PEER_US, snapshot

from flashcore.history import views
from flashcore.history.runs import Snapshot
from flashcore.history.trend import FIRST, trend


def test_a_trend_by_date_with_a_figure_that_says_its_message():
    runs = [
        Snapshot(name, snapshot(name, faster=faster).trials, synthetic.environment(date=f"2001-02-0{day}T00:00:00"))
        for name, faster, day in (("c", 1.2, 3), ("a", 1.0, 1), ("b", 1.0, 2))
    ]
    machines = trend([*runs, snapshot("elsewhere", gpu="SYNTHETIC H100")])
    points = [p for p in machines["SYNTHETIC H200"] if p.backend == "wmma"]
    assert [(p.run, p.word) for p in points] == [("a", FIRST), ("b", "same"), ("c", "faster")]
    assert points[-1].ratio.value == pytest.approx(1.2 * PEER_US / OURS_US) and points[-1].peer == "sdpa-cudnn"
    html = views.trend_html(machines)
    assert html.count("<svg") == 1, "one run is no trend"
    figure = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    assert figure.get("role") == "img" and "wmma 550, then 660 TFLOPS (faster" in figure.get("aria-label")
    assert "no trend" in views.trend_html(trend(runs[:1]))
