"""Launch one of our CUDA kernels on torch tensors: one class, which a backend module subclasses in a few lines."""

from __future__ import annotations

import functools
import importlib.util
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flashcore.backends import AVAILABLE, Availability, Backend
from flashcore.backends._outputs import new_output
from flashcore.build import compile_kernel
from flashcore.problem import Problem
from flashcore.reference import Trace

_PARAMS = struct.Struct("5Q 12q 6i f 4x")
"""`AttentionParams` of kernels/include/attention.cuh: five pointers, four strides of three, six ints, the scale."""
_TRACE = struct.Struct("6Q 2i")
"""`TraceBuffers` of kernels/include/trace.cuh."""
_SHAPE = struct.Struct("4i")
"""`LaunchShape` of kernels/include/attention.cuh."""
_COPY_BYTES = 16
"""Kernels copy 16 bytes at a time, so rows have to start at multiples of that."""
_NOT_WRITTEN = 0x7FC0_DEAD
"""A NaN that no arithmetic makes: trace buffers start out full of it, so that a page a kernel skipped can be told."""


@dataclass(frozen=True)
class LoadedKernel:
    """An entry function in the GPU's memory, and the launch shape that its cubin asks for."""

    function: Any
    tile_m: int
    tile_n: int
    threads: int
    shared_bytes: int


@functools.lru_cache(maxsize=256)
def load_kernel(kernel: str, head_dim: int, dtype: str, trace: bool, source: str | None, device: int) -> LoadedKernel:
    """Compile (or take from the cache), load on GPU number `device`, and read the launch shape."""
    import cupy

    cubin = compile_kernel(kernel, head_dim=head_dim, dtype=dtype, trace=trace, source=source)
    with cupy.cuda.Device(device):
        module = cupy.RawModule(path=str(cubin.path))
        raw = np.empty(_SHAPE.size, np.uint8)
        pointer = module.get_global(f"{kernel}_shape")
        cupy.cuda.runtime.memcpy(raw.ctypes.data, pointer.ptr, raw.nbytes, cupy.cuda.runtime.memcpyDeviceToHost)
        tile_m, tile_n, threads, shared_bytes = _SHAPE.unpack(raw.tobytes())
        function = module.get_function(kernel)
        if shared_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
    return LoadedKernel(function, tile_m, tile_n, threads, shared_bytes)


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


