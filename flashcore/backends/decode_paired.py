"""Backend `decode-paired`: decoding by two blocks a multiprocessor."""

from __future__ import annotations

import struct

import torch

from flashcore.backends._masks import mask_defines
from flashcore.backends._registry import register
from flashcore.backends.decode import FLOAT_BYTES, Decode
from flashcore.gpu.launching import device_name, multiprocessors
from flashcore.gpu.rooms import room_for
from flashcore.paging import PagedKV
from flashcore.problem import Problem

DECODE = struct.Struct("2Q 2i")
"""`DecodeParams` of kernels/attention_decode_paired.cu."""
BLOCKS_A_MULTIPROCESSOR = 2
NOT_OF_A_ROW = 4
"""Floats of a row of a part besides its outputs: reference, row sum, and two that nothing uses (`PartRow`)."""


@register
class DecodePaired(Decode):
    """`kernels/attention_decode_paired.cu`."""

    id = "decode-paired"
    title = "Our decode kernel by pairs: paged, two blocks a multiprocessor"
    kernel = "attention_decode_paired"
    variant_of = "decode"
    batch_invariant = False
    most_heads = 3072

    def defines(self, problem: Problem, device: int) -> tuple[tuple[str, int], ...]:
        return mask_defines(problem)

    def pays(self, problem: Problem) -> bool:
        if problem.softcap is not None and problem.head_dim == 128:
            return False  # one warp of a block works out all of its scores, and caps take it longer than the copies
        return torch.cuda.is_available() and "H200" in device_name(torch.cuda.current_device())

    def paged_arguments(self, q, cache: PagedKV, problem: Problem, selection, out, lse, loaded, stream, traced):
        heads_a_tile, tiles = self.tiling(problem)
        heads, rows = problem.batch * problem.num_heads_kv * tiles, heads_a_tile * problem.seqlen_q
        blocks = BLOCKS_A_MULTIPROCESSOR * multiprocessors(q.device.index or 0)
        # A traced call gives each head blocks of its own: its chains of units have to be the same for all heads.
        blocks = heads * self.traced_parts(problem, loaded.tile_n) if traced else blocks
        parts = heads + blocks  # a part is numbered by its head and its block, one added to the other
        row_bytes = (problem.head_dim + NOT_OF_A_ROW) * FLOAT_BYTES
        room = room_for(parts * rows * row_bytes, q.device, stream, counters=heads, own=self.source is not None)
        arguments = [
            self.params(q, cache.k_pool, cache.v_pool, out, lse, problem),
            self.pool_map("k", cache.k_pool, loaded.tile_n, problem.dtype, promote=False),
            self.pool_map("v", cache.v_pool, loaded.tile_n, problem.dtype, promote=False),
            self.paged_params(cache, selection),
            DECODE.pack(room.address, room.counters, heads_a_tile, tiles),
        ]
        return arguments, blocks, room
