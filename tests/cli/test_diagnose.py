"""`flashcore diagnose`: what it prints, how it ends, and what it refuses."""

from __future__ import annotations

import json

import pytest
from support.sampling import first
from typer.testing import CliRunner

from flashcore.cli.program import app
from flashcore.records import RunFolder

KERNEL = """
import torch

def twice(q, k, v):
    scores = q.float() @ k.float().mT / q.shape[-1]
    return (torch.softmax(scores, -1) @ v.float()).to(q.dtype)
"""
SMALL = ["--problem", "B=1,H=2,S=40,D=16", "--device", "cpu"]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "kernel.py").write_text(KERNEL)
    return f"{tmp_path / 'kernel.py'}:twice"


@pytest.mark.slow
def test_it_says_what_is_wrong_keeps_the_record_and_writes_the_test(place, tmp_path):
    run = tmp_path / "run"
    done = CliRunner().invoke(app, ["diagnose", place, *SMALL, "--probes", "--run", str(run), "--write-test",
                                    str(tmp_path / "test_it.py")])  # fmt: skip
    assert done.exit_code == 3, done.output
    assert "the scale is applied twice" in done.output and "whole formulas" in done.output
    (trial,) = RunFolder(run).trials()
    assert trial.kind == "diagnosis" and trial.data["hypotheses"][0]["name"] == "scale twice"
    assert "flashcore.diagnose(" in (tmp_path / "test_it.py").read_text()


@pytest.mark.slow
def test_a_right_backend_ends_with_0_and_json_is_json():
    done = CliRunner().invoke(app, ["diagnose", "cpu", "--problem", "B=1,H=1,S=40,D=64", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["data"]["right"] is True


REFUSED = [
    ([], "Name a function"),
    (["cpu", "--backend", "cpu"], "goes with --prove"),
    (["cpu", "--backend", "all"], "goes with --prove"),
    (["cpu", "--prove"], "leave FUNCTION out"),
    (["--prove", "--layout", "bhsd", "--seed", "0"], "leave --layout, --seed out"),
    (["--prove", "--time-limit", "20", "--probes"], "leave --time-limit, --probes out"),
    (["cpu", "--time-limit", "nan"], "nan is no number of seconds above 0"),
    (["cpu", "--seed", str(10**23)], "is too large"),
    # These start a process each.
    (["cpu", "--device", "tpu"], "There is no device 'tpu'; choose one of: cpu, cuda"),
    (["cpu", "--lse", "natural"], "says itself what it returns"),
]


@pytest.mark.parametrize("refused", first(REFUSED, 8))
def test_options_that_do_not_go_together_are_refused(refused):
    arguments, words = refused
    done = CliRunner().invoke(app, ["diagnose", *arguments])
    assert done.exit_code == 2 and words in done.stderr, arguments


def test_a_run_that_cannot_be_written_is_told_before_anything_is_asked(place, tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["diagnose", place, *SMALL, "--run", str(tmp_path / "file")])
    assert done.exit_code == 2 and "cannot be written" in done.stderr and "scale" not in done.output


@pytest.mark.slow
@pytest.mark.parametrize("target", first(["{}/file/test_it.py", "{}", ""], 1))
def test_a_test_that_cannot_be_written_costs_no_finding(place, tmp_path, target):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["diagnose", place, *SMALL, "--write-test", target.format(tmp_path)])
    assert done.exit_code == 2 and "the scale is applied twice" in done.stdout, done.output
    assert "The test cannot be written to" in done.stderr and "Traceback" not in done.output


@pytest.mark.exhaustive
@pytest.mark.slow
def test_probes_are_in_the_json_too(place):
    done = CliRunner().invoke(app, ["diagnose", place, *SMALL, "--probes", "--json"])
    assert "whole formulas" in [probe["Probe"] for probe in json.loads(done.stdout)["data"]["probes"]]
