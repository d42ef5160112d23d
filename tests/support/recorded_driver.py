"""A stand-in for the CUDA driver's cuLaunchKernelEx, called as the driver is: it reads what it is pointed to."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from types import SimpleNamespace

from flashcore.gpu import launching
from flashcore.gpu.launching import LoadedKernel

PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(launching._Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)


@dataclass
class Launch:
    """One launch, as the driver was told of it."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    attributes: list[tuple[int, int]]
    arguments: list[bytes]


@dataclass
class RecordedDriver:
    """Keeps every launch; a launch takes `sizes` bytes of each argument, or those of its function's address."""

    sizes: list[int] | dict[int, list[int]]
    status: int = 0
    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self):
        self.call = PROTOTYPE(self._launch)

    def _launch(self, config, function, arguments, extra):
        told = config.contents
        attributes = [(told.attributes[n].id, told.attributes[n].value) for n in range(told.num_attributes)]
        sizes = self.sizes[function] if isinstance(self.sizes, dict) else self.sizes
        packed = [ctypes.string_at(arguments[n], size) for n, size in enumerate(sizes)]
        self.launches.append(
            Launch(function, tuple(told.grid), tuple(told.block), told.shared, told.stream or 0, attributes, packed)
        )
        return self.status


def loaded(**changes) -> LoadedKernel:
    """A kernel's launch shape, without a cubin."""
    shape = {"tile_m": 32, "tile_n": 16, "threads": 128, "shared_bytes": 0, "num_splits": 1, "overlaps_launch": 0}
    return LoadedKernel(module=None, **{**shape, **changes})


def function_at(address: int) -> SimpleNamespace:
    """An entry function as CuPy gives it, as far as a launch looks at it."""
    return SimpleNamespace(kernel=SimpleNamespace(ptr=address))
