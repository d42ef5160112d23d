"""What several commands print: a decision with its gates and options, lines that are never cut, paths."""

from __future__ import annotations

import pytest
from support import synthetic_records as synthetic
from support.decisions import GOOD, decide, gate

from flashcore.cli import printing
from flashcore.decision import verdict
from flashcore.decision.seal import State


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Tables so wide that no cell is wrapped."""
    monkeypatch.setattr(printing, "WIDTH_OF_A_FILE", 2000)


def printed(capsys, decision: verdict.Decision) -> str:
    printing.print_decision(decision)
    return " ".join(capsys.readouterr().out.split())


def test_a_decision_ends_with_its_verdict_after_gates_and_options(capsys):
    decision = decide(GOOD)
    text = printed(capsys, decision)
    assert text.index("Gates") < text.index("Options") < text.index("Conditions of the options")
    assert text.endswith(f"Verdict: GO. {decision.reason}")
    assert decision.recommendation in text and f"What would change it: {decision.flip}" in text
    assert "SHIP, recommended" in text and "3 of 3 hold" in text and "(effort: " in text and "; risk: " in text
    assert "What shipping it means" not in text and "HOLDS" in text


def test_a_gate_that_is_not_required_says_so_and_states_are_words(capsys):
    decision = decide(synthetic.gpu_trials())
    text = printed(capsys, decision)
    optional = [g for g in decision.gates if not g.required]
    assert text.count("(not required)") == len(optional) > 0
    assert "FAIL" in text and "PASS" in text and not set("✅❌✓✗") & set(text)


def test_without_options_there_is_no_matrix_and_what_was_recorded_before_is_told(capsys):
    sealed = verdict.Evidence((), {}, {}, seal=State("abc", "2001-02-03"))
    text = printed(capsys, verdict.Decision("NO-GO", "Because.", (), based_on=sealed, stored="It was GO."))
    assert "Options" not in text and "What would change it" not in text
    assert text.endswith("Verdict: NO-GO. Because. It was GO. Seal abc of 2001-02-03 holds.")


def test_words_in_brackets_are_text_and_no_markup(capsys):
    found = gate(decide(GOOD), "report-320")
    hostile = verdict.Decision("GO", "[bold]x[/bold]", (verdict.GateResult(**{**vars(found), "title": "[red]t",
                                                                              "reason": "[link]r"}),))  # fmt: skip
    text = printed(capsys, hostile)
    assert "Verdict: GO. [bold]x[/bold]" in text and "[red]t" in text and "[link]r" in text


def test_a_long_line_is_not_wrapped_so_that_it_can_be_copied(capsys):
    line = f"/folder/{'x' * 500}/report.html"
    printing.say(line)
    assert capsys.readouterr().out == f"{line}\n"
    printing.errors().print(line)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{line}\n")


@pytest.mark.parametrize(("where", "words"), [("inside/page.html", "inside/page.html"), ("../page.html", None)])
def test_a_path_below_the_current_folder_is_shown_from_there(tmp_path, monkeypatch, where, words):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    assert printing.shown(home / where) == (words or str(tmp_path / "page.html"))
