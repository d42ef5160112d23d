"""`flashcore bisect`, `faults` and `sanitize`: exit codes, words, JSON, records, and errors in one sentence."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from flashcore.bisection.faults import planting, proving
from flashcore.bisection.faults.catalogue import get
from flashcore.bisection.faults.sanitizer import sanitizing
from flashcore.cli import debug, program
from flashcore.records import RunFolder, Trial

runner = CliRunner()
SMALL = ["--problem", "B=1,H=2,S=64,D=32,page=32"]


@pytest.fixture
def app():
    small = typer.Typer(cls=program._Group, pretty_exceptions_enable=False)
    debug.add_to(small)
    return small


def test_a_clean_backend_is_silent_and_exits_0(app):
    done = runner.invoke(app, ["bisect", "--backend", "cpu", *SMALL, "--repeat", "2"])
    assert done.exit_code == 0, done.output
    assert "PASS: cpu on B=1,H=2,S=64,D=32,page=32: every stage is right" in done.stdout
    assert "2 runs gave the same bits" in done.stdout and "all there are" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[1:9]] == [
        "scores", "row_max", "rescale", "probs", "row_sum", "accum", "out", "lse",
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["F8", "F3", "G14"])
def test_a_planted_bug_is_named_with_stage_and_element_and_exits_3(app, fault):
    done = runner.invoke(app, ["bisect", "--backend", "cpu", "--fault", fault])
    assert done.exit_code == 3, done.output
    assert f"FAIL: cpu with {fault} planted" in done.stdout
    assert f"{get(fault).stage} goes wrong first" in done.stdout and "expected" in done.stdout
    assert not set("✅❌✓✗✔✘") & set(done.stdout)


def test_a_race_shows_in_the_repeats(app):
    done = runner.invoke(app, ["bisect", "--backend", "cpu", "--fault", "G1", "--repeat", "2"])
    assert done.exit_code == 3 and "other bits" in done.stdout and "first in scores" in done.stdout


def test_json_is_records_and_nothing_else(app, tmp_path):
    arguments = ["bisect", "--backend", "cpu", "--fault", "F8", *SMALL, "--json", "--run", str(tmp_path / "run")]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 3
    [trial] = [Trial.model_validate_json(line) for line in done.stdout.splitlines()]
    assert trial.data["producers"] == ["scores"] and trial.problem.seqlen_q == 64
    assert trial.variant == "planted-F8-bisection"
    [kept] = RunFolder(tmp_path / "run").trials(kind="bisection")
    assert kept.data["finding"] == trial.data["finding"]
    assert json.loads(done.stdout)["data"]["stages"][0]["local"]["first_bad"]["column"] == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bisect", "--backend", "wmm"], "There is no backend 'wmm'"),
        (["bisect", "--backend", "cpu", "--fault", "F99"], "There is no fault 'F99'; choose one of: F1, F2"),
        (["bisect", "--backend", "cpu", "--fault", "F10"], "F10 cannot be planted in cpu: makes no sense in cpu"),
        (["bisect", "--backend", "cpu", "--fault", "F13"], "F13 cannot be planted in cpu: no bug of a backend"),
        (["bisect", "--backend", "cpu", "--fault", "G7"], "G7 cannot be planted in cpu: makes no sense in cpu"),
        (["bisect", "--backend", "cpu", "--fault", ""], "There is no fault ''"),
        (["bisect", "--backend", "cpu", "--seed", str(10**23)], "is too large"),
        (["bisect", "--backend", "cpu", "--problem", "reprot"], "There is no problem 'reprot'"),
        (["bisect", "--backend", "cpu", "--pattern", "odd", *SMALL], "There is no input pattern 'odd'"),
        (["bisect", "--backend", "sdpa-math"], "cannot be bisected"),
        (["faults", "--backend", "sdpa-math"], "no bug can be found in it"),
        (["sanitize", "--backend", "cpu"], "no kernel of ours"),
        (["sanitize", "--backend", "wmma", "--tool", "leakcheck"], "There is no tool of compute-sanitizer 'leakcheck'"),
        (["sanitize", "--backend", "wmma", "--fault", ""], "There is no fault ''"),
        (["sanitize", "--backend", "wmma", "--fault", "F99"], "There is no fault 'F99'"),
        (["bisect"], "--backend"),
    ],
)
def test_a_usage_error_is_a_sentence_and_exits_2(app, arguments, words):
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert words in done.output and "Traceback" not in done.output


def test_a_run_that_cannot_be_written_is_said_before_anything_is_computed(app, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("flashcore.bisection.bisect_trial", lambda *_, **__: pytest.fail("it was bisected first"))
    done = CliRunner().invoke(app, ["bisect", "--backend", "cpu", "--run", str(tmp_path / "file")])
    assert done.exit_code == 2 and "cannot be written" in done.stderr


def test_the_matrix_says_found_for_each_and_exits_0(app, monkeypatch, tmp_path):
    few = (get("F8"), get("F10"), get("G7"), get("G14"))
    monkeypatch.setattr(proving.run_faults, "__kwdefaults__", {"faults": few, "progress": None})
    done = runner.invoke(app, ["faults", "--backend", "cpu", "--run", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "cpu: 2 of 2 found at their stage." in done.stdout
    assert done.stdout.count("makes no sense in cpu") == 2
    assert len(RunFolder(tmp_path / "run").trials(kind="fault")) == 4


@pytest.mark.slow
def test_a_missed_fault_is_said_and_exits_3(app, monkeypatch):
    harmless = planting.Fault("X1", "nothing at all", "probs", "right", {"cpu": planting.Override({})})
    elsewhere = planting.Fault("X2", "elsewhere", "lse", "wrong", dict(get("G6").plants))
    monkeypatch.setattr(proving.run_faults, "__kwdefaults__", {"faults": (harmless, elsewhere), "progress": None})
    monkeypatch.setattr(proving, "get", {"X1": harmless, "X2": elsewhere}.__getitem__)
    done = runner.invoke(app, ["faults", "--backend", "cpu"])
    assert done.exit_code == 3, done.output
    assert "X1 in cpu: X1 has to be found at probs, and nothing was found" in done.stdout
    assert "found elsewhere: scores" in done.stdout
    assert "cpu: 0 of 2 found at their stage, 1 missed, 1 found elsewhere." in done.stdout
    lines = runner.invoke(app, ["faults", "--backend", "cpu", "--json"]).stdout.splitlines()
    assert [Trial.model_validate_json(line).status for line in lines] == ["failed", "failed"]


@pytest.mark.parametrize(
    ("statuses", "code"), [(["ok"], 0), (["ok", "failed", "error"], 3), (["unavailable"], 4), (["ok", "error"], 1)]
)
def test_exit_codes_of_sanitize(app, monkeypatch, statuses, code):
    trials = [Trial(kind="sanitizer", backend="wmma", variant="memcheck", status=s, reason="because") for s in statuses]
    monkeypatch.setattr(sanitizing, "sanitize", lambda *_, **__: trials)
    done = runner.invoke(app, ["sanitize", "--backend", "wmma"])
    assert done.exit_code == code, done.output
    assert ("not available" in done.stdout) == ("unavailable" in statuses)


@pytest.mark.slow
def test_the_modules_load_without_torch():
    import subprocess
    import sys

    code = "import sys, flashcore.cli.debug, flashcore.page.drawing.stage_plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
