"""A backend whose work is one launch of one of our kernels; a backend module subclasses it in a few lines."""

from __future__ import annotations

import functools
import importlib.util
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashcore.backends import _masks
from flashcore.backends._chunks import chains
from flashcore.backends._contract import AVAILABLE, Availability, Backend
from flashcore.backends._traces import TraceBuffers
from flashcore.gpu.build import source_version
from flashcore.gpu.launching import (
    LoadedKernel,
    PreparedLaunch,
    aligned,
    current_stream,
    entry_point,
    kept,
    kept_launch,
    load_kernel,
    outputs_for,
)
from flashcore.gpu.rooms import Room
from flashcore.numerics import masking
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.reference import Trace, interleaved
from flashcore.problem import Problem

PARAMS = struct.Struct("5Q 12q 6i f 4x")
"""`AttentionParams` of kernels/include/attention.cuh: five pointers, four strides of three, six ints, the scale."""


@dataclass(frozen=True)
class Masked:
    """What a launch needs for the masks of its problem."""

    packed: bytes
    """The struct that the kernel takes."""
    ahead: PreparedLaunch | None = None
    """A launch that has to come first."""
    blocks: tuple[int, int, int] | None = None
    """The grid, where masks change it."""


is_good_again = operator.attrgetter("again")
"""Whether a launch is worth keeping."""


