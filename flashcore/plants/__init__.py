"""How each bug of the catalogue (`flashcore.faults`) is planted: patches of kernels and wrong methods, by backend."""

from __future__ import annotations

from collections.abc import Mapping

from flashcore.planting import Override, Source
from flashcore.plants import hopper, scalar, wmma
from flashcore.plants.cpu import CPU
from flashcore.plants.cublaslt import CUBLASLT
from flashcore.plants.host import Plants

PLANTS: Mapping[str, Plants] = {
    "scalar": scalar.SCALAR,
    "wmma": wmma.WMMA,
    "hopper": hopper.SPLIT,
    "hopper-unsplit": hopper.UNSPLIT,
    "cublaslt": CUBLASLT,
    "cublaslt-batched": CUBLASLT,
    "cpu": CPU,
}
"""By backend id, then by fault id."""
LATE = {"scalar": scalar.LATE, "wmma": wmma.LATE, "hopper": hopper.SPLIT_LATE, "hopper-unsplit": hopper.UNSPLIT_LATE}
"""By backend id, what delays copies there: no bug by itself, it makes a missing barrier show every time."""


def of_fault(fault_id: str) -> dict[str, Source | Override]:
    """How to plant one bug, by backend id."""
    return {backend: plants[fault_id] for backend, plants in PLANTS.items() if fault_id in plants}
