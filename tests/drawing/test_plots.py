"""Figures and tables from records: the numbers are the records', nothing leaves the page, junk does not break it."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import synthetic_records as synthetic

from flashcore import page
from flashcore.decision import compare, verdict
from flashcore.drawing import html_tables, plots, svg
from flashcore.problem import PRESETS
from flashcore.records import Trial

TRIALS = synthetic.gpu_trials()
REPORT, LATENCY = PRESETS["report"], PRESETS["latency"]


def svgs(html: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", html, flags=re.S)


def label(text: str) -> str:
    return re.search(r'aria-label="([^"]*)"', text)[1]


class Cells(HTMLParser):
    """Rows of the tables in some HTML, as lists of their cells' text."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def row(html: str, first: str) -> dict[str, str]:
    rows = Cells(html).rows
    return dict(zip(rows[0], next(r for r in rows[1:] if r[0] == first), strict=True))


# --- SVG -----------------------------------------------------------------------------------------------------------


def test_an_svg_is_well_formed_named_and_asks_for_nothing():
    html = plots.tflops_html(TRIALS)
    figures = svgs(html)
    assert len(figures) == 4
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img" and len(root.get("aria-label")) > 40
        assert not re.search(r"(?:href|src)=\"(?!#)|url\((?!#)|<!DOCTYPE|<metadata|<style|<\?xml", figure)
        assert len(figure) < 40_000
        assert "<text" in figure  # words stay words, so that they can be searched and read


def test_colours_are_variables_of_the_page():
    figure = svgs(plots.tflops_html(TRIALS))[0]
    bare = re.sub(r"var\(--fc-[a-z0-9]+,\s*#[0-9a-f]{6}\)", "", figure)
    assert not re.search(r"#[0-9a-f]{6}\b", bare), re.findall(r"#[0-9a-f]{6}\b", bare)
    assert "--fc-s1" in figure and "--fc-ink" in figure


def test_every_colour_is_unlike_the_others():
    assert len(set(svg.COLOURS.values())) == len(svg.COLOURS)


def test_ids_differ_between_figures_and_every_reference_is_met():
    figures = svgs(plots.tflops_html(TRIALS))
    seen: set[str] = set()
    for figure in figures:
        ids = re.findall(r' id="([^"]+)"', figure)
        used = set(re.findall(r"#(f[0-9a-f]{8}-\d+)", figure))
        assert used and used <= set(ids) and len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)


def test_a_quote_in_the_message_does_not_end_it():
    lines = next(iter(plots.panels(TRIALS).values()))
    html = svg.figure_html(plots.tflops_figure(lines), 'says "a < b" & more', caption="<b>")
    root = ElementTree.fromstring(svgs(html)[0])
    assert root.get("aria-label") == 'says "a < b" & more' and "&lt;b&gt;" in html


# --- what the plots say --------------------------------------------------------------------------------------------


def test_the_alternative_text_carries_the_computed_numbers():
    text = label(svgs(plots.tflops_html(TRIALS))[0])
    lines = plots.panels(TRIALS)[64, False, "float16"]
    ours, peer = compare.tflops(lines["wmma"][16384]), compare.tflops(lines["sdpa-cudnn"][16384])
    assert f"At 16K, wmma reaches {compare.number(ours)} TFLOPS" in text
    assert f"sdpa-cudnn, {compare.number(peer)}" in text and "the roof is 758" in text


def test_panels_keep_one_problem_a_length_for_all_backends():
    for lines in plots.panels(TRIALS).values():
        for length in (512, 2048, 16384):
            assert len({points[length].problem for points in lines.values()}) == 1
    assert plots.panels(TRIALS)[64, False, "float16"]["wmma"][512].problem.batch == 16  # not the small one


def test_the_roof_is_the_lower_of_compute_and_memory():
    """Causal, S=512: 0.5 · 4·S²·D FLOPs over 4·S·D·2 bytes is 128 FLOPs a byte, times 4.28 TB/s is 548 TFLOPS."""
    ceilings = [t for t in TRIALS if t.kind == "ceiling"]
    roof = plots._roof(plots.panels(TRIALS)[64, True, "float16"], ceilings)
    assert roof[512] == pytest.approx(128 * 4.28) and roof[16384] == 758
    assert plots._roof(plots.panels(TRIALS)[64, True, "float16"], []) == {}


