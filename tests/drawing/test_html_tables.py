"""Tables from records: the numbers are the records', states are words, and every cell is escaped."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from support import synthetic_records as synthetic
from support.html_tools import row

from flashcore.decision import compare, verdict
from flashcore.drawing import html_tables, plots
from flashcore.problem import PRESETS
from flashcore.records import Trial

TRIALS = synthetic.gpu_trials()
REPORT = PRESETS["report"]


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
