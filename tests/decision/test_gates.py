"""The gates file: gates and options as data, and one clear error where they make no sense."""

from __future__ import annotations

import pytest
from support import synthetic_records as synthetic
from support.decisions import GATES, GOOD, REPORT, decide, gate, without_paging

from flashcore import page
from flashcore.decision import advice, seal, verdict
from flashcore.decision.gates import Gate
from flashcore.errors import GatesError
from flashcore.problem import parse_problem

GATE = """
[[gate]]
id = "speed"
title = "Fast enough"
kind = "attention_timing"
problem = "report"
metric = "tflops"
at_least = 320
required = true
measure = "flashcore report"
"""


def load(tmp_path, text: str) -> verdict.Gates:
    path = tmp_path / "gates.toml"
    path.write_text(text, encoding="utf-8")
    return verdict.load_gates(path)


def test_a_small_gates_file_loads(tmp_path):
    (only,) = load(tmp_path, GATE)
    assert only.threshold == 320 and only.comparison == "at least"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("at_least = 320", "at_least = ", 8, "not TOML"),
        ("at_least = 320", "", 2, "exactly one of at_least and at_most"),
        ("at_least = 320", "at_least = 320\nat_most = 1", 2, "exactly one"),
        ("at_least = 320", "at_least = inf", 8, "at_least"),
        ("at_least = 320", 'at_least = "many"', 8, "at_least"),
        ("at_least = 320", "at_leest = 320", 8, "no key 'at_leest'"),
        ('"tflops"', '"gflops"', 7, "no metric 'gflops'"),
        ('"tflops"', '"correct_percent"', 2, "belongs to kind 'correctness'"),
        ('"report"', '"reprot"', 6, "no problem 'reprot'"),
        ('"report"', '"B=0,H=1,S=1,D=64"', 6, "batch"),
        ('"report"', '"any"', 2, "on one problem"),
        ('"attention_timing"', '"timing"', 5, "no kind 'timing'"),
        ('id = "speed"\n', "", 2, "'id' is missing"),
        ('"speed"', '"Speed gate"', 3, "id"),
        ("required = true", "required = false", None, "no gate is required"),
        ("[[gate]]", "[[gates]]", 2, "no 'gates' here"),
        ("at_least = 320", 'at_least = "320"', 8, "at_least"),
        ("required = true", 'required = "yes"', 9, "required"),
        ("at_least = 320", 'why = """\n[[gate]]\nid = 3\n"""\nat_leest = 320', 12, "no key 'at_leest'"),
        ("[[gate]]", 'rank_options_by = "fast"\n[[gate]]', 2, "no gate 'fast' to rank options by"),
        ("[[gate]]", "options_judged_by = 3\n[[gate]]", 2, "who judged effort and risk is told in words"),
    ],
)
def test_a_bad_gates_file_is_one_error_with_line_and_reason(tmp_path, old, new, line, words):
    assert old in GATE
    with pytest.raises(GatesError) as caught:
        load(tmp_path, GATE.replace(old, new, 1))
    assert words in caught.value.reason and caught.value.line == line
    assert "gates.toml" in str(caught.value) and "\n" not in caught.value.reason


def test_duplicate_gates_are_an_error_at_the_second(tmp_path):
    with pytest.raises(GatesError) as caught:
        load(tmp_path, GATE + GATE)
    assert caught.value.line == 13 and "two gates" in caught.value.reason


@pytest.mark.parametrize("text", ["", "gate = 3\n", "gate = []\n"])
def test_a_file_without_gates_is_an_error(tmp_path, text):
    with pytest.raises(GatesError, match="there is no gate in it"):
        load(tmp_path, text)


def test_a_gates_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(GatesError, match="cannot be read"):
        verdict.load_gates(tmp_path / "none.toml")


