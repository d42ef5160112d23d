"""The speed of reading alone is measured once a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashcore.gpu import build
from flashcore.records import Trial
from flashcore.surveys.paging import read_speed as measuring
from flashcore.surveys.paging.read_speed import NAME, SOURCE, read_speed


def test_the_read_speed_is_measured_once_a_run(run):
    first = read_speed(run)
    assert first.kind == "ceiling" and first.data["name"] == NAME and first.data["unit"] == "TB/s"
    assert first.data["value"] > 0
    assert read_speed(run).data == first.data and len(run.trials(kind="ceiling")) == 1


def test_a_figure_of_another_thing_or_one_that_failed_is_measured_anew(run, monkeypatch):
    monkeypatch.setattr(measuring, "_on_cpu", lambda: (0.0123456789, "by hand"))
    monkeypatch.setattr(measuring.device, "has_gpu", lambda: False)
    run.append(Trial(kind="ceiling", data={"name": "copy_bandwidth", "value": 3.0}))
    run.append(Trial(kind="ceiling", status="error", reason="busy", data={"name": NAME}))
    found = read_speed(run)
    assert found.data["value"] == 0.012346 and found.data["method"] == "by hand" and found.status == "ok"
    run.append(found.model_copy(update={"data": {**found.data, "value": 4.6}}))
    assert read_speed(run).data["value"] == 4.6, "the last one counts"
    assert len(run.trials(kind="ceiling")) == 4


def test_without_a_read_kernel_a_sum_is_timed_and_says_so(monkeypatch):
    def no_kernel(data, blocks):
        raise ImportError("no cupy")

    small = 1 << 10
    zeros = torch.zeros
    monkeypatch.setattr(measuring, "BYTES", small)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **more: zeros(*shape, **more))
    monkeypatch.setattr(measuring, "_kernel_tbs", no_kernel)
    monkeypatch.setattr(measuring.profiling, "graph_us", lambda call, **how: 0.5 if call(0) == 0 else None)
    speed, method = measuring._on_gpu()
    assert speed == small / 0.5 / 1e6 and "added up by torch" in method and "(ImportError)" in method


def test_the_best_grid_is_the_figure(monkeypatch):
    speeds = {2: 1.5, 4: 3.5, 8: 3.0, 16: 2.0}
    zeros = torch.zeros
    monkeypatch.setattr(measuring, "BYTES", 1 << 10)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **more: zeros(*shape, **more))
    monkeypatch.setattr(measuring, "_kernel_tbs", lambda data, blocks: speeds[blocks])
    speed, method = measuring._on_gpu()
    assert speed == 3.5 and "best of 4 grids (4 blocks of 512 threads an SM)" in method


@pytest.mark.compiler
def test_the_read_kernel_compiles_without_a_warning():
    code, log = build._nvrtc(Path("read_all.cu"), SOURCE, {"FLASHCORE_READ": 1})
    assert b"read_all" in code and "warning" not in log.lower()
