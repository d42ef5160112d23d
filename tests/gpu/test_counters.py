"""A card's counters: what NVML tells, and nothing made up where it does not."""

from __future__ import annotations

import types

import pytest

from flashcore.gpu import counters, device


class Nvml(types.SimpleNamespace):
    """A made-up NVML that knows some of the questions."""

    class NVMLError(Exception):
        pass

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_VOLATILE_ECC = "bad", "mended", 0
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1

    def __getattr__(self, name):
        def refuse(*_):
            raise self.NVMLError

        return refuse


@pytest.fixture
def nvml(monkeypatch):
    found = Nvml()
    monkeypatch.setattr(counters, "_ask_nvml", lambda question: _asked(question, found))
    return found


def _asked(question, nvml):
    try:
        return question(nvml, "handle")
    except Nvml.NVMLError:
        return None


def test_what_is_told_is_told_in_its_unit_and_the_rest_is_left_out(nvml, monkeypatch):
    nvml.nvmlDeviceGetTotalEccErrors = lambda handle, kind, counter: {"bad": 0, "mended": 4}[kind]
    nvml.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 700_000
    nvml.nvmlDeviceGetRemappedRows = lambda handle: (1, 2, 0, 1)
    nvml.nvmlDeviceGetCurrPcieLinkWidth = lambda handle: 16
    mine = types.SimpleNamespace(pid=7)
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: [mine, types.SimpleNamespace(pid=8)]
    monkeypatch.setattr(counters.os, "getpid", lambda: 7)
    assert counters.counters() == {
        "ecc_uncorrected": 0, "ecc_corrected": 4, "pcie_width": 16, "power_limit_w": 700, "rows_remapped": 3,
        "remap_pending": False, "remap_failed": True, "others": 1,
    }  # fmt: skip


def test_without_nvml_nothing_is_known(monkeypatch):
    monkeypatch.setattr(device, "_nvml_handle", lambda: None)
    assert counters.counters() == {}


@pytest.mark.gpu
def test_a_real_card_tells_its_link_and_its_limit():
    found = counters.counters()
    assert found["power_limit_w"] > 50 and found["pcie_width"] >= 1 and found["ecc_uncorrected"] == 0
