"""`flashcore lab`: JupyterLab on copies, with the arguments it was given, as root too."""

from __future__ import annotations

import os
import subprocess
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from flashcore.cli import lab
from flashcore.cli.program import app
from flashcore.pipeline import workbench

runner = CliRunner()


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The command lines that were started; none really is."""
    lines = []
    monkeypatch.setattr(workbench, "workbench_dir", lambda: tmp_path / "lab")
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", lambda line, check: lines.append(line) or SimpleNamespace(returncode=7))
    return lines


def test_it_opens_copies_and_hands_on_its_arguments_and_exit_code(started, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = runner.invoke(app, ["lab", "--no-browser", "--port", "9000"])
    assert done.exit_code == 7, done.output
    [line] = started
    assert line[1:4] == ["-m", "jupyter", "lab"] and f"--notebook-dir={tmp_path / 'lab'}" in line
    assert line[-3:] == ["--no-browser", "--port", "9000"] and "--allow-root" not in line
    assert (tmp_path / "lab" / "02_correctness_bisection.ipynb").is_file()


def test_root_is_allowed_in(started, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    runner.invoke(app, ["lab"])
    assert "--allow-root" in started[0]


def test_without_jupyterlab_there_is_one_sentence(started, monkeypatch):
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None)
    done = runner.invoke(app, ["lab"])
    assert done.exit_code == 2 and "flashcore[lab]" in done.output and started == []