def test_a_gate_on_any_kind_of_record(tmp_path):
    text = GATE + (
        '[[gate]]\nid = "spills"\ntitle = "No spills"\nkind = "build"\nmetric = "data.spill_bytes"\nat_most = 0\n'
        'where = { kernel = "attention_wmma" }\nrequired = true\nmeasure = "flashcore build"\n'
    )
    gates = load(tmp_path, text)
    spilled = [t.model_copy(update={"data": {**t.data, "spill_bytes": 8}}) if t.kind == "build" else t for t in GOOD]
    for trials, state in ((GOOD, "PASS"), (spilled, "FAIL"), ([], "INCONCLUSIVE")):
        decision = verdict.decide(trials, gates, environment=synthetic.environment(), current_hashes=synthetic.HASHES)
        assert gate(decision, "spills").state == state


def test_a_timing_is_taken_as_it_was_asked_for_and_other_records_by_their_data():
    timed = synthetic.timing("wmma", REPORT, 500.0, round_="r")
    assert (timed.timing.method, timed.timing.l2) == ("graph_replay", "rotating")
    wanted = GATES.get("report-320").model_copy(update={"method": None, "l2": None})
    for changes, takes in (
        ({}, True), ({"method": "graph_replay"}, True), ({"l2": "rotating"}, True), ({"method": "host"}, False),
        ({"l2": "warm"}, False), ({"method": "graph_replay", "l2": "warm"}, False),
        ({"method": "host", "l2": "rotating"}, False), ({"where": {"role": "ours"}}, False),
    ):  # fmt: skip
        assert wanted.model_copy(update=changes).takes(timed) is takes, changes
    check = synthetic.correctness("wmma", REPORT)
    assert wanted.model_copy(update={"method": "host", "l2": "warm"}).takes(check), "a check has no clock"
    assert wanted.wants(timed) and not wanted.wants(check)
    for changes in ({"backend": "scalar"}, {"problem": "latency"}, {"method": "host"}, {"where": {"role": "ours"}}):
        assert not wanted.model_copy(update=changes).wants(timed), changes


def test_shipped_gates_cover_the_targets():
    by_id = {g.id: g for g in GATES}
    assert by_id["report-320"].threshold == 320 and by_id["report-450"].threshold == 450
    assert by_id["latency-5us"].threshold == 5 and by_id["latency-5us"].comparison == "at most"
    assert parse_problem(by_id["report-ahead"].problem) == REPORT


# --- options in the file -------------------------------------------------------------------------------------------
FILE = '''
[[gate]]
id = "speed"
title = "Fast enough"
kind = "attention_timing"
backend = "ours"
problem = "report"
metric = "tflops"
at_least = 320
required = true
measure = "flashcore report"

[[option]]
id = "A"
title = "One"
means = """
[[option]]
id = "not a header"
"""
effort = "none"
risk = "none"
backend = "wmma"
conditions = [
    "speed",
]

[[option]]
id = "B"
title = "Two"
means = "Another thing."
effort = "much"
risk = "high"
[[option.condition]]
id = "spills"
title = "No spills"
kind = "build"
metric = "data.spill_bytes"
at_most = 0
measure = "flashcore build"
'''


def test_a_gate_on_ours_asks_the_options_own_backend(tmp_path):
    gates = load(tmp_path, FILE)
    (asked,) = gates.options[0].asked(gates)
    assert asked.backend == "wmma" and asked.title == "Fast enough (wmma)" and gates.get("speed").backend == "ours"
    (own,) = gates.options[1].asked(gates)
    assert isinstance(own, Gate) and own.required and own.metric == "data.spill_bytes"
    assert decide(without_paging(GOOD), gates).recommended.id == "A"
    assert load(tmp_path, 'rank_options_by = "speed"\n' + FILE).rank_options_by == "speed"
    by_name = load(tmp_path, FILE.replace('backend = "ours"', 'backend = "scalar"'))
    assert by_name.options[0].asked(by_name) == (by_name.get("speed"),), "a gate on one backend stays on that"
    nobody = load(tmp_path, FILE.replace('backend = "wmma"\n', ""))
    assert nobody.options[0].asked(nobody) == (nobody.get("speed"),), "an option of no backend takes the best of ours"


