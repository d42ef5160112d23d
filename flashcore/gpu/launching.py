"""Compile, load and launch kernels: the way from a torch tensor to an entry function on the GPU."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flashcore.errors import LaunchError
from flashcore.gpu.build import compile_kernel, source_version
from flashcore.numerics.outputs import poisoned, poisoning

SHAPE = struct.Struct("6i")
"""`LaunchShape` of kernels/include/attention.cuh."""
COPY_BYTES = 16
"""Kernels copy 16 bytes at a time, so rows have to start at multiples of that."""


@dataclass(frozen=True, eq=False)
class LoadedKernel:
    """A cubin in the GPU's memory, and the launch shape that it asks for."""

    module: Any
    tile_m: int
    tile_n: int
    threads: int
    shared_bytes: int
    num_splits: int
    overlaps_launch: int


def load_kernel(
    kernel: str,
    head_dim: int,
    dtype: str,
    trace: bool,
    source: str | None,
    device: int,
    defines: tuple[tuple[str, int], ...] = (),
    entry: str | None = None,
) -> LoadedKernel:
    """Compile (or take from the cache), load on GPU number `device`, and read the launch shape of `entry`.

    A kernel whose file was edited since is compiled and loaded anew.
    """
    version = source_version(kernel) if source is None else None
    return _load_kernel(kernel, head_dim, dtype, trace, source, device, defines, entry, version)


@functools.lru_cache(maxsize=256)
def _load_kernel(kernel, head_dim, dtype, trace, source, device, defines, entry, version) -> LoadedKernel:
    import cupy

    cubin = compile_kernel(kernel, head_dim=head_dim, dtype=dtype, trace=trace, source=source, defines=dict(defines))
    with cupy.cuda.Device(device):
        module = cupy.RawModule(path=str(cubin.path))
        raw = np.empty(SHAPE.size, np.uint8)
        pointer = module.get_global(f"{entry or kernel}_shape")
        cupy.cuda.runtime.memcpy(raw.ctypes.data, pointer.ptr, raw.nbytes, cupy.cuda.runtime.memcpyDeviceToHost)
    return LoadedKernel(module, *SHAPE.unpack(raw.tobytes()))


@functools.lru_cache(maxsize=1024)
def entry_point(loaded: LoadedKernel, name: str, device: int) -> Any:
    """An entry function of a loaded cubin, allowed the dynamic shared memory that its launch shape asks for."""
    import cupy

    with cupy.cuda.Device(device):
        function = loaded.module.get_function(name)
        if loaded.shared_bytes:
            function.max_dynamic_shared_size_bytes = loaded.shared_bytes
    return function


class _TorchStream:
    """A stream of torch's, by the CUDA stream protocol that CuPy takes."""

    def __init__(self, pointer: int):
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@functools.lru_cache(maxsize=64)
def _stream(pointer: int) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14 and later
        return cupy.cuda.Stream.from_external(_TorchStream(pointer))
    return cupy.cuda.ExternalStream(pointer)


def launch(function: Any, blocks: int, threads: int, arguments: Sequence[Any], *, stream: int, shared: int = 0) -> None:
    """Launch `blocks` blocks on a stream given by its address."""
    with _stream(stream):
        function((blocks, 1, 1), (threads, 1, 1), tuple(arguments), shared_mem=shared)


class _Attribute(ctypes.Structure):
    """`CUlaunchAttribute` of the driver, for a value that is one int."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """`CUlaunchConfig` of the driver."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint),
    )  # fmt: skip


PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""The attribute by which a kernel may start before the one ahead of it in the stream has ended."""


@functools.cache
def _launch_kernel() -> Any:
    """The driver's cuLaunchKernelEx, called directly: half the time of a call through the bindings."""
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