@functools.lru_cache(maxsize=16)
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


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

    def why_not(self, problem: Problem) -> str | None:
        return super().why_not(problem) or _masks.why_not(problem)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, masks: MaskTensors | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Only lengths need room, and they come as tensors: a plain call asks for nothing.
        out, lse = outputs_for(q) if masks is None else outputs_for(q, self.room(q, problem))
        self._launch(q, k, v, out, lse, problem, masks)
        return out, lse

    def trace(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, masks: MaskTensors | None = None
    ) -> Trace:
        if problem.lengths == "ragged":  # there is room for stages of whole sequences: those with padding, then
            q, k, v, problem, masks = masking.right_aligned(q, k, v, problem, masks)
        loaded = self.load(problem, q.device, trace=True)
        buffers = TraceBuffers.make(problem, loaded.tile_n, loaded.tile_m, q.device)
        out, lse = (tensor.fill_(float("nan")) for tensor in outputs_for(q, self.room(q, problem)))
        self._launch(q, k, v, out, lse, problem, masks, buffers)
        pages = -(-problem.seqlen_k // loaded.tile_n)
        previous = interleaved(pages, loaded.num_splits) if loaded.num_splits > 1 else None
        if problem.batch_invariant:
            previous = chains(problem.seqlen_k)
        return buffers.trace(problem, loaded.tile_n, out, lse, previous, masks)

    def strides(self, name: str, tensor: torch.Tensor) -> Sequence[int]:
        """Strides of batch, head and row of tensor `name` (q, k, v or out), in elements."""
        return tensor.stride()[:3]

    def scale(self, problem: Problem) -> float:
        """The softmax scale to launch with."""
        return problem.scale

    def defines(self, problem: Problem, device: int) -> tuple[tuple[str, int], ...]:
        """Macros to compile the kernel with for this problem, besides head_dim and dtype."""
        return ()

    def entry(self, problem: Problem, device: int) -> str:
        """The entry function to launch for this problem, of those in the kernel's file."""
        return self.kernel

    def version(self) -> str:
        """What is to run: the source put in place of the file's own, or a name for the file's text as it is now."""
        return self.source if self.source is not None else source_version(self.kernel)

    def load(self, problem: Problem, device: torch.device, *, trace: bool) -> LoadedKernel:
        """This backend's kernel for the problem."""
        number = device.index or 0
        return load_kernel(
            self.kernel, problem.head_dim, problem.dtype, trace, self.source, number, self.defines(problem, number),
            self.entry(problem, number),
        )  # fmt: skip

    def seqlens(self, q, k, problem: Problem) -> tuple[int, int]:
        """Rows of Q, and of K and V, that the kernel is told of."""
        return problem.seqlen_q, problem.seqlen_k

    def params(self, q, k, v, out, lse, problem: Problem) -> bytes:
        """`AttentionParams`, packed."""
        return PARAMS.pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(),
            *self.strides("q", q), *self.strides("k", k), *self.strides("v", v), *self.strides("out", out),
            q.shape[0], problem.num_heads_q, problem.num_heads_kv, *self.seqlens(q, k, problem),
            int(problem.causal), self.scale(problem),
        )  # fmt: skip

    def arguments(self, q, k, v, out, lse, problem: Problem, loaded: LoadedKernel) -> list[bytes]:
        """What the entry function takes, each packed; what masks need, and room for stages, come after it."""
        return [self.params(q, k, v, out, lse, problem)]

    def room(self, q, problem: Problem) -> int:
        """Ints that a launch needs room for besides its outputs; they lie behind `lse`, and go with it."""
        return 0

    def masked(self, arguments, q, lse, problem: Problem, masks: MaskTensors | None, stream: int) -> Masked:
        """What the kernel is told of masks, and what has to run before it; for a backend that takes any."""
        raise NotImplementedError

    def room_for_sums(
        self, problem: Problem, loaded: LoadedKernel, keys: int, device: torch.device, stream: int
    ) -> Room | None:
        """Where the kernel keeps sums over chunks in the batch-invariant mode; None if it takes no such room.

        Parameters
        ----------
        keys
            Rows of K and V that the kernel may reach, whatever lengths it reads.
        """
        return None

    def told_of_room(
        self, arguments: list[bytes], problem: Problem, loaded: LoadedKernel, keys: int, device: torch.device,
        stream: int,
    ) -> Room | None:  # fmt: skip
        """Add the address of `room_for_sums` to the arguments of a launch, where it has some; returns what to keep."""
        sums = self.room_for_sums(problem, loaded, keys, device, stream) if problem.batch_invariant else None
        if sums is not None:
            arguments.append(struct.pack("Q", sums.address))
        return sums

    def has_own_room(self) -> bool:
        """Whether a launch that takes room gets some of its own, and so is not kept (`flashcore.gpu.rooms`).

        In a graph that is captured, whose memory nobody may hold, and where a planted bug may leave anything behind.
        """
        return self.source is not None or torch.cuda.is_current_stream_capturing()

    def blocks(self, problem: Problem, loaded: LoadedKernel, device: int) -> tuple[int, int, int]:
        """The grid to launch: one block a tile of query rows."""
        return -(-problem.seqlen_q // loaded.tile_m) * problem.num_heads_q * problem.batch, 1, 1

    def _launch(
        self, q, k, v, out, lse, problem: Problem, masks: MaskTensors | None = None, buffers: TraceBuffers | None = None
    ) -> None:
        device = q.device.index or 0
        stream = current_stream(device)
        key = (
            type(self), self.version(), problem, device, stream, q.data_ptr(), k.data_ptr(), v.data_ptr(),
            out.data_ptr(), lse.data_ptr(), q.stride(), k.stride(), v.stride(),
        )  # fmt: skip
        if masks is not None:
            key += (q.shape, k.shape, *((name, tensor.data_ptr()) for name, tensor in masks.named()))
        if buffers is not None or (problem.batch_invariant and self.has_own_room()):
            key = None

        again = None if key is None else kept_launch(key)
        if again is None:
            again = self._first(q, k, v, out, lse, problem, masks, device, stream, buffers, key)
        again.launch()

    def _first(self, q, k, v, out, lse, problem: Problem, masks, device: int, stream: int, buffers, key):
        """A launch that was not made before; kept under its key, where it has one and its tensors are its arguments."""

        def prepare() -> PreparedLaunch:
            rows = [aligned(tensor) for tensor in (q, k, v)]
            again = buffers is None and all(one is other for one, other in zip(rows, (q, k, v), strict=True))
            return self._prepare(*rows, out, lse, problem, masks, device, stream, buffers, again)

        return kept(key, prepare, is_good_again)

    def _prepare(self, q, k, v, out, lse, problem: Problem, masks, device: int, stream: int, buffers, again: bool):
        loaded = self.load(problem, q.device, trace=buffers is not None)
        arguments, ahead, blocks = self.arguments(q, k, v, out, lse, problem, loaded), None, None
        if problem.masks:
            found = self.masked(arguments, q, lse, problem, masks, stream)
            arguments.append(found.packed)
            ahead, blocks = found.ahead, found.blocks
        keys = self.seqlens(q, k, problem)[1]
        sums = self.told_of_room(arguments, problem, loaded, keys, q.device, stream)
        if buffers is not None:
            arguments.append(buffers.packed())
        function = entry_point(loaded, self.entry(problem, device), device)
        if blocks is None:
            blocks = self.blocks(problem, loaded, device)
        return PreparedLaunch(function, loaded, blocks, arguments, stream, again=again, ahead=ahead, keeps=sums)
