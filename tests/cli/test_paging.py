"""`flashcore paging`: tables, records and exit codes."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from flashcore.cli.program import app
from flashcore.gpu import device
from flashcore.records import read_trials

runner = CliRunner()


@pytest.mark.slow
def test_the_command_prints_tables_and_appends_to_the_run(run):
    done = runner.invoke(app, ["paging", "--what", "memory", "--run", str(run.path)])
    assert done.exit_code == 0, done.output
    assert "Paging: memory" in done.stdout and "70.31" in done.stdout and str(run.records_path) in done.stdout
    assert len(run.trials(kind="paging")) == 3 and run.environment()["parameters"]["command"] == "paging"
    again = runner.invoke(app, ["paging", "--what", "memory", "--run", str(run.path), "--json"])
    assert again.exit_code == 0 and len(again.stdout.splitlines()) == 3
    path = run.path / "printed.jsonl"
    path.write_text(again.stdout)
    assert [t.data for t in read_trials(path)] == [t.data for t in run.trials(kind="paging")[3:]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--profile", "fast"],
        ["--what", "speed"],
        ["--what", ","],
        ["--report-layers", "0"],
        ["--what", "memory", "--report-layers", "2"],
    ],
)
def test_usage_errors_write_nothing(tmp_path, arguments):
    done = runner.invoke(app, ["paging", *arguments, "--run", str(tmp_path / "new")])
    assert done.exit_code == 2 and "Traceback" not in done.output and not (tmp_path / "new").exists()


def test_something_wrong_is_exit_code_3(run, monkeypatch):
    from flashcore.surveys.paging import memory

    monkeypatch.setattr(
        memory, "MEMORY_CASES", {"shared_prefix": lambda *_: (_ for _ in ()).throw(MemoryError("full"))}
    )
    done = runner.invoke(app, ["paging", "--what", "memory", "--run", str(run.path)])
    assert done.exit_code == 3 and "MemoryError: full" in done.output
    assert device.has_gpu() or "error" in done.stdout