def test_ours_and_peers_differ_by_more_than_colour():
    lines = plots.panels(TRIALS)[64, False, "float16"]
    looks = plots._looks(lines)
    assert looks["wmma"][0] and not looks["sdpa-cudnn"][0]
    assert looks["wmma"][3] == "-" and looks["sdpa-cudnn"][3] != "-"
    assert len({(marker, str(dashes)) for _, _, marker, dashes in looks.values()}) == len(looks)


def test_a_backend_nobody_knew_gets_a_line():
    toy = [t.model_copy(update={"backend": "toy"}) for t in TRIALS if t.backend == "wmma"]
    assert ">toy " in svgs(plots.tflops_html([*TRIALS, *toy]))[0]


def test_the_latency_plot_names_the_target_only_where_it_was_set():
    html = plots.latency_html(TRIALS, target_us=5.0, target_problem=LATENCY)
    first, second = svgs(html)
    assert "none within the target of 5 µs" in label(first) and "target 5 µs" in first
    assert "target" not in label(second) and "target" not in second


@settings(max_examples=200)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_never_overlap_and_stay_below_the_top(wanted):
    places = plots._apart(wanted, 10.0, 100.0)
    ordered = sorted(places)
    assert all(b - a >= 10 - 1e-6 for a, b in zip(ordered, ordered[1:], strict=False))
    assert max(places) <= 100 + 1e-6


@pytest.mark.parametrize(
    "trials", [[], [synthetic.finished("01_environment")], [Trial(kind="attention_timing", backend="x")]]
)
def test_without_records_there_is_a_sentence_not_an_error(trials):
    makers = [
        plots.tflops_html, plots.latency_html, html_tables.times_table, html_tables.latency_table,
        html_tables.correctness_table, html_tables.build_table, html_tables.ceilings_table,
    ]  # fmt: skip
    for make in makers:
        assert re.fullmatch(r'<p class="fc-none">[A-Z].*\.</p>', make(trials)), make
    assert "did not record" in html_tables.environment_table({})


def test_a_nan_timing_is_left_out():
    def broken(t):
        return t.kind == "attention_timing" and t.backend == "wmma"

    trials = [
        t.model_copy(update={"timing": t.timing.model_copy(update={"latency_us": math.nan})}) if broken(t) else t
        for t in TRIALS
    ]
    html = plots.tflops_html(trials) + plots.latency_html(trials) + html_tables.times_table(trials)
    assert "wmma" not in html and "nan" not in html.lower() and "scalar" in html


# --- tables --------------------------------------------------------------------------------------------------------


def test_a_table_has_caption_scopes_and_escaped_cells():
    rows = [{"Name": "<script>", "n": 3}, {"Name": None, "n": 4}]
    html = html_tables.table_html(rows, "What & why", numeric=["n"])
    root = ElementTree.fromstring(html)
    assert root.find(".//caption").text == "What & why"
    assert [th.get("scope") for th in root.iter("th")] == ["col", "col", "row", "row"]
    assert "&lt;script&gt;" in html and "not known" in html
    assert root.find(".//td").get("class") == "num"


def test_a_stacked_table_keeps_its_roles():
    root = ElementTree.fromstring(html_tables.table_html([{"a": 1, "b": 2}], "c", stack=True))
    roles = {e.tag: e.get("role") for e in root.iter()}
    assert roles["table"] == "table" and roles["tr"] == "row" and roles["td"] == "cell"
    assert root.find(".//td").get("data-label") == "b"


def test_correctness_in_words_and_counts():
    html = html_tables.correctness_table([*TRIALS, synthetic.correctness("wmma", REPORT, status="failed")])
    found = row(html, "wmma")
    assert found["Result"] == "WRONG in 1 of 27" and found["Checks passed"] == "26 of 27"
    assert row(html, "scalar")["Result"] == "all right"


