"""Backend `hopper`: tensor copies and warpgroup products (TMA and wgmma)."""

from __future__ import annotations

import struct

import torch

from flashcore.backends._chunks import LAW_TILE, invariant_defines, most_chunks
from flashcore.backends._cuda import CudaBackend, Masked
from flashcore.backends._dealing import WARP_ROWS, sections
from flashcore.backends._masks import TANH_ERROR, mask_defines, mask_params
from flashcore.backends._registry import register
from flashcore.backends._tensor_maps import tensor_map
from flashcore.gpu.launching import (
    LoadedKernel,
    PreparedLaunch,
    behind,
    entry_point,
    load_kernel,
    multiprocessors,
)
from flashcore.gpu.rooms import FLOAT_BYTES, Room, room_for
from flashcore.numerics.masking import MaskTensors
from flashcore.problem import Problem

SPLIT = "attention_hopper_split"
"""Entry function in which the warpgroups of a block split the keys of a tile."""
SPLIT_ROWS = 64
"""Query rows of its tiles."""
SMALL_ROWS = 128
"""Query rows of the tiles of two warpgroups."""
PLAN = "attention_hopper_plan"
"""Entry function that lists the tiles of sequences with lengths, and clears the rows that belong to none."""
TILE_INTS = 2
"""Ints of a `ListedTile`."""
MOST_HEADS, MOST_TILES = 1 << 12, 1 << 20
"""Heads, and tiles of one sequence, that a `ListedTile` can name."""
CLEARING_BLOCKS = 64
"""Blocks of `PLAN` that clear padding, which may be most of a tensor."""
PLANNED_AT_ONCE = 256
"""Tiles that a block of `PLAN` lists."""


@register
class Hopper(CudaBackend):
    """`kernels/attention_hopper.cu`."""

    id = "hopper"
    title = "Our Hopper kernel: TMA, wgmma"
    kernel = "attention_hopper"
    masks = ("window", "softcap", "sink", "lengths", "ragged")
    tanh_error = TANH_ERROR
    batch_invariant = True

    def defines(self, problem: Problem, device: int) -> tuple[tuple[str, int], ...]:
        """The tile: the kernel's own (head_dim 64: 4 warpgroups, pages of 64 keys; 128: 3, 64), or a smaller one.

        While tiles of 128 rows all fit on the GPU at once, larger ones would leave part of it idle: 14.8 µs against
        19.3 at B=1, H=16, S=1024, D=64.
        """
        options = (*mask_defines(problem), *invariant_defines(problem))
        if -(-problem.seqlen_q // SMALL_ROWS) * problem.num_heads_q * problem.batch <= multiprocessors(device):
            tile_n = LAW_TILE if problem.batch_invariant else problem.head_dim
            return (("FLASHCORE_NUM_CONSUMERS", 2), ("FLASHCORE_TILE_N", tile_n), *options)
        return options

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is None and problem.lengths:
            most_rows = MOST_TILES * SMALL_ROWS
            if problem.num_heads_q > MOST_HEADS:
                return f"with lengths it takes at most {MOST_HEADS} query heads"
            if problem.seqlen_q > most_rows:
                return f"with lengths it takes at most {most_rows} query rows a sequence"
        return reason

    def entry(self, problem: Problem, device: int) -> str:
        """The keys are split while the small tiles of that all fit on the GPU at once: none waits for another then.

        That kernel has no other mask than the causal one, and adds in another order.
        """
        if problem.masks or problem.batch_invariant:
            return self.kernel
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

    def seqlens(self, q, k, problem: Problem) -> tuple[int, int]:
        return (q.shape[2], k.shape[2]) if problem.lengths == "ragged" else super().seqlens(q, k, problem)

    def room(self, q, problem: Problem) -> int:
        if not problem.lengths:
            return 0
        return most_tiles(q, problem, SMALL_ROWS) * TILE_INTS + 2  # whatever the tile: there are no smaller ones

    def masked(self, arguments, q, lse, problem: Problem, masks: MaskTensors | None, stream: int) -> Masked:
        if not problem.lengths:
            return Masked(mask_params(problem, masks, self.scale(problem)))
        device = q.device.index or 0
        defines = self.defines(problem, device)
        plan = load_kernel(self.kernel, problem.head_dim, problem.dtype, False, self.source, device, defines, PLAN)
        tiles = most_tiles(q, problem, plan.tile_m)
        tiles_at = behind(lse)
        given = (masks.cu_seqlens_q, masks.cu_seqlens_k, masks.seqlens_q, masks.seqlens_k)
        lengths = [0 if tensor is None else tensor.data_ptr() for tensor in given]
        packed = mask_params(
            problem, masks, self.scale(problem), (*lengths, tiles_at, tiles_at + 4 * TILE_INTS * tiles),
            (problem.batch, tiles, int(problem.lengths == "left")),
        )  # fmt: skip
        blocks = (max(-(-tiles // PLANNED_AT_ONCE), CLEARING_BLOCKS if problem.lengths != "ragged" else 1), 1, 1)
        ahead = PreparedLaunch(entry_point(plan, PLAN, device), plan, blocks, [arguments[0], packed], stream)
        return Masked(packed, ahead, (min(tiles, multiprocessors(device)), 1, 1))

    def room_for_sums(
        self, problem: Problem, loaded: LoadedKernel, keys: int, device: torch.device, stream: int
    ) -> Room:
        """Room for O of the rows of every block; none for keys of one chunk, which a block never leaves.

        A planted bug may cut chunks elsewhere.
        """
        planted = self.source is not None
        if most_chunks(keys) == 1 and not planted:
            return Room(0, 0)
        rows = multiprocessors(device.index or 0) * loaded.tile_m
        return room_for(rows * problem.head_dim * FLOAT_BYTES, device, stream, own=planted)

    def sections(self, problem: Problem, loaded: LoadedKernel, device: int) -> int:
        """Parts of the deal, each of which runs from heavy tiles to light ones; in a window all are alike."""
        if problem.masks and problem.window_left >= 0:
            return 0
        return sections(problem, loaded.tile_m, loaded.tile_n, self.blocks(problem, loaded, device)[0])


def most_tiles(q, problem: Problem, tile_m: int) -> int:
    """Tiles of `tile_m` rows, of all heads, that there can be at most, for a host that does not know the lengths."""
    if problem.lengths == "ragged":
        return (q.shape[2] // tile_m + problem.batch) * problem.num_heads_q
    return problem.batch * -(-problem.seqlen_q // tile_m) * problem.num_heads_q


@register
class HopperUnsplit(Hopper):
    """The same without split keys, whatever the problem: what long problems run, open to the checks on short ones."""

    id = "hopper-unsplit"
    title = "Our Hopper kernel, keys never split"
    swept = False

    def defines(self, problem: Problem, device: int) -> tuple[tuple[str, int], ...]:
        return (*mask_defines(problem), *invariant_defines(problem))

    def entry(self, problem: Problem, device: int) -> str:
        return self.kernel
