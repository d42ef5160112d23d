"""Read a card's own counters: errors of its memory, its link to the host, its limits, and who else uses it."""

from __future__ import annotations

import os
from typing import Any

from flashcore.gpu.device import _ask_nvml

IDLE_REASONS = ("gpu idle", "application clocks", "display clocks")
"""Reasons for a clock below the highest that say nothing against a card."""


def counters() -> dict[str, Any]:
    """What NVML tells of the current card; a figure that it does not tell is left out, and without NVML all are.

    Returns
    -------
    dict
        ``ecc_uncorrected`` and ``ecc_corrected``: errors since the driver was loaded. ``rows_remapped``: over the
        card's life, after errors; ``remap_pending`` and ``remap_failed``. ``pcie_width``, ``pcie_gen``, and with
        ``_most`` what the link could be at best. ``power_limit_w``, ``sm_clock_most_mhz``, ``memory_clock_most_mhz``.
        ``others``: processes with a CUDA context on the card besides this one; the one that gives out the work may be
        among them.
    """
    found: dict[str, Any] = {
        "ecc_uncorrected": _ask_nvml(lambda n, h: n.nvmlDeviceGetTotalEccErrors(
            h, n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, n.NVML_VOLATILE_ECC)),
        "ecc_corrected": _ask_nvml(lambda n, h: n.nvmlDeviceGetTotalEccErrors(
            h, n.NVML_MEMORY_ERROR_TYPE_CORRECTED, n.NVML_VOLATILE_ECC)),
        "pcie_width": _ask_nvml(lambda n, h: n.nvmlDeviceGetCurrPcieLinkWidth(h)),
        "pcie_width_most": _ask_nvml(lambda n, h: n.nvmlDeviceGetMaxPcieLinkWidth(h)),
        "pcie_gen": _ask_nvml(lambda n, h: n.nvmlDeviceGetCurrPcieLinkGeneration(h)),
        "pcie_gen_most": _ask_nvml(lambda n, h: n.nvmlDeviceGetMaxPcieLinkGeneration(h)),
        "sm_clock_most_mhz": _ask_nvml(lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM)),
        "memory_clock_most_mhz": _ask_nvml(lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_MEM)),
    }  # fmt: skip
    limit = _ask_nvml(lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h))
    found["power_limit_w"] = None if limit is None else round(limit / 1000)
    rows = _ask_nvml(lambda n, h: n.nvmlDeviceGetRemappedRows(h))
    if rows is not None:
        corrected, uncorrected, pending, failed = rows
        found |= {"rows_remapped": corrected + uncorrected, "remap_pending": bool(pending),
                  "remap_failed": bool(failed)}  # fmt: skip
    running = _ask_nvml(lambda n, h: n.nvmlDeviceGetComputeRunningProcesses(h))
    if running is not None:
        found["others"] = sum(process.pid != os.getpid() for process in running)
    return {name: value for name, value in found.items() if value is not None}
