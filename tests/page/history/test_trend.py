"""The trend of many runs, machine by machine."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from support import synthetic_records as synthetic
from support.synthetic_history import OURS_US, PEER_US, snapshot

from flashcore.page.history import views
from flashcore.page.history.runs import Snapshot
from flashcore.page.history.trend import FIRST, trend
from flashcore.problem import square


@pytest.mark.slow
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


def on(day: int, name: str, **more) -> Snapshot:
    date = more.pop("date", f"2001-02-0{day}T00:00:00")
    return Snapshot(name, snapshot(name, **more).trials, synthetic.environment(date=date))


def test_runs_that_did_not_time_the_problem_give_no_point():
    assert trend([on(1, "a"), on(2, "b")], square(1, 2, 77, 64)) == {}
    assert trend([]) == {}
    (points,) = trend([on(1, "a"), on(2, "empty", trials=[]), on(3, "c")]).values()
    assert list(dict.fromkeys(p.run for p in points)) == ["a", "c"]
    last = [p for p in points if p.run == "c" and p.backend == "wmma"]
    assert last[0].word == "same", "held against the last run that timed it"


def test_machines_are_apart_and_each_begins_anew():
    elsewhere = Snapshot("z", snapshot("z").trials, synthetic.environment(gpu="SYNTHETIC H100", date="2001-02-09"))
    nowhere = Snapshot("y", snapshot("y").trials, {})
    machines = trend([on(1, "a"), elsewhere, nowhere])
    assert set(machines) == {"SYNTHETIC H200", "SYNTHETIC H100", "machine not known"}
    assert {p.word for points in machines.values() for p in points} == {FIRST}


def test_a_backend_that_was_left_out_once_is_held_against_the_run_that_had_it():
    without = on(2, "b")
    gone = Snapshot("b", tuple(t for t in without.trials if t.backend != "wmma"), without.environment)
    (points,) = trend([on(1, "a"), gone, on(3, "c", faster=1.5)]).values()
    assert [(p.run, p.word) for p in points if p.backend == "wmma"] == [("a", FIRST), ("c", "faster")]
    assert [p.run for p in points if p.backend == "sdpa-cudnn"] == ["a", "b", "c"]


def test_a_variant_is_a_line_of_its_own_and_a_run_without_a_date_says_so():
    base = snapshot("a")
    variant = [t.model_copy(update={"variant": "v2"}) for t in base.trials if t.backend == "wmma"]
    (points,) = trend([Snapshot("a", (*base.trials, *variant), synthetic.environment(date=""))]).values()
    assert {"wmma", "wmma (v2)"} <= {p.backend for p in points}
    assert trend([Snapshot("a", base.trials, synthetic.environment(date="once"))])["SYNTHETIC H200"][0].day == (
        "date not known"
    )


def test_other_source_is_said_and_a_point_is_plain_data():
    now = on(2, "b")
    edited = tuple(t.model_copy(update={"source_hash": "f" * 16}) if t.backend == "wmma" else t for t in now.trials)
    (points,) = trend([on(1, "a"), Snapshot("b", edited, now.environment)]).values()
    first, last = (p.as_dict() for p in points if p.backend == "wmma")
    assert (first["word"], first["basis"], first["other_source"]) == (FIRST, "none", False)
    assert last["other_source"] and last["source_hash"] == "f" * 16 and last["role"] == "ours"
    assert last["best_peer"] == "sdpa-cudnn" and last["ratio_to_best_peer"] == pytest.approx(PEER_US / OURS_US)
    assert last["spread_us"][0] < last["latency_us"] == OURS_US < last["spread_us"][1]
    peer = next(p.as_dict() for p in points if p.backend == "sdpa-cudnn")
    assert peer["best_peer"] == "sdpa-flash", "a peer is held against the best of the others"
