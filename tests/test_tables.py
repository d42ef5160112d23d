"""Tables come from records, also from records read back from disk, and say their verdicts in words."""

import subprocess
import sys

from flashcore import tables
from flashcore.bisection.bisecting import bisect
from flashcore.measure.check import check_attention
from flashcore.problem import square
from flashcore.records import RunFolder, Trial

SMALL = square(1, 2, 40, 16, page_size=16)


def promise(number: int, backend: str, result: str, status: str = "ok", **data) -> Trial:
    data = {"promise_id": f"P{number}", "promise_name": "a name", "promise": f"Sentence {number}.", "result": result,
            "sentence": "it does", "smallest": "B=1", **data}  # fmt: skip
    return Trial(kind="diagnosis", backend=backend, variant=f"conform:P{number}", status=status, data=data)


def test_promises_stand_by_number_with_the_last_answer_of_each_implementation():
    trials = [promise(10, "a", "kept"), promise(9, "a", "broken", "failed"), promise(9, "b", "refused", "unsupported"),
              promise(9, "a", "not promised", "unsupported"), promise(1, "b", "broken", "failed"),
              promise(10, "b", "does not apply", "unsupported")]  # fmt: skip
    trials.append(Trial(kind="diagnosis", variant="F1", backend="a"))
    table = tables.conform_table(trials)
    assert list(table["id"]) == ["P1", "P9", "P10"] and list(table["promise"])[0] == "Sentence 1."
    assert list(table["a"]) == ["not asked", "not promised", "kept"]
    assert list(table["b"]) == ["broken", "refused", "does not apply"]
    breaks = tables.conform_breaks_table(trials)
    assert list(zip(breaks["implementation"], breaks["result"], strict=True)) == [
        ("b", "broken"), ("a", "not promised"), ("b", "refused")]  # fmt: skip
    assert breaks["promise"][0] == "P1, a name" and breaks["smallest case"][0] == "B=1"
    said = tables.conform_sentence(trials)
    assert said == "1 of 4 promises that apply are kept, 1 broken, 1 not promised, 1 refused; broken: b P1"
    assert tables.conform_sentence([]) == "no promise was asked for" and tables.conform_table([]).empty
    assert tables.conform_breaks_table([]).empty and len(tables.diagnosis_table(trials)) == 1


def test_exploits_are_told_with_what_caught_each():
    caught, missed, away = (
        Trial(kind="exploit", variant=name, status=status, reason=None if status == "ok" else "Said.",
              data={"exploit": name, "title": "T", "how": "cheats", "place": "cpu", "by": by, "said": "Said.",
                    "outcome": status})
        for name, status, by in (("X1", "ok", "check"), ("X2", "failed", None), ("X3", "unavailable", None))
    )  # fmt: skip
    table = tables.exploits_table([caught, missed, Trial(kind="ceiling")]).set_index("exploit")
    assert table.loc["X1", "what it does"] == "T: it cheats" and table.loc["X1", "caught by"] == "check"
    assert table.loc["X2", "caught by"] == "nothing"
    assert tables.exploits_sentence([caught, away]) == "1 of 1 were caught by what should catch them"
    assert tables.exploits_sentence([caught, missed]).endswith("these got through: X2 on cpu")
    assert tables.exploits_table([]).empty and tables.exploits_sentence([]) == "no exploit was planted"


def test_correctness_and_grid(tmp_path):
    run = RunFolder.create(tmp_path)
    run.append(check_attention("cpu", SMALL))
    run.append(Trial(kind="correctness", backend="fa3", problem=SMALL, status="unavailable", reason="not installed"))
    run.append(Trial(kind="correctness", backend="wmma", problem=SMALL, status="failed", reason="out: NaN"))
    trials = run.trials(kind="correctness")
    table = tables.correctness_table(trials).set_index("backend")
    assert list(table["verdict"]) == ["PASS", "unavailable", "FAIL"]
    assert table.loc["fa3", "reason"] == "not installed" and table.loc["cpu", "values compared"] == 2 * 40 * 17
    grid = tables.verdict_grid(trials)
    assert list(grid.loc[0]) == [SMALL.label(), "PASS", "unavailable", "FAIL"]


def test_stage_table_from_the_record_equals_the_one_made_live():
    found = bisect("cpu", SMALL)
    read = Trial.model_validate_json(found.to_trial().model_dump_json())
    assert tables.stage_table(read).equals(found.table())


def test_styled_is_an_html_table_with_a_caption_and_no_glyphs():
    html = tables.styled(tables.stage_table(bisect("cpu", SMALL).to_trial()), "Stages of cpu").to_html()
    assert "<caption>Stages of cpu</caption>" in html and "PASS" in html and "row_max" in html
    assert not set("✅❌✓✗") & set(html) and "http" not in html


def test_the_finding_of_checks_and_bisections_is_one_sentence_with_the_worst_first():
    right = Trial(kind="correctness", backend="cpu", problem=SMALL)
    wrong = Trial(kind="bisection", backend="wmma", problem=SMALL, status="failed", reason="probs goes wrong first.")
    away = Trial(kind="correctness", backend="fa3", problem=SMALL, status="unavailable", reason="not installed")
    planted = Trial(kind="bisection", backend="cpu", problem=SMALL, status="failed", data={"fault": "F8"})
    found = Trial(kind="fault", backend="cpu", data={"outcome": "found"})
    alarm = Trial(kind="bisection", backend="cpu", variant="clean-runs", status="failed", reason="one false alarm")
    assert tables.finding_sentence([right, planted]) == "Nothing is wrong: all 1 checks and bisections passed."
    assert tables.finding_sentence([right, wrong, away, found]) == (
        "1 of 2 checks and bisections found something wrong; 1 could not run here. "
        f"The first: wmma on {SMALL.label()}: probs goes wrong first. Of 1 proofs of the checker itself, none failed."
    )
    assert tables.finding_sentence([right, found, alarm]).endswith("1 failed, the first: one false alarm.")
    assert tables.finding_sentence([away]) == "Nothing was checked; 1 could not run here."


