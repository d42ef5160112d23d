"""The launch shapes that the Hopper kernel exports, without a GPU to load it on."""

from __future__ import annotations

from flashcore import backends
from flashcore.gpu.launching import LoadedKernel
from flashcore.problem import Problem

MULTIPROCESSORS = 132
"""Of an H100 or H200, which these tests stand on."""


def loaded_for(problem: Problem, *, split: bool = False) -> LoadedKernel:
    """The launch shape that the kernel exports for a problem, without a GPU to load it on."""
    if split:
        chains = 4 if problem.head_dim == 64 else 3
        tile_m, tile_n, threads = 64, 64, 128 * chains
    else:
        asked = dict(backends.get("hopper").defines(problem, 0))
        warpgroups = asked.get("FLASHCORE_NUM_CONSUMERS", 4 if problem.head_dim == 64 else 3)
        tile_m, tile_n, threads = 64 * warpgroups, asked.get("FLASHCORE_TILE_N", 64), 128 * (warpgroups + 1)
        chains = 1
    fields = {"module": None, "tile_m": tile_m, "tile_n": tile_n, "threads": threads, "shared_bytes": 200 * 1024}
    return LoadedKernel(**fields, num_splits=chains, overlaps_launch=int(split))
