"""Compile what checks will ask for before the first of them: forms of our kernels, many at once, into the disk's cache.

A process of a crew that meets a form for the first time waits seconds for the compiler, and the GPU waits with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from flashcore.backends import Backend, CudaBackend
from flashcore.errors import FlashCoreError
from flashcore.gpu import device
from flashcore.gpu.build import ARCH, compile_kernel, variant_hash
from flashcore.measure.cluster import Task
from flashcore.problem import Problem
from flashcore.records import Trial

LIMIT_S = 120.0
"""Seconds that the compiler may take for one form; it takes 2 to 5, and more while all cores are busy."""
COST_S = 30.0
"""What a task says that it takes, so that all forms are there, or on their way, before the first check begins."""


def tasks(wanted: Iterable[tuple[Problem, Backend]]) -> list[Task]:
    """Each form of a kernel that these checks ask for, once, as a task for `cluster.perform` that yields no record.

    They are those that the cache has too, which cost nothing. What does not compile is left for the check to say. None
    on a machine without a GPU, where no kernel of ours runs.
    """
    if not device.has_gpu():
        return []
    return [
        Task(f"compile {kernel} D={head_dim} {dtype}", _compiled, (kernel, head_dim, dtype, defines, source),
             limit_s=LIMIT_S, cost_s=COST_S, owed=(_owed(kernel, head_dim, dtype, defines),))
        for kernel, head_dim, dtype, defines, source in forms(wanted, torch.cuda.current_device())
    ]  # fmt: skip


def forms(wanted: Iterable[tuple[Problem, Backend]], number: int) -> list[tuple[str, int, str, tuple, str | None]]:
    """Kernel, head_dim, dtype, macros and planted source of all that GPU `number` is to run, each once, in order."""
    found: dict[tuple, None] = {}
    for problem, one in wanted:
        if isinstance(one, CudaBackend) and one.kernel and one.availability().ok and one.why_not(problem) is None:
            defines = tuple(one.defines(problem, number))
            found[one.kernel, problem.head_dim, problem.dtype, defines, one.source] = None
    return list(found)


def _owed(kernel: str, head_dim: int, dtype: str, defines: tuple) -> dict[str, Any]:
    data = {"kernel": kernel, "head_dim": head_dim, "dtype": dtype, "trace": False, "arch": ARCH,
            "defines": dict(defines)}  # fmt: skip
    return {
        "kind": "build",
        "source_hash": variant_hash(kernel, dict(defines)),
        "data": data,
    }


def _compiled(kernel: str, head_dim: int, dtype: str, defines: tuple, source: str | None) -> Iterator[Trial]:
    with contextlib.suppress(FlashCoreError):
        compile_kernel(kernel, head_dim=head_dim, dtype=dtype, source=source, defines=dict(defines))
    yield from ()
