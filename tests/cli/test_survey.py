"""`flashcore survey`: the answers, the records, and what it needs."""

from __future__ import annotations

import pytest
from support import synthetic_survey as synthetic

from flashcore.gpu import device
from flashcore.records import Trial
from flashcore.survey import labels


@pytest.fixture(name="stand_in")
def _stand_in(monkeypatch):
    """A cuBLASLt whose answers are invented, at the calls that need a GPU; gives the log of what was asked."""
    return synthetic.stand_in(monkeypatch)


@pytest.fixture
def program():
    import typer

    from flashcore.cli import survey

    app = typer.Typer()
    survey.add_to(app)
    app.callback()(lambda: None)
    return app


def test_the_command_surveys_and_answers(program, run, stand_in, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "record_environment", lambda *a, **k: "env")
    monkeypatch.setattr(labels, "prove_labels", lambda run, cases: [])
    done = CliRunner().invoke(program, ["survey", "--profile", "quick", "--run", str(run.path)])
    assert done.exit_code == 0, done.output
    assert "1. Why does Q·Kᵀ get only algorithms without workspace" in done.output and "7. What can" in done.output
    wrong = Trial(kind="gemm_candidate", status="failed", reason="other kernel", data={"group": labels.PROOF})
    monkeypatch.setattr(labels, "prove_labels", lambda run, cases: [wrong])
    done = CliRunner().invoke(program, ["survey", "--profile", "quick", "--run", str(run.path), "--json"])
    assert done.exit_code == 3
    assert [Trial.model_validate_json(line) for line in done.stdout.splitlines()] == [wrong]


def test_the_command_says_that_it_needs_a_gpu(program, monkeypatch):
    from typer.testing import CliRunner

    from flashcore.errors import BackendUnavailable

    monkeypatch.setattr(device, "has_gpu", lambda: False)
    done = CliRunner().invoke(program, ["survey"])
    assert isinstance(done.exception, BackendUnavailable) and "flashcore render" in str(done.exception)
