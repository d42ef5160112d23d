"""Backend `hopper`: tensor copies and warpgroup products (TMA and wgmma)."""

from __future__ import annotations

import struct

import torch

from flashcore.backends._cuda import CudaBackend
from flashcore.backends._dealing import WARP_ROWS, sections
from flashcore.backends._registry import register
from flashcore.backends._tensor_maps import tensor_map
from flashcore.gpu.launching import LoadedKernel, multiprocessors
from flashcore.problem import Problem

SPLIT = "attention_hopper_split"
"""Entry function in which the warpgroups of a block split the keys of a tile."""
SPLIT_ROWS = 64
"""Query rows of its tiles."""
SMALL_ROWS = 128
"""Query rows of the tiles of two warpgroups."""


@register
class Hopper(CudaBackend):
    """`kernels/attention_hopper.cu`."""

    id = "hopper"
    title = "Our Hopper kernel: TMA, wgmma"
    kernel = "attention_hopper"

    def defines(self, problem: Problem, device: int) -> tuple[tuple[str, int], ...]:
        """The tile: the kernel's own (head_dim 64: 4 warpgroups, pages of 64 keys; 128: 3, 64), or a smaller one.

        While tiles of 128 rows all fit on the GPU at once, larger ones would leave part of it idle: 14.8 µs against
        19.3 at B=1, H=16, S=1024, D=64.
        """
        if -(-problem.seqlen_q // SMALL_ROWS) * problem.num_heads_q * problem.batch <= multiprocessors(device):
            return (("FLASHCORE_NUM_CONSUMERS", 2), ("FLASHCORE_TILE_N", problem.head_dim))
        return ()

    def entry(self, problem: Problem, device: int) -> str:
        """The keys are split while the small tiles of that all fit on the GPU at once: none waits for another then."""
        tiles = -(-problem.seqlen_q // SPLIT_ROWS) * problem.num_heads_q * problem.batch
        return SPLIT if tiles <= multiprocessors(device) else self.kernel

    def arguments(self, q, k, v, out, lse, problem: Problem, loaded: LoadedKernel) -> list[bytes]:
        arguments = [
            self.params(q, k, v, out, lse, problem),
            self.row_map("q", q, loaded.tile_m, problem.dtype),
            self.row_map("k", k, loaded.tile_n, problem.dtype),
            self.row_map("v", v, loaded.tile_n, problem.dtype),
        ]
        if loaded.num_splits == 1:
            arguments.append(self.row_map("out", out, WARP_ROWS, problem.dtype))
            arguments.append(struct.pack("i", self.sections(problem, loaded, q.device.index or 0)))
        return arguments

    def row_map(self, name: str, tensor: torch.Tensor, rows: int, dtype: str) -> bytes:
        """A tensor map over tensor `name` (q, k, v or out), for boxes of so many rows of one head."""
        strides = self.strides(name, tensor)
        return tensor_map(tensor.data_ptr(), tensor.shape, strides, rows=rows, dtype=dtype, name=name)

    def blocks(self, problem: Problem, loaded: LoadedKernel, device: int) -> tuple[int, int, int]:
        """One block a multiprocessor, which takes one tile after the other; with split keys one block a tile."""
        tiles = -(-problem.seqlen_q // loaded.tile_m)
        if loaded.num_splits > 1:
            return tiles, problem.num_heads_q, problem.batch
        return min(tiles * problem.num_heads_q * problem.batch, multiprocessors(device)), 1, 1

    def sections(self, problem: Problem, loaded: LoadedKernel, device: int) -> int:
        """Parts of the deal, each of which runs from heavy tiles to light ones."""
        return sections(problem, loaded.tile_m, loaded.tile_n, self.blocks(problem, loaded, device)[0])


@register
class HopperUnsplit(Hopper):
    """The same without split keys, whatever the problem: what long problems run, open to the checks on short ones."""

    id = "hopper-unsplit"
    title = "Our Hopper kernel, keys never split"
    swept = False

    def defines(self, problem: Problem, device: int) -> tuple[tuple[str, int], ...]:
        return ()

    def entry(self, problem: Problem, device: int) -> str:
        return self.kernel
