"""The pictures of a bisection: from the record alone, in words and not in colours, with a text alternative."""

from __future__ import annotations

import re

import pytest
from support.sampling import first

from flashcore.bisection.bisecting import GRID_CELLS, bisect
from flashcore.bisection.faults.catalogue import get
from flashcore.page.drawing import stage_plots
from flashcore.problem import square
from flashcore.records import Trial


def recorded(found) -> Trial:
    return Trial.model_validate_json(found.to_trial().model_dump_json())


def words_of(html: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", html)


@pytest.fixture(scope="module")
def clean() -> Trial:
    return recorded(bisect("cpu", square(1, 2, 128, 32, page_size=32)))


@pytest.fixture(scope="module")
def planted() -> Trial:
    fault = get("F8")
    return recorded(bisect(fault.plant("cpu"), fault.problem))


def test_a_clean_map_has_a_figure_in_each_cell_and_no_fail(clean):
    html = stage_plots.error_html(clean)
    assert 'role="img"' in html and "All are within; the largest share is 0." in html
    words = words_of(html)
    assert "FAIL" not in words and {"scores", "row_max", "lse", "0", "3", "end"} <= set(words)
    assert len([w for w in words if re.fullmatch(r"\d\.\d\d", w)]) == 6 * 4 + 2


def test_a_map_says_fail_where_the_bug_was_made_and_where_it_went(planted):
    local, overall = (stage_plots.error_html(planted, view=v) for v in ("local", "global"))
    assert words_of(local).count("FAIL") == 4 and "Beyond the bound: scores (4 of 4 cells)." in local
    assert words_of(overall).count("FAIL") == 4 * 4 + 2 and "accum (4 of 4 cells)" in overall


@pytest.mark.slow
def test_many_pages_share_cells_and_none_is_lost():
    found = bisect(get("F15").plant("cpu"), square(1, 1, 40 * 16, 16, page_size=16))
    grid = recorded(found).data["grid"]
    assert grid["pages_a_cell"] == 4 and all(len(v) <= GRID_CELLS for v in grid["local"].values())
    assert [float(s) > 1 for s in grid["local"]["scores"]] == [False] * 9 + [True]
    assert "pages of keys, 4 a cell" in words_of(stage_plots.error_html(recorded(found)))


@pytest.mark.slow
def test_the_zoom_shows_got_expected_and_difference_around_the_first_bad_element(planted):
    html = stage_plots.zoom_html(planted)
    assert "values around the first bad element at row 0, column 16, got 2.35, expected 1.66" in html
    assert {"got", "expected", "difference", "row", "column", "16"} <= set(words_of(html))
    window = planted.data["window"]
    first = next(r for r in planted.data["stages"] if r["role"] == "producer")["local"]["first_bad"]
    down, across = window["at"]
    assert window["first_across"] + across == first["column"] and window["first_down"] + down == first["row"]
    assert window["got"][down][across] == pytest.approx(first["got"], rel=1e-4)
    assert window["expected"][down][across] == pytest.approx(first["expected"], rel=1e-4)
    assert window["got"][down][across - 1] == pytest.approx(window["expected"][down][across - 1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", first(["F1", "G13", "F2", "F3", "G10", "G14", "G15", "G2"], 3))
def test_every_stage_can_be_drawn_also_with_nan(name):
    fault = get(name)
    trial = recorded(bisect(fault.plant("cpu"), fault.problem, pattern=fault.pattern))
    assert fault.stage in stage_plots.zoom_html(trial)
    assert "FAIL" in words_of(stage_plots.error_html(trial))
    if name in ("F2", "F3", "G15"):
        assert "NaN" in words_of(stage_plots.zoom_html(trial))


@pytest.mark.slow
def test_a_bisection_shows_its_finding_and_folds_what_is_right(clean, planted):
    html = stage_plots.bisection_html(clean)
    before, _, folded = html.partition("<details>")
    assert "cpu on B=1,H=2,S=128,D=32,page=32: PASS.</strong> every stage is right" in before
    assert "all there are." in before and folded.count("<svg") == 1 and "Stages of cpu" in folded
    html = stage_plots.bisection_html(planted, planted="F8")
    assert "with F8 planted" in html and "FAIL.</strong> scores goes wrong first" in html
    assert "<details>" not in html and html.count("<svg") == 3, "both maps and the zoom stand open"
    away = Trial(kind="bisection", backend="<wmma>", status="unavailable", reason="no GPU")
    assert stage_plots.bisection_html(away) == (
        "<p><strong>&lt;wmma&gt; on no problem: unavailable.</strong> no GPU. "
        "Coverage: 0 values, not all there are.</p>"
    )


def test_nothing_to_draw_is_a_sentence(clean):
    assert "Nothing to look at closely" in stage_plots.zoom_html(clean)
    trial = Trial(kind="bisection", backend="wmma", status="unavailable", reason="no GPU")
    assert "No stages were judged: no GPU." in stage_plots.error_html(trial)
