"""`flashcore model`: a table, records and exit codes."""

from __future__ import annotations

import pytest
from support import synthetic_models as synthetic
from typer.testing import CliRunner

from flashcore.cli.program import app
from flashcore.gpu import device
from flashcore.records import read_trials
from flashcore.surveys.models import measuring

runner = CliRunner()


@pytest.fixture
def measured(monkeypatch):
    """The survey writes these instead of measuring."""
    trials = synthetic.survey()
    given = []

    def measure(run, plan, *, seed, progress):
        given.append((plan, seed))
        progress("one line")
        return [run.append(trial) for trial in trials]

    monkeypatch.setattr(measuring, "measure", measure)
    return trials, given


def test_the_command_prints_a_table_and_appends_to_the_run(run, measured):
    done = runner.invoke(app, ["model", "--run", str(run.path), "--shape", "llama-64", "--seed", "3"])
    assert done.exit_code == 0, done.output
    assert "Attention in a model" in done.stdout and str(run.records_path) in done.stdout
    ((plan, seed),) = measured[1]
    assert seed == 3 and {shape.id for shape in plan.shapes()} == {"llama-64"}
    assert len(run.trials(kind="model")) == 15 and run.environment()["parameters"]["command"] == "model"
    assert device.has_gpu() or "its times say nothing about speed" in done.stderr


def test_json_is_the_records(run, measured):
    done = runner.invoke(app, ["model", "--run", str(run.path), "--json"])
    path = run.path / "printed.jsonl"
    path.write_text(done.stdout)
    assert [t.data for t in read_trials(path)] == [t.data for t in run.trials(kind="model")]


def test_something_wrong_is_exit_code_3(run, measured):
    measured[0].append(synthetic.generated("flashcore", status="failed", reason="1 of 60 decided tokens are others"))
    done = runner.invoke(app, ["model", "--run", str(run.path)])
    assert done.exit_code == 3 and "others" in done.stdout


@pytest.mark.parametrize("arguments", [["--profile", "fast"], ["--shape", "llama"], ["--seed", "x"]])
def test_usage_errors_write_nothing(tmp_path, arguments):
    done = runner.invoke(app, ["model", *arguments, "--run", str(tmp_path / "new")])
    assert done.exit_code == 2 and "Traceback" not in done.output and not (tmp_path / "new").exists()