class PreparedLaunch:
    """A launch on one stream whose arguments are packed once: repeated, it costs one call of the driver.

    Nothing in it changes after it is made, so that threads may share it.
    """

    def __init__(
        self,
        function: Any,
        loaded: LoadedKernel,
        blocks: tuple[int, int, int],
        arguments: Sequence[bytes],
        stream: int,
        *,
        again: bool = True,
        keeps: object = None,
        ahead: PreparedLaunch | None = None,
    ):
        self.again = again  # whether its arguments stay good for another call
        self._ahead = ahead  # a launch whose results this one reads
        self._keeps = keeps  # memory that they point to, and nobody else holds
        self._buffers = [ctypes.create_string_buffer(packed, len(packed)) for packed in arguments]
        self._overlap = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(
            grid=blocks, block=(loaded.threads, 1, 1), shared=loaded.shared_bytes, stream=stream,
            attributes=ctypes.pointer(self._overlap), num_attributes=loaded.overlaps_launch,
        )  # fmt: skip
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(b) for b in self._buffers))
        self._call = _launch_kernel()
        self._arguments = (ctypes.byref(self._config), ctypes.c_void_p(function.kernel.ptr), pointers, None)

    def launch(self) -> None:
        """Launch once more.

        Raises
        ------
        LaunchError
            The driver refused.
        """
        if self._ahead is not None:
            self._ahead.launch()
        status = self._call(*self._arguments)
        if status:
            from cuda.bindings import driver

            raise LaunchError("cuLaunchKernelEx", driver.CUresult(status).name)


def facts_of(tensor: torch.Tensor | None) -> tuple | None:
    """All that a launch takes from a tensor: two with the same facts can be launched on alike."""
    return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


KEPT_LAUNCHES = 1024
"""Prepared launches kept; an entry is half a kilobyte."""
_kept: dict[tuple, Any] = {}
kept_launch = _kept.get
"""What is kept under a key, or None: a look that costs no more than that."""


def kept(key: tuple | None, make: Callable[[], Any], good_again: Callable[[Any], bool] = bool) -> Any:
    """What was made under this key before; or make it, and keep it if it is good for another call.

    Packing arguments takes longer than a short kernel runs. None for a key: made anew each time.
    """
    found = _kept.get(key)
    if found is None:
        found = make()
        if key is not None and good_again(found):
            if len(_kept) >= KEPT_LAUNCHES:
                _kept.clear()
            _kept[key] = found
    return found


@functools.lru_cache(maxsize=16)
def device_name(device: int) -> str:
    """What the GPU calls itself, as in 'NVIDIA H200'."""
    return torch.cuda.get_device_name(device)


@functools.lru_cache(maxsize=16)
def multiprocessors(device: int) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def capture_id(stream: int) -> int:
    """Which CUDA graph the stream is being captured into; 0 for none."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    from cuda.bindings import driver

    return int(driver.cuStreamGetCaptureInfo(stream)[2])


def current_stream(device: int) -> int:
    """Address of torch's current stream on a GPU."""
    # What torch gives the kernels that its own compiler makes: a fifth of the time of building a Stream object.
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device).cuda_stream if raw is None else raw(device)


def as_argument(packed: bytes) -> np.ndarray:
    """A struct to pass to a kernel by value."""
    return np.frombuffer(packed, dtype=f"V{len(packed)}").reshape(())


@functools.lru_cache(maxsize=4096)
def _rows_aligned(shape: torch.Size, stride: tuple[int, ...], element_size: int) -> bool:
    rows = zip(shape[:-1], stride[:-1], strict=True)
    return all(size == 1 or step * element_size % COPY_BYTES == 0 for size, step in rows)


def _rounded(rows: int) -> int:
    return -(-rows // 4) * 4


def behind(lse: torch.Tensor) -> int:
    """The address of the room behind `lse` (`outputs_for`), a multiple of 16 bytes."""
    return lse.data_ptr() + 4 * _rounded(lse.numel())


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return tensor.data_ptr() % COPY_BYTES == 0 and _rows_aligned(tensor.shape, tensor.stride(), tensor.element_size())


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if every row starts at a multiple of 16 bytes, else a contiguous copy."""
    return tensor if is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def outputs_for(q: torch.Tensor, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for `out` and `lse`; `out` in the memory order of `q`: a `[B,S,H,D]` view in gives one out.

    With `room`, so many ints lie behind `lse`, from `behind(lse)` on. They are no tensor of their own, which a prepared
    launch would have to keep: it may have been made inside the memory pool of a graph, which allows none to be kept.
    """
    out = torch.empty_like(q)
    if room:
        rows = q.shape[0] * q.shape[1] * q.shape[2]
        lse = torch.empty(_rounded(rows) + room, dtype=torch.float32, device=q.device)[:rows].view(q.shape[:3])
    else:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return (poisoned(out), poisoned(lse)) if poisoning() else (out, lse)
