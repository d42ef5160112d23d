"""The chunks of keys that batch-invariant kernels add up, as `kernels/include/chunks.cuh` cuts them."""

from __future__ import annotations

from flashcore.gpu.options import INVARIANT
from flashcore.problem import Problem

LAW_TILE = 64
"""Keys that a row takes at once."""
CHUNK_TILES = 32
"""Tiles of a chunk."""


def chunk_of(tile: int) -> int:
    """The number of the chunk that a tile of keys lies in."""
    return tile // CHUNK_TILES


def most_chunks(keys: int) -> int:
    """Chunks of a sequence of so many keys; 1 where there are none."""
    return chunk_of(max(0, keys - 1) // LAW_TILE) + 1


def chains(keys: int) -> tuple[int, ...]:
    """Which tile each one continues; -1 where a chunk begins."""
    tiles = -(-keys // LAW_TILE)
    return tuple(tile - 1 if tile % CHUNK_TILES else -1 for tile in range(tiles))


def invariant_defines(problem: Problem) -> tuple[tuple[str, int], ...]:
    """The macro that compiles the mode in, where the problem asks for it."""
    return ((INVARIANT, 1),) if problem.batch_invariant else ()
