"""`flashcore survey`: the answers, the records, and what it needs."""

from __future__ import annotations

import pytest
from support import synthetic_survey as synthetic
from typer.testing import CliRunner

from flashcore.errors import UnknownName
from flashcore.gpu import device
from flashcore.records import Trial
from flashcore.surveys.cublaslt import labels


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


@pytest.mark.slow
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


def test_an_unknown_profile_is_refused_before_a_gpu_is_asked_for(program, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    done = CliRunner().invoke(program, ["survey", "--profile", "fast", "--run", str(tmp_path / "run")])
    assert isinstance(done.exception, UnknownName) and "quick, full" in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_a_label_that_is_not_what_ran_is_named_and_exits_3(program, run, stand_in, monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "record_environment", lambda *a, **k: "env")
    data = {"group": labels.PROOF, "product": "2048x128x64", "policy": "first"}
    trials = [Trial(kind="gemm_candidate", data=data),
              Trial(kind="gemm_candidate", status="failed", reason="[other] kernel", data=data),
              Trial(kind="gemm_candidate", status="failed", reason="no proof", data={"group": "report"})]  # fmt: skip
    monkeypatch.setattr(labels, "prove_labels", lambda run, cases: trials)
    done = CliRunner().invoke(program, ["survey", "--profile", "quick", "--run", str(run.path)])
    assert done.exit_code == 3 and "2048x128x64, first: [other] kernel" in done.stderr
    assert "no proof" not in done.stderr, "a candidate that failed is measured, and no label was wrong"
    assert str(run.records_path) in done.stdout


def test_only_the_reports_own_products_are_proven(program, run, stand_in, monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "record_environment", lambda *a, **k: "env")
    proven = []
    monkeypatch.setattr(labels, "prove_labels", lambda run, cases: proven.extend(cases) or [])
    done = CliRunner().invoke(program, ["survey", "--profile", "quick", "--run", str(run.path), "--json"])
    assert done.exit_code == 0 and {c.group for c in proven} == {"report", "row"}
    lines = [Trial.model_validate_json(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(run.trials()) > 0, "JSON lines are the records, and nothing else is printed"
