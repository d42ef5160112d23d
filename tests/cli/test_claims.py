"""`flashcore claims`: the audit printed, as JSON, and what its exit code means."""

from __future__ import annotations

import pytest
from support import synthetic_records as synthetic
from support.made_up_claims import ENVIRONMENT, TRIALS, claim_text
from typer.testing import CliRunner

from flashcore.cli import program
from flashcore.pipeline import reporting
from flashcore.records import Trial

runner = CliRunner()


def newest_recorded():
    """The recorded run that stands in where a machine has no GPU."""
    from flashcore.decision.evidence import recorded_runs
    from flashcore.paths import data_dir

    return recorded_runs(data_dir("reports") / "recorded")[0][-1]


@pytest.mark.slow
def test_the_command_prints_the_audit_and_ends_with_0_whatever_it_found(run):
    done = runner.invoke(program.app, ["claims", "--run", str(run.path)])
    assert done.exit_code == 0, done.output
    for words in ("Claims, audited", "impossible", "contradicted", "call-270us: 270 µs, impossible", "21 claims:"):
        assert words in done.stdout
    assert f"Recorded on {newest_recorded().gpu}" in done.stdout


def test_the_command_takes_a_run_of_its_own_and_a_file(tmp_path):
    run = synthetic.write_run(tmp_path / "run", TRIALS, ENVIRONMENT)
    file = tmp_path / "mine.toml"
    file.write_text(claim_text("mine", "latency_us", 0.9, "s", workload="report", backend="wmma"), encoding="utf-8")
    done = runner.invoke(program.app, ["claims", str(file), "--run", str(run.path), "--json"])
    assert done.exit_code == 0
    (trial,) = [Trial.model_validate_json(line) for line in done.stdout.splitlines()]
    assert (trial.kind, trial.data["verdict"]) == ("claim", "contradicted")
    assert "SYNTHETIC H200" in trial.data["reason"]


@pytest.mark.slow
def test_without_any_run_the_recorded_one_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reporting, "runs_dir", lambda out=None: tmp_path / "runs")
    done = runner.invoke(program.app, ["claims"])
    assert done.exit_code == 0 and f"Recorded on {newest_recorded().gpu}" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["none.toml"], ["--run", "no-such-run"], ["--run", ""], ["--nonsense"]], ids=" ".join
)
def test_usage_errors_are_exit_code_2_and_one_sentence(arguments):
    done = runner.invoke(program.app, ["claims", *arguments])
    assert done.exit_code == 2 and "Traceback" not in done.output


def test_help_says_what_the_exit_code_means():
    done = runner.invoke(program.app, ["claims", "--help"], terminal_width=200)
    assert "whatever it found" in " ".join(done.stdout.split())
