"""SYNTHETIC records of a fleet: eight cards that are alike, and ways in which one of them is not."""

from __future__ import annotations

import copy
from typing import Any

from flashcore.records import Trial

FIGURES = {
    "attention": (640.0, "TFLOPS"), "causal_attention": (610.0, "TFLOPS"), "small_call": (4.8, "µs"),
    "matmul_fp16": (700.0, "TFLOPS"), "matmul_bf16": (720.0, "TFLOPS"), "copy_bandwidth": (4.1, "TB/s"),
    "graph_node": (1.6, "us"), "host_copy": (55.0, "GB/s"),
}  # fmt: skip
LOAD = {"sm_clock_mhz": 1830.0, "memory_clock_mhz": 3201.0, "power_w": 690.0, "temperature_c": 58.0,
        "throttle_reasons": ["software power cap"]}  # fmt: skip
COUNTERS = {"ecc_uncorrected": 0, "ecc_corrected": 0, "rows_remapped": 0, "remap_failed": False, "pcie_width": 16,
            "pcie_width_most": 16, "pcie_gen": 5, "power_limit_w": 700, "others": 1}  # fmt: skip


def card(number: int, *, kind: str = "NVIDIA H200", node: str = "box", **changes: Any) -> Trial:
    """One card; every card differs from the next by a fraction of a percent.

    Parameters
    ----------
    changes
        ``factors`` by figure, and values of ``load``, ``counters``, ``bits`` and ``wrong``.
    """
    jitter = 1 + 0.001 * ((number * 5) % 7 - 3)
    factors = changes.pop("factors", {})
    data = {
        "what": "card", "kind": kind, "cpu": False,
        "figures": {n: {"value": v * jitter * factors.get(n, 1.0), "unit": u} for n, (v, u) in FIGURES.items()},
        "load": copy.deepcopy(LOAD) | changes.pop("load", {}), "counters": COUNTERS | changes.pop("counters", {}),
        "bits": {"hopper": ["aa11"], "wmma": ["bb22"]} | changes.pop("bits", {}), "wrong": changes.pop("wrong", []),
    }  # fmt: skip
    return Trial(kind="fleet", data=data, card=f"GPU-{number:08x}-0000-0000-0000-000000000000", node=node, **changes)


def cards(count: int = 8, **odd: Any) -> list[Trial]:
    """A fleet whose last card is odd in the given way."""
    return [card(i, **(copy.deepcopy(odd) if i == count - 1 else {})) for i in range(count)]