def test_findings_name_the_first_bad_element():
    html = html_tables.findings_table([synthetic.correctness("wmma", REPORT, status="failed")])
    assert "head 3, row 17, column 5, got 0.5, expected -0.25" in html
    assert html_tables.findings_table(TRIALS) == ""


def test_the_ratio_in_the_table_is_the_one_of_the_gate():
    decision = verdict.decide(
        TRIALS, verdict.load_gates(), environment=synthetic.environment(), current_hashes=synthetic.HASHES
    )
    gate = next(g for g in decision.gates if g.id == "report-ahead")
    found = row(html_tables.times_table(TRIALS), html_tables.spaced(REPORT))
    assert found["Ratio"] == f"{compare.number(gate.measured)} ×" and found["In words"] == "slower"


def test_a_kernel_that_did_not_compile_says_so():
    data = {"kernel": "attention_new", "head_dim": 64, "dtype": "float16"}
    broken = Trial(kind="build", status="error", reason="line 3: expected ';'\nmore", data=data)
    assert "did not compile: line 3: expected" in html_tables.build_table([broken])


def test_the_environment_shows_what_moved():
    html = html_tables.environment_table(synthetic.environment())
    assert row(html, "Temperature, °C") == {"Fact": "Temperature, °C", "Before": "41", "After": "63"}
    assert row(html, "Driver")["After"] == "the same"


# --- the page's parts ----------------------------------------------------------------------------------------------


def decide(trials) -> verdict.Decision:
    return verdict.decide(
        trials, verdict.load_gates(), environment=synthetic.environment(), current_hashes=synthetic.HASHES
    )


def headline(trials) -> str:
    evidence = verdict.Evidence(tuple(trials), synthetic.environment(), synthetic.HASHES)
    return page.headline_html(decide(trials), evidence)


def test_the_headline_agrees_with_the_gates():
    html = headline(TRIALS)
    assert html.count("<li>") == 4 and "131 " in html and "0.281 " in html and "14.2 " in html
    assert (
        "the best peer, sdpa-cudnn" in html
        and "Target at least 320 TFLOPS" in html
        and "Aim at least 450 TFLOPS" in html
    )


def test_nothing_measured_is_said_in_words():
    html = headline([])
    assert html.count("not measured") == 4 and "inconclusive" in html


def test_states_are_words_in_the_gates_table():
    html = page.gates_html(decide(TRIALS))
    states = [r[1] for r in Cells(html).rows[1:]]
    assert states == ["PASS", "PASS", "PASS", "FAIL", "FAIL", "FAIL", "FAIL", "PASS"]
    assert not re.search("[✅❌⚠✔✗🔴🟢]", html)


def test_what_blocks_names_gate_reason_and_command():
    html = page.blockers_html(decide(TRIALS))
    assert html.count("<li>") == 4 and "59.1 % below" in html and "make report" in html
    assert "Nothing blocks" in page.blockers_html(decide(synthetic.gpu_trials(synthetic.FAST)))


def test_an_incomplete_run_says_so_where_nothing_else_blocks():
    good = [t for t in synthetic.gpu_trials(synthetic.FAST) if t.kind != "notebook"]
    assert "the run does" in page.blockers_html(decide(good))


def test_recorded_evidence_stands_beside_the_live_one_under_its_own_heading():
    other = verdict.Recorded(tuple(TRIALS), synthetic.environment(), "synthetic")
    evidence = verdict.Evidence(
        tuple(synthetic.cpu_trials()), synthetic.environment(None), synthetic.HASHES, recorded=other
    )
    for html in (page.correctness_html(evidence), page.machine_html(evidence)):
        assert html.index("Live, on this machine") < html.index("Recorded on SYNTHETIC H200, 2001-02-03")
    assert row(page.correctness_html(evidence), "wmma")["Result"].startswith("not checked: no CUDA GPU")
    assert "SYNTHETIC H200" in page.machine_html(evidence).split("Recorded on")[1]
