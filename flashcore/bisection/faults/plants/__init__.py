"""How each bug of the catalogue is planted: patches of kernels and wrong methods, by backend.

Each backend has a module with the bugs that are planted in it; `host` holds what several of them share: wrong arguments
on the host's side. `page_selection` holds a wrong choice of pages, which no backend makes, and `invariance` bugs that
break bits and nothing else, which are not in the catalogue. A patch that does not fit the kernel's source exactly once
is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

from flashcore.bisection.faults.planting import Override, Source
from flashcore.bisection.faults.plants import cublaslt, decode, decode_paired, hopper, scalar, wmma
from flashcore.bisection.faults.plants.cpu import CPU
from flashcore.bisection.faults.plants.cublaslt import CUBLASLT
from flashcore.bisection.faults.plants.host import Plants
from flashcore.problem import Problem

__all__ = ["LATE", "PLANTS", "PROBLEMS", "host", "invariance", "of_fault", "page_selection", "problems_of"]

PLANTS: Mapping[str, Plants] = {
    "scalar": scalar.SCALAR,
    "wmma": wmma.WMMA,
    "hopper": hopper.SPLIT,
    "hopper-unsplit": hopper.UNSPLIT,
    "hopper-paged": hopper.PAGED,
    "decode": decode.DECODE,
    "decode-paired": decode_paired.PAIRED,
    "cublaslt": CUBLASLT,
    "cublaslt-batched": CUBLASLT,
    "cublaslt-paged": cublaslt.PAGED,
    "cpu": CPU,
}
"""By backend id, then by fault id."""
PROBLEMS: Mapping[str, Mapping[str, Problem]] = {
    "hopper-paged": hopper.PAGED_PROBLEMS, "decode": decode.PROBLEMS, "decode-paired": decode_paired.PROBLEMS,
}  # fmt: skip
"""By backend id, then by fault id: where a bug shows in a backend, if not at the catalogue's problem."""
LATE = {
    "scalar": scalar.LATE, "wmma": wmma.LATE, "hopper": hopper.SPLIT_LATE, "hopper-unsplit": hopper.UNSPLIT_LATE,
    "decode": decode.LATE, "decode-paired": decode.LATE,
}  # fmt: skip
"""By backend id, what delays copies there: no bug by itself, it makes a missing barrier show every time."""


def of_fault(fault_id: str) -> dict[str, Source | Override]:
    """How to plant one bug, by backend id."""
    return {backend: plants[fault_id] for backend, plants in PLANTS.items() if fault_id in plants}


def problems_of(fault_id: str) -> dict[str, Problem]:
    """The problems that show one bug, by backend id, where they are not the catalogue's."""
    return {backend: problems[fault_id] for backend, problems in PROBLEMS.items() if fault_id in problems}
