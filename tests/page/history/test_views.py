"""History on the page: figures and lists, and nothing where there is none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support import synthetic_records as synthetic
from support.html_tools import Cells
from support.synthetic_history import one, snapshot, write

from flashcore import page
from flashcore.decision.gates import load_gates
from flashcore.errors import RecordsError, RecordsTooNew
from flashcore.page import history
from flashcore.page.history import views
from flashcore.page.history.runs import Snapshot, newest
from flashcore.page.history.since import Since, since
from flashcore.page.history.trend import trend


def test_a_page_without_a_readable_run_before_goes_without_its_history(tmp_path):
    old = write(tmp_path, snapshot("old"), "2001-02-01T00:00:00+00:00")
    now = write(tmp_path, snapshot("now"), "2001-02-05T00:00:00+00:00")
    with old.records_path.open("a") as file:
        file.write('{"schema_version": 99, "kind": "ceiling"}\n')
    assert views.since_last_run(now) is None
    found, left_out = history.runs_in(tmp_path)
    assert [run.name for run in found] == ["now"] and "install a newer FlashCore" in left_out[0]
    with pytest.raises(RecordsTooNew):
        history.read(old)
    with pytest.raises(RecordsError, match="no folder"):
        history.runs_in(tmp_path / "nowhere")


def found(**more) -> Since:
    """What changed between two SYNTHETIC runs."""
    return since(snapshot("now", **more), snapshot("before"), gates=load_gates())


def test_the_section_says_with_what_it_compares_and_what_became_worse():
    html = views.since_body(found(faster=0.9))
    assert "<code>before</code> of 2001-02-03 on SYNTHETIC H200." in html and "12 slower" in html
    worse = html.split("<h3>What became worse</h3>")[1].split("</ul>")[0]
    assert worse.count("<li>") == 12 and "slower, −10.0 %" in worse and "Nothing: no timing" not in html


def test_nothing_worse_is_said_and_a_long_list_is_counted():
    calm = views.since_body(found())
    assert "Nothing: no timing of ours is slower" in calm and "What else changed" not in calm
    checks = [synthetic.correctness("wmma", p, status=s) for s in ("ok", "failed") for p in synthetic.problems()[:20]]
    before = Snapshot("before", tuple(checks[:20]), synthetic.environment())
    many = since(Snapshot("now", tuple(checks[20:]), synthetic.environment()), before, gates=load_gates())
    html = views.since_body(many)
    assert (
        html.count("passed and now fails") == views.MOST_ROWS and "and 8 more; <code>flashcore compare</code>" in html
    )


def test_text_of_a_run_cannot_leave_its_place():
    changed = since(snapshot("now", flashcore="<script>"), snapshot("<b>before</b>"), gates=load_gates())
    html = views.since_body(changed)
    assert "<script>" not in html and "<b>" not in html and "is &lt;script&gt;." in html


def test_the_table_of_timings_is_of_ours_alone_and_names_the_peer():
    html = views.rows_table(found(faster=1.2).comparison)
    rows = Cells(html).rows
    assert len(rows) == 1 + 12 and {r[0] for r in rows[1:]} == {"wmma"}
    first = dict(zip(rows[0], rows[1], strict=True))
    assert (first["In words"], first["Compared"]) == ("faster", "relative to sdpa-cudnn")
    assert first["Change of speed"] == "+20.0 %" and first["99 % interval"].count("%") == 1
    assert (first["µs then"], first["µs now"]) == ("500", "417")
    assert "widened by how far unchanged peers moved" in html
    assert views.rows_table(found(trials=[]).comparison) == ""


def test_what_was_not_compared_has_dashes_for_figures():
    late = [t.model_copy(update={"status": "error", "reason": "it crashed"}) for t in snapshot().trials]
    rows = Cells(views.rows_table(found(trials=late).comparison)).rows
    first = dict(zip(rows[0], rows[1], strict=True))
    assert "Change of speed" not in first and "99 % interval" not in first and "it crashed" in first["Compared"]


def on(day: int, name: str, **more) -> Snapshot:
    return Snapshot(name, snapshot(name, **more).trials, synthetic.environment(date=f"2001-02-0{day}T0{day}:30:00"))


def test_the_message_of_a_trend_tells_where_the_fastest_began_and_ended():
    (points,) = trend([on(1, "a"), on(2, "b", faster=1.2)]).values()
    said = views.trend_message(points)
    assert said.startswith("2 runs, 2001-02-01 to 2001-02-02. wmma 550, then 660 TFLOPS (faster); sdpa-cudnn 458, then")
    one_day = [replace(p, date="2001-02-01T00:00:00") for p in points]
    assert views.trend_message(one_day).startswith("2 runs, 2001-02-01. ")


def test_only_a_few_backends_of_ours_are_named_and_the_others_counted():
    base = on(1, "a")
    more = [
        t.model_copy(update={"backend": f"toy{i}"}) for i in range(4) for t in base.trials if t.backend == "wmma"
    ]  # fmt: skip
    (points,) = trend([Snapshot("a", (*base.trials, *more), base.environment)]).values()
    said = views.trend_message(points)
    assert "and 2 more of ours below them" in said and said.count("toy") == 2


def test_a_trend_of_one_day_is_told_by_the_clock_and_one_of_many_by_the_day():
    def ticks(*runs):
        (points,) = trend(runs).values()
        axes = views.trend_figure(points).axes[0]
        return [label.get_text() for label in axes.get_xticklabels()], axes.get_xlabel()

    assert ticks(on(1, "a"), on(2, "b")) == (["02-01", "02-02"], "Runs, by month and day")
    day = [replace(on(i, str(i)), environment=synthetic.environment(date=f"2001-02-01T0{i}:30:00")) for i in (1, 2)]
    assert ticks(*day) == (["01:30", "02:30"], "Runs of 2001-02-01, by time (UTC)")


def test_without_two_runs_of_one_machine_there_is_a_sentence():
    assert "there is no trend" in views.trend_html({}) and "<svg" not in views.trend_html(trend([on(1, "a")]))


def test_the_page_of_a_run_draws_the_trend_up_to_it_where_there_is_one(tmp_path):
    first = write(tmp_path, snapshot("a"), "2001-02-01T01:00:00+00:00")
    assert views.trend_beside(first) == "", "one run is no trend"
    second = write(tmp_path, snapshot("b", faster=1.2), "2001-02-02T01:00:00+00:00")
    write(tmp_path, snapshot("elsewhere"), "2001-02-01T02:00:00+00:00", gpu="SYNTHETIC H100")
    html = views.trend_beside(second)
    assert "<h3>From run to run</h3>" in html and html.count("<svg") == 1 and "2 runs, 2001-02-01 to" in html
    titles = re.findall(r"<title>([^<]*)</title>", html)
    assert len(titles) == 6 and all(re.match(r"[ab], 2001-02-0[12], [a-z-]+: .* µs, ", title) for title in titles)
    assert views.trend_beside(first) == "", "what came later is not told"
    assert "From run to run" in page.since_html(views.since_last_run(second), second)


def test_a_trend_goes_back_only_so_far(tmp_path):
    for day in range(1, 6):
        write(tmp_path, snapshot(f"r{day}", trials=one().trials), f"2001-02-0{day}T01:00:00+00:00")
    assert [s.name for s in newest(tmp_path, 3)] == ["r3", "r4", "r5"] and len(newest(tmp_path, 9)) == 5
    (tmp_path / "r4" / "environment.json").write_text("{")
    assert [s.name for s in newest(tmp_path, 3)] == ["r2", "r3", "r5"]
