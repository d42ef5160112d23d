"""Ceilings: what the machine can do at best, each with its unit and how it was measured."""

import math
from types import SimpleNamespace

import pytest

from flashcore.measure import ceilings


@pytest.mark.slow
def test_a_cpus_ceilings_are_recorded_with_unit_and_method(run, monkeypatch):
    monkeypatch.setattr(ceilings, "has_gpu", lambda: False)
    taken, clock = [], ceilings._host_s
    monkeypatch.setattr(ceilings, "_host_s", lambda call: taken.append(clock(call)) or taken[-1])
    trials = ceilings.ceilings(run)
    assert {t.data["name"]: t.data["unit"] for t in trials} == {"copy_bandwidth": "GB/s", "matmul_fp32": "TFLOPS"}
    for trial in trials:
        assert trial.kind == "ceiling" and trial.status == "ok" and trial.data["device"] == "cpu"
        assert trial.data["value"] > 0 and math.isfinite(trial.data["value"]) and "median" in trial.data["method"]
    assert len(run.trials(kind="ceiling")) == 2
    copied, multiplied = taken
    assert trials[0].data["value"] == pytest.approx(2 * (256 << 20) / copied / 1e9), "bytes read and written"
    assert trials[1].data["value"] == pytest.approx(2 * 1024**3 / multiplied / 1e12)


def test_ceilings_are_timed_with_nothing_beside_them(monkeypatch):
    asked = []
    monkeypatch.setattr(ceilings, "perform", lambda tasks, **_: (asked.extend(tasks), None))
    ceilings.ceilings(None)
    [task] = asked
    assert task.timing and task.owed == ({"kind": "ceiling"},)


class Unreal:
    """In place of a tensor on a GPU: it has a size, and nothing is computed."""

    def __init__(self, *shape, **_):
        self.numel = lambda: math.prod(shape)

    def random_(self):
        return self


def test_a_gpus_ceilings_are_bytes_and_operations_over_milliseconds(monkeypatch):
    here = SimpleNamespace(
        empty=Unreal, randn=Unreal, empty_like=lambda one: one, uint8="uint8", float16="float16", bfloat16="bfloat16",
        cuda=SimpleNamespace(empty_cache=lambda: None),
    )  # fmt: skip
    monkeypatch.setattr(ceilings, "torch", here)
    monkeypatch.setattr(ceilings, "_launches", lambda where: [])
    monkeypatch.setattr(ceilings, "gpu_name", lambda: "SYNTHETIC H200")
    monkeypatch.setattr(ceilings, "has_gpu", lambda: True)
    monkeypatch.setattr(ceilings, "gpu_ms", lambda call: 2.0)
    found = {t.data["name"]: t.data for t in ceilings.measured()}
    assert {name: one["unit"] for name, one in found.items()} == {
        "copy_bandwidth": "TB/s", "matmul_fp16": "TFLOPS", "matmul_bf16": "TFLOPS",
    }  # fmt: skip
    assert found["copy_bandwidth"]["value"] == pytest.approx(2 * 2**31 / 2e-3 / 1e12)
    for name in ("matmul_fp16", "matmul_bf16"):
        assert found[name]["value"] == pytest.approx(2 * 8192**3 / 2e-3 / 1e12)
        assert found[name]["device"] == "SYNTHETIC H200"


@pytest.mark.gpu
def test_a_gpus_ceilings_are_those_of_its_kind(run):
    found = {t.data["name"]: t.data["value"] for t in ceilings.ceilings(run)}
    assert found["copy_bandwidth"] > 1 and found["matmul_fp16"] > 100 and found["matmul_bf16"] > 100
    assert found["graph_node"] < found["launch_overhead"], "a node of a graph costs less than a launch from Python"
