"""`flashcore conform`: the table, the breaks below it, JSON lines, records, exit codes, and what it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from flashcore.bisection import diagnosis
from flashcore.bisection.diagnosis.conforming import Conformance, Finding
from flashcore.cli.program import app
from flashcore.records import RunFolder

runner = CliRunner()


def finding(number: int, result: str, **more) -> Finding:
    return Finding(f"P{number}", "a name", f"Sentence {number}.", result, "it does [so]", **more)


@pytest.fixture
def asked(monkeypatch):
    """What is found, in place of asking; and what was asked."""
    found, heard = [], {}

    def all_of(places, problem, *, progress, told, **options):
        heard.update(options, places=places, problem=problem, quiet=progress is None)
        for one in found:
            told(one)
        return found

    monkeypatch.setattr(diagnosis, "conform_all", all_of)
    return found, heard


def test_it_prints_the_table_and_each_break_and_keeps_the_records(asked, tmp_path):
    asked[0].append(Conformance("mine", (finding(1, "kept"), finding(2, "broken", smallest="B=1,H=1")), "cpu"))
    asked[0].append(Conformance("other", (finding(1, "refused"), finding(2, "kept"))))
    done = runner.invoke(app, ["conform", "mine", "other", "--run", str(tmp_path / "run"), "--only", "P1,P2"])
    assert done.exit_code == 3, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["id", "promise", "mine", "other"]
    assert lines[1].split() == ["P1", "Sentence", "1.", "kept", "refused"]
    assert "mine, P2, a name: broken on B=1,H=1: it does [so]." in lines
    assert lines[-1].endswith("1 broken, 1 refused; broken: mine P2.")
    trials = RunFolder(tmp_path / "run").trials(kind="diagnosis")
    assert [(t.backend, t.variant, t.status) for t in trials] == [
        ("mine", "conform:P1", "ok"), ("mine", "conform:P2", "failed"), ("other", "conform:P1", "unsupported"),
        ("other", "conform:P2", "ok"),
    ]  # fmt: skip
    assert asked[1]["only"] == "P1,P2" and asked[1]["places"] == ["mine", "other"] and not asked[1]["quiet"]


@pytest.mark.parametrize(
    ("result", "code"), [("kept", 0), ("refused", 0), ("not promised", 0), ("broken", 3), ("not judged", 3)]
)
def test_json_is_a_line_each_and_the_exit_code_says_whether_one_is_broken(asked, result, code):
    asked[0].append(Conformance("mine", (finding(1, result),)))
    done = runner.invoke(app, ["conform", "--json", "--layout", "bshd", "--lse", "log2", "--device", "cpu"])
    assert done.exit_code == code and done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["data"]["result"] == result
    assert asked[1]["places"] is None and (asked[1]["layout"], asked[1]["lse"], asked[1]["device"]) == (
        "bshd", "log2", "cpu")  # fmt: skip


def test_a_question_without_sense_is_one_sentence():
    done = runner.invoke(app, ["conform", "cpu", "--only", "P77"])
    assert done.exit_code == 2 and "There is no promise 'P77'" in done.stderr
    done = runner.invoke(app, ["conform", "nobody"])
    assert done.exit_code == 2 and "There is no backend 'nobody'" in done.stderr


@pytest.mark.slow
def test_a_function_of_a_file_is_asked_in_a_process_of_its_own(tmp_path):
    (tmp_path / "kernel.py").write_text(
        "import torch\n\ndef mine(q, k, v):\n    k[..., 0] = 0\n"
        "    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)\n"
    )
    done = runner.invoke(app, ["conform", f"{tmp_path / 'kernel.py'}:mine", "--only", "P15,P18", "--device", "cpu"])
    assert done.exit_code == 3 and "it changes its input k" in done.stdout and "mine: P18" in done.stderr, done.output
