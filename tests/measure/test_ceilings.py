"""Ceilings: what the machine can do at best, each with its unit and how it was measured."""

import math

import pytest

from flashcore.measure import ceilings


@pytest.mark.slow
def test_a_cpus_ceilings_are_recorded_with_unit_and_method(run, monkeypatch):
    monkeypatch.setattr(ceilings, "has_gpu", lambda: False)
    trials = ceilings.ceilings(run)
    assert {t.data["name"]: t.data["unit"] for t in trials} == {"copy_bandwidth": "GB/s", "matmul_fp32": "TFLOPS"}
    for trial in trials:
        assert trial.kind == "ceiling" and trial.status == "ok" and trial.data["device"] == "cpu"
        assert trial.data["value"] > 0 and math.isfinite(trial.data["value"]) and "median" in trial.data["method"]
    assert len(run.trials(kind="ceiling")) == 2


@pytest.mark.gpu
def test_a_gpus_ceilings_are_those_of_its_kind(run):
    found = {t.data["name"]: t.data["value"] for t in ceilings.ceilings(run)}
    assert found["copy_bandwidth"] > 1 and found["matmul_fp16"] > 100 and found["matmul_bf16"] > 100
    assert found["graph_node"] < found["launch_overhead"], "a node of a graph costs less than a launch from Python"
