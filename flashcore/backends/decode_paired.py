"""Backend `decode-paired`: decoding by two blocks a multiprocessor."""

from __future__ import annotations

import functools
import struct

import torch

from flashcore.backends._masks import mask_defines
from flashcore.backends._registry import register
from flashcore.backends.decode import Decode
from flashcore.gpu.launching import capture_id, multiprocessors
from flashcore.paging import PagedKV
from flashcore.problem import Problem

DECODE = struct.Struct("2Q 2i")
"""`DecodeParams` of kernels/attention_decode_paired.cu."""
BLOCKS_A_MULTIPROCESSOR = 2
NOT_OF_A_ROW = 4
"""Floats of a row of a part besides its outputs: reference, row sum, and two that nothing uses (`PartRow`)."""


@functools.lru_cache(maxsize=64)
def _room(
    parts: int, rows: int, head_dim: int, heads: int, device: torch.device, stream: int, capture: int,
    source: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Rows of parts, and a counter a head; used again by every call on one stream, and a captured graph has its own."""
    floats = parts * rows * (head_dim + NOT_OF_A_ROW)
    return torch.empty(floats, device=device), torch.zeros(heads, dtype=torch.int32, device=device)


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

    def paged_arguments(self, q, cache: PagedKV, problem: Problem, selection, out, lse, loaded, stream, traced):
        heads_a_tile, tiles = self.tiling(problem)
        heads, rows = problem.batch * problem.num_heads_kv * tiles, heads_a_tile * problem.seqlen_q
        blocks = BLOCKS_A_MULTIPROCESSOR * multiprocessors(q.device.index or 0)
        # A traced call gives each head blocks of its own: its chains of units have to be the same for all heads.
        blocks = heads * self.traced_parts(problem, loaded.tile_n) if traced else blocks
        parts = heads + blocks  # a part is numbered by its head and its block, one added to the other
        room = _room(parts, rows, problem.head_dim, heads, q.device, stream, capture_id(stream), self.source)
        arguments = [
            self.params(q, cache.k_pool, cache.v_pool, out, lse, problem),
            self.pool_map("k", cache.k_pool, loaded.tile_n, problem.dtype, promote=False),
            self.pool_map("v", cache.v_pool, loaded.tile_n, problem.dtype, promote=False),
            self.paged_params(cache, selection),
            DECODE.pack(*(tensor.data_ptr() for tensor in room), heads_a_tile, tiles),
        ]
        return arguments, blocks, room
