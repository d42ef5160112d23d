"""How each bug of the catalogue (`flashcore.faults`) is planted: patches of kernels and wrong methods, by backend."""

from __future__ import annotations

from collections.abc import Mapping

from flashcore.planting import Override, Source
from flashcore.plants import cublaslt, decode, hopper, scalar, wmma
from flashcore.plants.cpu import CPU
from flashcore.plants.cublaslt import CUBLASLT
from flashcore.plants.host import Plants
from flashcore.problem import Problem

PLANTS: Mapping[str, Plants] = {
    "scalar": scalar.SCALAR,
    "wmma": wmma.WMMA,
    "hopper": hopper.SPLIT,
    "hopper-unsplit": hopper.UNSPLIT,
    "hopper-paged": hopper.PAGED,
    "decode": decode.DECODE,
    "cublaslt": CUBLASLT,
    "cublaslt-batched": CUBLASLT,
    "cublaslt-paged": cublaslt.PAGED,
    "cpu": CPU,
}
"""By backend id, then by fault id."""
PROBLEMS: Mapping[str, Mapping[str, Problem]] = {"hopper-paged": hopper.PAGED_PROBLEMS, "decode": decode.PROBLEMS}
"""By backend id, then by fault id: where a bug shows in a backend, if not at the catalogue's problem."""
LATE = {
    "scalar": scalar.LATE, "wmma": wmma.LATE, "hopper": hopper.SPLIT_LATE, "hopper-unsplit": hopper.UNSPLIT_LATE,
    "decode": decode.LATE,
}  # fmt: skip
"""By backend id, what delays copies there: no bug by itself, it makes a missing barrier show every time."""


def of_fault(fault_id: str) -> dict[str, Source | Override]:
    """How to plant one bug, by backend id."""
    return {backend: plants[fault_id] for backend, plants in PLANTS.items() if fault_id in plants}


def problems_of(fault_id: str) -> dict[str, Problem]:
    """The problems that show one bug, by backend id, where they are not the catalogue's."""
    return {backend: problems[fault_id] for backend, problems in PROBLEMS.items() if fault_id in problems}
