"""`flashcore invariance`: the table, breaks with their line, JSON, records, exit codes, and what it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from flashcore.bisection.faults import breaking
from flashcore.cli.program import app
from flashcore.records import RunFolder, Trial
from flashcore.surveys.invariance import measuring

runner = CliRunner()


def record(mode: str, kept: int, status: str = "ok", backend: str = "mine") -> Trial:
    breaks = [] if kept == 9 else [{"pair": "alone, pages", "said": "broken: [1] row", "line": "print(1)"}]
    data = {"mode": mode, "promised": mode == "invariant", "cases": 9, "kept": kept, "subjects": 2, "breaks": breaks,
            "pairs": {"alone, pages": [kept, 9]}, "stopped": "all were asked", "role": "ours"}  # fmt: skip
    return Trial(kind="invariance", backend=backend, variant=mode, status=status, data=data)


@pytest.fixture
def asked(monkeypatch):
    """What is found, in place of asking; and what was asked."""
    found, heard = [], {}

    def all_of(chosen, modes, *, progress, told, **options):
        heard.update(options, chosen=chosen, modes=modes, quiet=progress is None)
        for one in found:
            told(one)
        return found

    monkeypatch.setattr(measuring, "measure_all", all_of)
    return found, heard


def test_it_prints_who_keeps_what_and_each_break_with_its_line(asked, tmp_path):
    asked[0].extend([record("invariant", 9), record("ordinary", 7)])
    done = runner.invoke(app, ["invariance", "--out", str(tmp_path / "run"), "--cases", "9", "--seed", "4"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[1].split()[:5] == ["mine", "invariant", "9", "of", "9"] and lines[2].split()[2:5] == ["7", "of", "9"]
    assert lines[3] == "mine, ordinary mode, alone, pages: broken: [1] row." and lines[4] == "    print(1)"
    assert lines[-1].startswith("mine keeps 9 of 9 cases in the batch-invariant mode; in the ordinary mode")
    run = RunFolder(tmp_path / "run")
    assert [t.variant for t in run.trials(kind="invariance")] == ["invariant", "ordinary"]
    assert run.environment()["parameters"]["command"] == "invariance"
    heard = asked[1]
    assert heard["num_cases"] == 9 and heard["seed"] == 4 and heard["chosen"] is None and not heard["quiet"]
    assert heard["modes"] == ("invariant", "ordinary") and heard["limit_s"] is None


@pytest.mark.parametrize(
    ("mode", "kept", "status", "code"),
    [("invariant", 9, "ok", 0), ("invariant", 8, "failed", 1), ("invariant", 9, "error", 1), ("ordinary", 8, "ok", 0),
     ("ordinary", 8, "error", 0), ("invariant", 9, "unsupported", 0)],
)  # fmt: skip
def test_json_is_a_line_each_and_a_broken_promise_alone_ends_with_1(asked, mode, kept, status, code):
    asked[0].append(record(mode, kept, status))
    done = runner.invoke(app, ["invariance", "--json", "--mode", mode, "--backends", "mine, cpu", "--limit", "3"])
    assert done.exit_code == code and done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["data"]["kept"] == kept
    heard = asked[1]
    assert (heard["chosen"], heard["modes"], heard["limit_s"]) == (["mine", "cpu"], (mode,), 3) and heard["quiet"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "invarant"], "There is no mode 'invarant'; choose one of: both, invariant, ordinary. Did you mean"),
        (["--cases", "0"], "--cases is 0; ask at least 1."),
        (["--limit", "0"], "--limit is 0; give a number of seconds above 0."),
        (["--backends", "nobody"], "There is no backend 'nobody'"),
        (["--backends", " ,"], "--backends names nobody"),
    ],
)
def test_a_question_without_sense_is_one_sentence(options, words):
    done = runner.invoke(app, ["invariance", *options])
    assert done.exit_code == 2 and words in done.stderr


def test_it_asks_a_backend(tmp_path):
    done = runner.invoke(app, ["invariance", "--backends", "sdpa-math", "--cases", "20", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["data"]["cases"] == 20


# ------------------------------------------------------------------------------------------------ planted bugs


def planted(outcome: str, backend: str, status: str = "ok", reason: str | None = None) -> Trial:
    data = {"fault": "votes", "title": "rows vote", "outcome": outcome, "cases": 1200, "broken": 7}
    return Trial(kind="fault", backend=backend, variant="votes", status=status, reason=reason, data=data)


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["found"], 0),
        (["found", "not run"], 0),
        (["not run"], 1),
        (["found", "missed"], 1),
        (["found", "not planted"], 1),
    ],
)
def test_planted_bugs_are_told_one_a_line_and_one_that_is_missed_ends_with_1(monkeypatch, outcomes, code):
    heard = {}

    def proved(chosen, **options):
        heard.update(options, chosen=chosen)
        for number, outcome in enumerate(outcomes):
            yield planted(outcome, f"mine-{number}", "ok" if outcome == "found" else "failed", "all were kept")

    monkeypatch.setattr(breaking, "prove_breaks", proved)
    done = runner.invoke(app, ["invariance", "--prove", "--cases", "9", "--seed", "3", "--backends", "mine, cpu"])
    assert done.exit_code == code, done.output
    lines = done.stdout.splitlines()
    assert len(lines) == len(outcomes)
    for number, (line, outcome) in enumerate(zip(lines, outcomes, strict=True)):
        end = "7 of 1,200 cases are broken." if outcome == "found" else "all were kept."
        assert line == f"votes in mine-{number} (rows vote): {outcome}, {end}"
    assert (heard["chosen"], heard["num_cases"], heard["seed"], heard["limit_s"]) == (["mine", "cpu"], 9, 3, None)
    done = runner.invoke(app, ["invariance", "--prove", "--json"])
    assert (
        done.exit_code == code
        and [json.loads(line)["data"]["outcome"] for line in done.stdout.splitlines()] == outcomes
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--mode", "ordinary"], "--prove takes no --mode"), (["--out", "run"], "--prove takes no --out"),
     (["--backends", "fa3"], "There is no backend with a planted break 'fa3'; choose one of: hopper, decode, cpu.")],
)  # fmt: skip
def test_what_makes_no_sense_with_planted_bugs_is_one_sentence(options, words):
    done = runner.invoke(app, ["invariance", "--prove", *options])
    assert done.exit_code == 2 and words in done.stderr


@pytest.mark.slow
def test_bugs_planted_in_the_cpu_backend_are_found_from_the_command_line():
    done = runner.invoke(app, ["invariance", "--prove", "--backends", "cpu", "--cases", "40"])
    assert done.exit_code == 0, done.output
    assert [line.partition(" in ")[0] for line in done.stdout.splitlines()] == ["votes", "chunks by batch"]