@functools.lru_cache(maxsize=16)
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _as_argument(packed: bytes) -> np.ndarray:
    """A struct to pass to a kernel by value."""
    return np.frombuffer(packed, dtype=f"V{len(packed)}").reshape(())


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if every row starts at a multiple of 16 bytes, else a contiguous copy."""
    rows_aligned = all(
        size == 1 or stride * tensor.element_size() % _COPY_BYTES == 0
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    )
    if rows_aligned and tensor.data_ptr() % _COPY_BYTES == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _output_like(q: torch.Tensor) -> torch.Tensor:
    """Room for the output, in the memory order of `q`: a `[B,S,H,D]` view in gives a `[B,S,H,D]` view out."""
    if not q.is_contiguous() and q.transpose(1, 2).is_contiguous():
        batch, heads, rows, columns = q.shape
        return new_output((batch, rows, heads, columns), q.dtype, q.device).transpose(1, 2)
    return new_output(tuple(q.shape), q.dtype, q.device)


class CudaBackend(Backend):
    """A backend whose whole work is one launch of one kernel that takes `AttentionParams`.

    A subclass names `id`, `title` and `kernel`; the kernel exports `<kernel>` and `<kernel>_shape`.
    """

    role = "ours"
    device = "cuda"
    head_dims = (64, 128)
    traceable = True
    source: str | None = None
    """Kernel source in place of the file's own; set by a planted fault."""

    def availability(self) -> Availability:
        if not torch.cuda.is_available():
            return Availability(
                False, "no CUDA GPU is visible to torch", "run on an H100 or H200 with a CUDA build of torch"
            )
        major, minor = _capability(torch.cuda.current_device())
        if (major, minor) != (9, 0):
            return Availability(
                False, f"the kernels are built for compute capability 9.0 and this GPU has {major}.{minor}",
                "run on an H100 or H200",
            )  # fmt: skip
        if importlib.util.find_spec("cupy") is None:
            cuda = (torch.version.cuda or "12").split(".")[0]
            return Availability(
                False, "CuPy is not installed", f"pip install 'flashcore[{'gpu' if cuda == '12' else 'gpu-cuda13'}]'"
            )
        return AVAILABLE

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = _output_like(q)
        lse = new_output(tuple(q.shape[:3]), torch.float32, q.device)
        self._launch(q, k, v, out, lse, problem, trace=None)
        return out, lse

    def trace(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Trace:
        loaded = self._load(q, problem, trace=True)
        batch, heads, seqlen_q, seqlen_k = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        pages = -(-seqlen_k // loaded.tile_n)
        padded_rows = -(-seqlen_q // loaded.tile_m) * loaded.tile_m

        def room(*shape: int) -> torch.Tensor:
            return torch.full(shape, _NOT_WRITTEN, dtype=torch.int32, device=q.device).view(torch.float32)

        scores, probs = room(batch, heads, seqlen_q, seqlen_k), room(batch, heads, seqlen_q, seqlen_k)
        row_max, rescale, row_sum = (room(batch, heads, pages, seqlen_q) for _ in range(3))
        accum = room(batch, heads, pages, padded_rows, problem.head_dim)
        out, lse = _output_like(q).fill_(float("nan")), room(batch, heads, seqlen_q)
        pointers = [t.data_ptr() for t in (scores, row_max, rescale, probs, row_sum, accum)]
        self._launch(q, k, v, out, lse, problem, trace=_as_argument(_TRACE.pack(*pointers, pages, padded_rows)))
        trace = Trace(
            page_size=loaded.tile_n, scores=scores, row_max=row_max, rescale=rescale, probs=probs, row_sum=row_sum,
            accum=accum[:, :, :, :seqlen_q], out=out, lse=lse,
        )  # fmt: skip
        _fill_skipped_pages(trace, problem)
        return trace

    def strides(self, name: str, tensor: torch.Tensor) -> Sequence[int]:
        """Strides of batch, head and row of tensor `name` (q, k, v or out), in elements."""
        return tensor.stride()[:3]

    def scale(self, problem: Problem) -> float:
        """The softmax scale to launch with."""
        return problem.scale

    def _load(self, q: torch.Tensor, problem: Problem, *, trace: bool) -> LoadedKernel:
        return load_kernel(self.kernel, problem.head_dim, problem.dtype, trace, self.source, q.device.index or 0)

    def _launch(self, q, k, v, out, lse, problem: Problem, *, trace: np.ndarray | None) -> None:
        loaded = self._load(q, problem, trace=trace is not None)
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
        params = _PARAMS.pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(),
            *self.strides("q", q), *self.strides("k", k), *self.strides("v", v), *self.strides("out", out),
            problem.batch, problem.num_heads_q, problem.num_heads_kv, problem.seqlen_q, problem.seqlen_k,
            int(problem.causal), self.scale(problem),
        )  # fmt: skip
        tiles = -(-problem.seqlen_q // loaded.tile_m)
        grid = (tiles * problem.num_heads_q * problem.batch, 1, 1)
        arguments = (_as_argument(params),) if trace is None else (_as_argument(params), trace)
        with _stream(torch.cuda.current_stream(q.device).cuda_stream):
            loaded.function(grid, (loaded.threads, 1, 1), arguments, shared_mem=loaded.shared_bytes)


def _fill_skipped_pages(trace: Trace, problem: Problem) -> None:
    """Give the pages that a causal kernel rightly never visits the values of an update that changes nothing.

    A page may be skipped for a row that sees none of its keys. Only there, and only where the kernel wrote nothing,
    the trace is filled in; a page skipped wrongly stays NaN and is found.
    """
    if not problem.causal:
        return
    device = trace.scores.device
    pages = trace.row_max.shape[2]
    rows = torch.arange(problem.seqlen_q, device=device)
    visible = (rows + 1 + problem.seqlen_k - problem.seqlen_q).clamp(0, problem.seqlen_k)

    def not_written(stage: torch.Tensor) -> torch.Tensor:
        return stage.view(torch.int32) == _NOT_WRITTEN

    for page in range(pages):
        first, last = page * trace.page_size, min((page + 1) * trace.page_size, problem.seqlen_k)
        skippable = visible <= first  # [seqlen_q]
        for stage, value in ((trace.scores, float("-inf")), (trace.probs, 0.0)):
            part = stage[:, :, :, first:last]
            part.masked_fill_(not_written(part) & skippable[:, None], value)
        for stage, before_any in ((trace.row_max, float("-inf")), (trace.row_sum, 0.0), (trace.accum, 0.0)):
            part = stage[:, :, page]
            previous = stage[:, :, page - 1] if page else torch.full_like(part, before_any)
            mask = skippable if part.dim() == 3 else skippable[:, None]
            part.copy_(torch.where(not_written(part) & mask, previous, part))
        part = trace.rescale[:, :, page]
        part.masked_fill_(not_written(part) & skippable, 1.0)