def test_what_passed_is_folded_and_what_did_not_stands_open():
    assert tables.folded("<p>x</p>", "All <2>") == "<details><summary>All &lt;2&gt;</summary><p>x</p></details>"
    assert tables.folded("<p>x</p>", "All", fold=False) == "<p>x</p>"


def test_an_empty_run_makes_empty_tables():
    assert tables.correctness_table([]).empty and tables.verdict_grid([]).empty


def test_tables_need_no_torch():
    code = "import sys, flashcore.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def fault(name: str, backend: str | None, outcome: str, **fields) -> Trial:
    data = {"fault": name, "title": f"bug {name}", "expected_stage": "scores", "outcome": outcome}
    data |= fields.pop("data", {})
    return Trial(kind="fault", backend=backend, variant=name, data=data, **fields)


def test_the_fault_matrix_says_every_outcome_in_words():
    trials = [
        fault("F1", "cpu", "found", data={"check_passed": True}),
        fault("F1", "wmma", "found elsewhere", status="failed", data={"found_stage": "accum"}),
        fault("F4", None, "not applicable", status="unsupported", reason="awaits the cublaslt backend"),
        fault("F11", "wmma", "crashed", status="ok"),
        fault("G1", "wmma", "missed", status="failed"),
        Trial(kind="fault", backend="scalar", status="unavailable", data={"outcome": "not run"}, reason="no GPU"),
    ]
    table = tables.fault_matrix(trials).set_index("fault")
    assert list(table.index) == ["F1", "F4", "F11", "G1"]
    assert list(table.loc["F1", ["cpu", "wmma", "scalar"]]) == ["found", "found elsewhere: accum", "not run"]
    assert table.loc["F1", "a check for finite and nonzero"] == "would PASS it"
    assert set(table.loc["F4", ["cpu", "wmma", "scalar"]]) == {"awaits the cublaslt backend"}
    assert table.loc["F11", "wmma"] == "found: its process died" and table.loc["G1", "wmma"] == "missed"
    assert tables.faults_sentence(trials) == (
        "cpu: 1 of 1 found at their stage; wmma: 0 of 3 found at their stage, 1 found elsewhere, 1 found by its crash, "
        "1 missed; "
        "scalar: not run"
    )
    selecting = fault("F13", "page_selection", "found", data={"found_by": "selection"})
    table = tables.fault_matrix([*trials, selecting]).set_index("fault")
    assert list(table.loc["F13", ["page_selection", "cpu", "scalar"]]) == ["found", "no bug of it", "no bug of it"]
    assert table.loc["F1", "page_selection"] == "no bug of it" and table.loc["F1", "scalar"] == "not run"
    nameless = Trial(
        kind="fault", backend="cpu", status="unsupported", data={"fault": "G1", "outcome": "not applicable"}
    )
    table = tables.fault_matrix([nameless, *trials]).set_index("fault")
    assert list(table.loc["G1", ["bug", "to be found at"]]) == ["bug G1", "scores"], "whichever record has the words"
    assert tables.fault_matrix([]).empty and tables.faults_sentence([]) == "no fault was planted"


def test_clean_runs_repeats_and_sanitizer_in_words():
    clean = Trial(kind="bisection", backend="cpu", variant="clean-runs", data={
        "runs": 100, "alarms": 0, "values": 5, "dtypes": {"float16": 60, "float32": 40}, "patterns": {"normal": 100},
        "seeds": [0, 99]})  # fmt: skip
    [row] = tables.clean_runs_table([clean]).to_dict("records")
    assert (row["verdict"], row["false alarms"], row["dtypes"]) == ("PASS", 0, "float16 (60), float32 (40)")
    repeats = [
        Trial(kind="bisection", backend="cpu", variant="determinism", problem=SMALL,
              data={"runs": 5, "identical": True}),
        Trial(kind="bisection", backend="wmma", variant="determinism", status="failed", problem=SMALL, reason="other",
              data={"runs": 5, "identical": False, "first_stage": "scores",
                    "element": {"row": 3, "got": 1.0, "expected": 2.0}}),
        Trial(kind="bisection", backend="scalar", variant="determinism", status="unavailable", reason="no GPU"),
    ]  # fmt: skip
    results = tables.determinism_table(repeats)
    assert list(results["result"]) == ["the same bits", "other bits", "unavailable"]
    assert results.loc[1, "first differs in"] == "scores" and "row 3" in results.loc[1, "element"]
    watched = [
        Trial(kind="sanitizer", backend="wmma", variant="memcheck", status="unavailable", reason="not installed"),
        Trial(kind="sanitizer", backend="wmma", variant="racecheck", status="failed", reason="race", data={
            "tool": "racecheck", "num_findings": 7,
            "findings": [{"kernel": "attention_wmma", "file": "attention_wmma.cu", "line": 12}]}),
        Trial(kind="sanitizer", backend="wmma", variant="synccheck", data={"num_findings": 0, "findings": []}),
    ]  # fmt: skip
    table = tables.sanitizer_table(watched)
    assert list(table["result"]) == ["not available", "FAIL", "PASS"]
    assert table.loc[1, "first place"] == "attention_wmma.cu:12"
