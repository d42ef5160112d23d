"""Tables from records: the numbers are the records', states are words, and every cell is escaped."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from support import synthetic_records as synthetic
from support.html_tools import Cells, row

from flashcore.decision import compare, verdict
from flashcore.page.drawing import html_tables, plots
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


def test_the_sentence_on_checks_has_the_worst_of_all_of_them():
    near = synthetic.correctness("wmma", PRESETS["tiny"])
    near = near.model_copy(update={"correctness": near.correctness.model_copy(update={"max_abs_error": 9e-4})})
    far = synthetic.correctness("cpu", REPORT)
    far = far.model_copy(
        update={"correctness": far.correctness.model_copy(update={"max_abs_error": 0.5, "bound": 1.0})}
    )
    broken = synthetic.correctness("wmma", REPORT, status="error", correctness=None, reason="it crashed")
    assert html_tables.correctness_sentence([near, far, broken]) == (
        "All 2 checks of 2 implementations are right. 1 more did not finish. The error nearest its bound is 96 % of "
        f"it (wmma at {html_tables.spaced(PRESETS['tiny'])}), and the largest is 0.500 (cpu)."
    )
    assert html_tables.correctness_sentence([near]).startswith("The one check of 1 implementation is right. ")
    assert html_tables.correctness_sentence([broken]) == html_tables.correctness_sentence([]) == ""


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


def test_a_sentence_stands_where_there_is_nothing_and_is_escaped():
    assert html_tables.nothing("No <record>.") == '<p class="fc-none">No &lt;record&gt;.</p>'


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("cudnn", 91900, "9.19.0"), ("cudnn", 8907, "8907"), ("cublaslt", 130100, "13.1.0"),
     ("cuda_driver", 13000, "13.0"), ("cuda_driver", 12040, "12.4"),
     ("cudnn", "9.1 of a friend", "9.1 of a friend"), ("cudnn", True, "True")],
)  # fmt: skip
def test_a_version_that_comes_as_one_number_is_written_as_people_do(name, value, words):
    assert html_tables.version_words(name, value) == words
    found = row(html_tables.environment_table({"before": {name: value}}), html_tables.ENVIRONMENT_ROWS[name])
    assert found["Before"] == words


def test_what_was_not_measured_becomes_one_sentence_behind_the_rest_for_each_command():
    a, b = (html_tables.Unmeasured(part, command="measure it") for part in ("one <part>", "another"))
    other = html_tables.Unmeasured("a third", command="measure more")
    assert a == html_tables.nothing("Not measured yet: one <part>. Run 'measure it' on an H100 or H200.")
    both = html_tables.nothing("Not measured yet: one <part>; another. Run 'measure it' on an H100 or H200.")
    assert html_tables.gathered([a, "<p>x</p>", other, "", b, "<p>y</p>"]) == f"<p>x</p><p>y</p>{both}{other}"
    assert html_tables.gathered(["<p>x</p>"]) == "<p>x</p>" and html_tables.gathered([]) == ""


def test_a_table_that_scrolls_can_be_reached_and_one_that_stacks_need_not():
    scrolls = html_tables.table_html([{"a": math.nan}], 'says "x"', note="<n>", css="mine")
    assert 'class="fc-table scroll mine" tabindex="0" role="group" aria-label="says &#34;x&#34;"' in scrolls
    assert '<p class="fc-note">&lt;n&gt;</p>' in scrolls and "not known" in scrolls
    assert "tabindex" not in html_tables.table_html([{"a": 1}], "c", stack=True)


def test_of_a_backends_several_timings_the_last_is_in_the_table():
    first, last = (synthetic.timing("wmma", REPORT, us, round_="r") for us in (100.0, 200.0))
    groups = html_tables.by_problem([first, synthetic.correctness("wmma", REPORT), last])
    assert groups == {"B=16, H=16, S=2048, D=64": [last]}


def test_without_a_peer_of_the_round_nothing_is_compared():
    alone = synthetic.timing("wmma", REPORT, 1000.0, round_="r")
    peer = synthetic.timing("sdpa-cudnn", REPORT, 500.0, round_="another")
    found = row(html_tables.times_table([alone, peer]), html_tables.spaced(REPORT))
    assert (found["Best peer"], found["In words"]) == ("none in this round", "not compared")
    assert "Ratio" not in found, "a column that would be empty"
    both = [alone, synthetic.timing("sdpa-cudnn", REPORT, 500.0, round_="r")]
    found = row(html_tables.times_table(both), html_tables.spaced(REPORT))
    assert (found["Best peer"], found["In words"]) == ("sdpa-cudnn", "slower")
    assert float(found["Ratio"].removesuffix(" ×")) == pytest.approx(0.5, rel=0.01)


def test_small_problems_stand_with_the_fastest_first():
    problem = PRESETS["latency"]
    trials = [synthetic.timing(b, problem, us, round_="r") for b, us in (("slow", 9.0), ("fast", 3.0))]
    trials.append(synthetic.timing("alone", problem, 5.0, round_="r", samples=0))
    rows = Cells(html_tables.latency_table(trials)).rows
    assert [r[1] for r in rows[1:]] == ["fast", "alone", "slow"]
    assert dict(zip(rows[0], rows[2], strict=True))["Median within, µs"] == "not known"
    assert rows[1][6] == "graph replay, L2 warm" and rows[1][4] == "30" and rows[1][5] == "21.4"


def test_the_worst_check_is_the_one_nearest_its_bound_and_a_broken_one_is_said():
    near = synthetic.correctness("wmma", PRESETS["tiny"])
    near = near.model_copy(update={"correctness": near.correctness.model_copy(update={"max_abs_error": 9e-4})})
    broken = synthetic.correctness("wmma", REPORT, status="error", correctness=None, reason="it crashed")
    found = row(html_tables.correctness_table([synthetic.correctness("wmma", REPORT), near, broken]), "wmma")
    assert (found["Result"], found["Checks passed"]) == ("1 did not finish", "2 of 3")
    assert found["At"] == html_tables.spaced(PRESETS["tiny"]) and found["Error nearest its bound"] == "9.00e-04"
    assert found["Share of its bound"] == "96 %"
    assert "it crashed" in html_tables.findings_table([broken])


def test_what_was_not_checked_stands_below_the_table_by_reason_and_not_as_rows_of_dashes():
    reasons = {"fa3": "not <there>", "fa4": "no GPU", "hopper": "no GPU"}
    away = [
        Trial(kind="correctness", backend=name, status="unavailable", reason=why)
        for name, why in reasons.items() for _ in range(2)
    ]  # fmt: skip
    said = '<p class="fc-note">Not checked: fa3 (not &lt;there&gt;); fa4, hopper (no GPU).</p>'
    assert html_tables.correctness_table(away) == said
    html = html_tables.correctness_table([*away, synthetic.correctness("wmma", REPORT)])
    assert html.endswith(said) and row(html, "wmma")["Result"] == "all right" and html.count('scope="row"') == 1
    many = [Trial(kind="correctness", backend=f"b{n}", status="unavailable", reason=f"why {n}") for n in range(3)]
    html = html_tables.correctness_table([*many, synthetic.correctness("wmma", REPORT)])
    folded = html[html.index("<details") :]
    assert "<summary>3 that were not checked, and why<" in folded and row(folded, "b1")["Why"] == "why 1"
    failed = synthetic.correctness("hopper", REPORT, status="failed")
    assert row(html_tables.correctness_table([*away, failed]), "hopper")["Result"] == "WRONG in 1 of 1"


def test_traced_builds_are_left_out_and_tensor_instructions_are_counted():
    data = {
        "kernel": "k",
        "head_dim": 64,
        "dtype": "float16",
        "registers": 168,
        "spill_bytes": 0,
        "shared_bytes": 40960,
    }
    builds = [{**data, "tensor_instructions": {"HGMMA": 32}}, {**data, "kernel": "none", "tensor_instructions": {}},
              {**data, "kernel": "unread"}, {**data, "kernel": "traced", "trace": True}]  # fmt: skip
    html = html_tables.build_table([Trial(kind="build", data=d) for d in builds])
    assert (
        row(html, "k")["Tensor Core instructions"] == "32 HGMMA" and row(html, "k")["Shared memory, bytes"] == "40,960"
    )
    assert row(html, "none")["Tensor Core instructions"] == "none" and "traced" not in html
    assert row(html, "unread")["Tensor Core instructions"] == "not disassembled"


def test_ceilings_that_failed_are_left_out():
    good = Trial(kind="ceiling", data={"name": "graph_node", "value": 2.2, "unit": "us"})
    odd = Trial(kind="ceiling", data={"name": "odd", "value": "x"})
    html = html_tables.ceilings_table([good, odd, good.model_copy(update={"status": "error"})])
    assert row(html, "graph node")["Unit"] == "µs" and row(html, "graph node")["Measured"] == "2.20"
    assert row(html, "odd")["Measured"] == "not a number" and len(Cells(html).rows) == 3


def test_facts_of_the_machine_have_sensible_units():
    before = {"memory_bytes": 139 * 2**30, "l2_bytes": 60 * 2**20, "throttle_reasons": [], "own_fact": {"a_b": 1}}
    html = html_tables.environment_table({"before": before, "after": {**before, "throttle_reasons": ["heat", "power"]}})
    assert row(html, "GPU memory")["Before"] == "139.0 GiB" and row(html, "L2 cache")["Before"] == "60 MiB"
    held = row(html, "Held down by")
    assert (held["Before"], held["After"]) == ("nothing", "heat, power") and row(html, "own fact")["Before"] == "a b 1"
    assert row(html_tables.environment_table({"before": before}), "GPU memory")["After"] == "not recorded"


def with_extra(trial, *, version=None, **more):
    data = {**trial.data, **({"version": version} if version else {})}
    return trial.model_copy(update={"timing": trial.timing.model_copy(update=more), "data": data})


def timed_trials():
    return [t for t in TRIALS if t.kind == "attention_timing" and t.problem == REPORT and t.timing is not None]


def test_a_peers_version_stands_beside_its_name():
    trials = [with_extra(t, version="cuDNN 9.19.0" if t.backend == "sdpa-cudnn" else None) for t in timed_trials()]
    assert row(html_tables.times_table(trials), html_tables.spaced(REPORT))["Best peer"] == "sdpa-cudnn (cuDNN 9.19.0)"
    assert html_tables.with_version(trials[0]) == trials[0].backend


def test_shares_of_the_data_sheet_are_columns_where_there_are_some():
    plain = html_tables.times_table(timed_trials())
    assert "Of peak" not in plain and "Of memory" not in plain
    html = html_tables.times_table([with_extra(t, peak_share=0.6214) for t in timed_trials()])
    assert row(html, html_tables.spaced(REPORT))["Of peak"] == "62 %" and "at the clock seen during the timing" in html
    junk = html_tables.times_table([with_extra(t, peak_share="a lot", memory_share=math.nan) for t in timed_trials()])
    assert "Of peak" not in junk


def test_two_clocks_are_held_against_each_other_in_one_sentence():
    trials = timed_trials()
    assert html_tables.clocks_sentence(trials) == ""
    shares = (0.93, 1.02)
    both = [with_extra(t, cupti_us=s * compare.latency_us(t)) for t, s in zip(trials, shares, strict=False)]
    sentence = html_tables.clocks_sentence([*both, *trials[2:]])
    assert "the kernels of each of 2 calls take 0.930 to 1.02 times what the call takes in a graph" in sentence
    assert sentence in html_tables.times_table([*both, *trials[2:]])
    assert "the kernels of a call take 0.930 times" in html_tables.clocks_sentence(both[:1])
    junk = [with_extra(trials[0], cupti_us="soon"), with_extra(trials[1], cupti_us=-1.0)]
    assert html_tables.clocks_sentence(junk) == ""
