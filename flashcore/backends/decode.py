"""Backend `decode`: the last few tokens of each sequence over K and V in pages."""

from __future__ import annotations

import struct

import torch

from flashcore.backends._chunks import invariant_defines, most_chunks
from flashcore.backends._contract import with_masks
from flashcore.backends._masks import OVER_PAGES, TANH_ERROR, mask_defines
from flashcore.backends._paged import PagedBackend
from flashcore.backends._registry import register
from flashcore.gpu.launching import LoadedKernel, multiprocessors
from flashcore.gpu.rooms import FLOAT_BYTES, Room, room_for
from flashcore.numerics.masking import MaskTensors
from flashcore.paging import PagedKV, PageSelection
from flashcore.problem import Problem

DECODE = struct.Struct("3Q 2i")
"""`DecodeParams` of kernels/attention_decode.cu."""
MOST_TOKENS = 8
"""Query tokens of a sequence; for more there is `hopper-paged`."""
MOST_ROOM = 1 << 28
"""Bytes that parts of a launch in the batch-invariant mode take, where sequences can be shared out over several."""


@register
class Decode(PagedBackend):
    """`kernels/attention_decode.cu`."""

    id = "decode"
    title = "Our decode kernel: paged, split keys"
    kernel = "attention_decode"
    masks = paged_masks = OVER_PAGES
    tanh_error = TANH_ERROR
    selects = True
    batch_invariant = True
    most_heads = 6144
    """K/V heads of all sequences in one launch, each with its tiles of query rows: the kernel lays them out on chip."""
    blocks_a_multiprocessor = 1
    besides_o = 2
    """Floats that a part has of a row besides O: its reference and its sum."""

    def defines(self, problem: Problem, device: int) -> tuple[tuple[str, int], ...]:
        return (*mask_defines(problem), *invariant_defines(problem))

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is None and problem.seqlen_q > MOST_TOKENS:
            return f"it takes up to {MOST_TOKENS} query tokens (got {problem.seqlen_q})"
        return reason

    def suits(self, problem: Problem) -> Problem:
        return problem.with_(seqlen_q=min(problem.seqlen_q, MOST_TOKENS))

    def run_paged(
        self, q, cache: PagedKV, problem: Problem, selection: PageSelection | None = None,
        masks: MaskTensors | None = None,
    ):  # fmt: skip
        cache = rows_apart(cache)
        at_once = max(1, self.most_heads // (problem.num_heads_kv * self.tiling(problem)[1]))
        if problem.batch_invariant:
            at_once = max(1, min(at_once, MOST_ROOM // self.room_of_one(problem, cache)))
        if problem.batch <= at_once:
            return super().run_paged(q, cache, problem, selection, **with_masks(masks))
        parts, cache = [], cache.within_table()
        num_launches = -(-problem.batch // at_once)
        at_once = -(-problem.batch // num_launches)  # all alike: one of few sequences would leave blocks idle
        for first in range(0, problem.batch, at_once):
            rows = slice(first, min(first + at_once, problem.batch))
            table, lengths = cache.page_table[rows], cache.lengths[rows]
            part = PagedKV(cache.k_pool, cache.v_pool, table, lengths, lengths_fit=True, holes=cache.holes)
            chosen = selection and PageSelection(selection.pages[rows], selection.counts[rows])
            fewer = problem.with_(batch=rows.stop - rows.start)
            parts.append(super().run_paged(q[rows], part, fewer, chosen, **with_masks(masks)))
        out, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return out, lse

    def room_of_one(self, problem: Problem, cache: PagedKV) -> int:
        """Bytes of the parts that one sequence may have, whatever its length, in the batch-invariant mode."""
        heads_a_tile, tiles = self.tiling(problem)
        rows = problem.num_heads_kv * tiles * heads_a_tile * problem.seqlen_q
        return rows * most_chunks(table_keys(cache)) * self.row_bytes(problem)

    def tiling(self, problem: Problem) -> tuple[int, int]:
        """Query heads of a tile of 64 rows, and tiles that the heads of a group take."""
        group = problem.num_heads_q // problem.num_heads_kv
        heads = min(group, 64 // problem.seqlen_q)
        return heads, -(-group // heads)

    def traced_rows(self, loaded: LoadedKernel) -> int:
        return 1

    def traced_parts(self, problem: Problem, unit_keys: int) -> int:
        """Blocks that share a head in a traced call: at least two, and as many that its units come out even."""
        units = -(-problem.seqlen_k // unit_keys) - units_before(problem, unit_keys)
        return next(parts for parts in range(min(2, units), units + 1) if units % parts == 0)

    def chains(self, problem: Problem, loaded: LoadedKernel) -> tuple[int, ...]:
        if problem.batch_invariant:
            return super().chains(problem, loaded)
        units, before = -(-problem.seqlen_k // loaded.tile_n), units_before(problem, loaded.tile_n)
        share = (units - before) // self.traced_parts(problem, loaded.tile_n)
        consumers = loaded.num_splits

        def continues(unit: int) -> bool:
            return unit >= before and (unit - before) % share >= consumers

        return tuple(unit - consumers if continues(unit) else -1 for unit in range(units))

    def takes_room(self, problem: Problem) -> bool:
        return True

    def paged_arguments(self, q, cache: PagedKV, problem: Problem, selection, out, lse, loaded, stream, traced):
        heads_a_tile, tiles = self.tiling(problem)
        heads = problem.batch * problem.num_heads_kv * tiles
        rows = heads_a_tile * problem.seqlen_q
        blocks = self.blocks_a_multiprocessor * multiprocessors(q.device.index or 0)
        if problem.batch_invariant:
            parts = heads * most_chunks(table_keys(cache))
        else:
            # A traced call gives each head blocks of its own: its chains of units have to be the same for all heads.
            blocks = heads * self.traced_parts(problem, loaded.tile_n) if traced else blocks
            parts = heads + blocks  # a part is numbered by its head and its block, one added to the other
        rows_of_parts = parts * rows
        room = room_for(
            rows_of_parts * self.row_bytes(problem), q.device, stream, counters=heads, own=self.source is not None
        )
        arguments = [
            self.params(q, cache.k_pool, cache.v_pool, out, lse, problem),
            self.pool_map("k", cache.k_pool, loaded.tile_n, problem.dtype, promote=False),
            self.pool_map("v", cache.v_pool, loaded.tile_n, problem.dtype, promote=False),
            self.paged_params(cache, selection),
            self.decode_params(room, rows_of_parts, problem, heads_a_tile, tiles),
        ]
        return arguments, blocks, room

    def row_bytes(self, problem: Problem) -> int:
        """What a part has of a row, all in float32."""
        return (problem.head_dim + self.besides_o) * FLOAT_BYTES

    def decode_params(self, room: Room, rows_of_parts: int, problem: Problem, heads_a_tile: int, tiles: int) -> bytes:
        """`DecodeParams`, packed."""
        softmax = room.address + rows_of_parts * problem.head_dim * FLOAT_BYTES
        return DECODE.pack(room.address, softmax, room.counters, heads_a_tile, tiles)


def rows_apart(cache: PagedKV) -> PagedKV:
    """The same pages, by a table whose rows do not overlap: the kernel takes the step to the next one for their length.

    A table that was expanded to a batch has steps of 0, and one that was transposed may have steps of 1.
    """
    table = cache.page_table
    if table.stride(0) >= cache.max_pages:
        return cache
    copied = table.clone(memory_format=torch.contiguous_format)
    return PagedKV(cache.k_pool, cache.v_pool, copied, cache.lengths, lengths_fit=cache.lengths_fit)


def table_keys(cache: PagedKV) -> int:
    """Keys of the longest sequence that the page table has room for."""
    return cache.page_table.stride(0) * cache.page_size


def units_before(problem: Problem, unit_keys: int) -> int:
    """Units of a sequence of `seqlen_k` keys that lie before the windows of all its queries: they are never read."""
    if problem.window_left < 0:
        return 0
    return max(0, problem.seqlen_k - problem.seqlen_q - problem.window_left) // unit_keys
