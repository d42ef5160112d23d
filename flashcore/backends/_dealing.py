"""How the Hopper kernel's tiles are divided into sections, so that every block gets much the same work."""

from __future__ import annotations

import functools

import numpy as np

from flashcore.problem import Problem

WARP_ROWS = 16
"""Query rows of a warp, which stores them by itself; causal tiles end at a multiple of it."""
LAST_SECTION = 10
"""Rounds that the last section may have; the others have two."""
AS_EVEN = 0.005
"""Deals whose largest load differs by less than this share are as good as each other."""


@functools.lru_cache(maxsize=1024)
def sections(problem: Problem, tile_m: int, tile_n: int, blocks: int) -> int:
    """Sections of the deal: none (head by head), or as many as possible, where that makes it about as even as it gets.

    Head by head all tiles of a head are under way together, which asks least of memory: with 512 keys and head_dim 128,
    sections take 15 % longer. Many sections, too, leave few heads under way, so that L2 holds their K and V: at 16384
    keys that saves 5 of 6 GB read, and the power for it. But the last round of a short section may be few tiles, and
    all of them heavy.
    """
    if not problem.causal:
        return 0
    heads = problem.batch * problem.num_heads_q
    pages = tile_pages(problem, tile_m, tile_n)
    rounds = -(-len(pages) * heads // blocks)
    most, fewest = -(-rounds // 2), max(1, -(-(rounds - LAST_SECTION) // 2) + 1)
    largest = {number: largest_load(pages, heads, blocks, number) for number in (0, *range(most, fewest - 1, -1))}
    return next(number for number, load in largest.items() if load <= min(largest.values()) * (1 + AS_EVEN))


def tile_pages(problem: Problem, tile_m: int, tile_n: int) -> np.ndarray:
    """Pages that each of a head's tiles sees, from heavy to light: `[tiles]`."""
    before = np.arange(-(-problem.seqlen_q // tile_m))
    if not problem.causal:
        return np.full(before.shape, -(-problem.seqlen_k // tile_n))
    last_row = np.minimum(problem.seqlen_q, -(-problem.seqlen_q // WARP_ROWS) * WARP_ROWS - before * tile_m) - 1
    seen = np.clip(last_row + 1 + problem.seqlen_k - problem.seqlen_q, 0, problem.seqlen_k)
    return -(-seen // tile_n)


def largest_load(pages: np.ndarray, heads: int, blocks: int, sections: int) -> float:
    """Pages of the block that gets most, and one more for each of its tiles; `deal` of attention_hopper.cu."""
    loads = np.tile(pages + 1, heads)
    if sections > 0:
        of_last = (sections - 1) * 2 * blocks
        pairs_of_rounds = np.sort(loads[:of_last].reshape(-1, 2 * blocks))[:, ::-1]
        loads = np.concatenate([pairs_of_rounds.ravel(), np.sort(loads[of_last:])[::-1]])
    rounds = np.pad(loads, (0, -len(loads) % blocks)).reshape(-1, blocks)
    return float((rounds[::2].sum(axis=0) + rounds[1::2, ::-1].sum(axis=0)).max())