def test_effort_and_risk_are_told_only_under_the_name_of_who_judged_them(tmp_path):
    nobody = decide(without_paging(GOOD), load(tmp_path, FILE))
    assert all("Effort" not in row and "Risk" not in row for row in advice.matrix_rows(nobody.options))
    assert "much" not in page.options_html(nobody) and "judged them" not in page.options_html(nobody)
    known = decide(without_paging(GOOD), load(tmp_path, f'options_judged_by = "Ada, May 2030"\n{FILE}'))
    row = next(row for row in advice.matrix_rows(known.options) if row["Option"].startswith("B"))
    assert (row["Effort"], row["Risk"], row["Judged by"]) == ("much", "high", "Ada, May 2030")
    html = page.options_html(known)
    assert "Effort and risk, as Ada, May 2030 judged them" in html and "much; high risk" in html


def test_who_judged_is_no_part_of_what_a_run_is_sealed_with(tmp_path):
    """Nothing hangs on these words, and a recorded run keeps its seal when they are added."""
    bare, named = load(tmp_path, FILE), load(tmp_path, f'options_judged_by = "Ada"\n{FILE}')
    assert seal._of_gates(bare) == seal._of_gates(named)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        (
            '    "speed",',
            '    "sped",',
            24,
            "option 'A': there is no gate 'sped'; use one of speed, or write it below as an [[option.condition]]. "
            "Did you mean 'speed'?",
        ),
        ('    "speed",', '    "speed",\n    "speed",', 24, "named twice"),
        ('conditions = [\n    "speed",\n]\n', "", 13, "it has no condition; name gates in 'conditions'"),
        ('id = "B"', 'id = "A"', 28, "two options with the id 'A'"),
        ('effort = "much"\n', "", 27, "the key 'effort' is missing"),
        ('risk = "high"', 'risk = "high"\nprice = 3', 33, "there is no key 'price'; the keys are id, title"),
        ('risk = "high"', "risk = 3", 32, "risk"),
        ('backend = "wmma"', 'backend = "ours"', 22, "name it instead of a group"),
        ('conditions = [\n    "speed",\n]\n', "conditions = 3\n", 23, "conditions"),
        ('id = "spills"', 'id = "speed"', 34, "there is another gate or condition with the id 'speed'; choose"),
        ("at_most = 0", "at_most = 0\nat_least = 1", 33, "option 'B', condition 'spills': a gate needs exactly one"),
        ("at_most = 0", 'at_most = "none"', 38, "option 'B', condition 'spills': at_most"),
        ('metric = "data.spill_bytes"', 'metric = "spills"', 37, "there is no metric 'spills'"),
        ('kind = "build"', 'kind = "builds"', 36, "there is no kind 'builds'; use one of ceiling"),
        ("at_most = 0", "at_mst = 0", 38, "there is no key 'at_mst'"),
        ("at_most = 0", "at_most = 0\nrequired = false", 39, "required"),
        ('risk = "high"', "risk = ", 32, "not TOML"),
    ],
)
def test_a_bad_option_is_one_error_with_file_line_and_reason(tmp_path, old, new, line, words):
    assert old in FILE
    with pytest.raises(GatesError) as caught:
        load(tmp_path, FILE.replace(old, new, 1))
    assert words in caught.value.reason and caught.value.line == line, caught.value
    assert f"gates.toml, line {line}: " in str(caught.value) and "\n" not in caught.value.reason


@pytest.mark.parametrize("text", ["option = 3\n", "option = [3]\n"])
def test_options_that_are_no_tables_are_an_error(tmp_path, text):
    with pytest.raises(GatesError, match=r"line 1: write each option as a \[\[option\]\] table"):
        load(tmp_path, text + FILE.split("[[option]]")[0])
