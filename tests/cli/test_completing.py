"""What the shell is offered: names that exist, after commas too, and nothing where they cannot be looked up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flashcore.cli import completing
from flashcore.pipeline import folders


@pytest.mark.parametrize(
    ("complete", "typed", "offered"),
    [
        (completing.backend, "hopper-", ["hopper-paged", "hopper-unsplit"]),
        (completing.backends, "cpu,sdpa-c", ["cpu,sdpa-cudnn"]),
        (completing.backends, "sdpa-math,sdpa-m", []),
        (completing.backends, "al", ["all"]),
        (completing.fault, "G10", ["G10"]),
        (completing.exploits, "X1,R7", ["X1,R7"]),
        (completing.format_, "", ["text", "json", "markdown", "github", "junit"]),
        (completing.kernels, "attention_w", ["attention_wmma"]),
        (completing.pattern, "r", ["rising"]),
        (completing.problem, "report", ["report", "report-causal"]),
        (completing.sections, "speed,claims,ev", ["speed,claims,evidence"]),
        (completing.backend, "nonsense", []),
    ],
)
def test_names_that_begin_so(complete, typed, offered):
    assert complete(typed) == offered


def test_runs_are_those_of_the_folder_the_newest_first_and_the_recorded_ones(tmp_path, monkeypatch):
    for name in ("2001-a", "2002-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").touch()
    monkeypatch.setattr(folders, "runs_dir", lambda: tmp_path)
    found = completing.run("")
    assert found[:3] == ["latest", "2002-b", "2001-a"] and any(name.endswith("h100") for name in found)
    assert completing.run("2001") == ["2001-a"]


def test_what_cannot_be_looked_up_offers_nothing():
    def broken():
        raise RuntimeError("a plug-in")

    assert completing.one(broken)("") == [] == completing.several(broken)("a,")


@pytest.mark.slow
def test_the_shell_gets_them():
    asked = {"_FLASHCORE_COMPLETE": "complete_bash", "COMP_WORDS": "flashcore bisect --pattern ri", "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-c", "from flashcore.cli import main; main()"], capture_output=True,
                          text=True, env={**os.environ, **asked})  # fmt: skip
    assert done.stdout.split() == ["rising"], done.stderr
