"""How many heads' tiles the Hopper kernel deals out together, so that every block gets much the same work."""

from __future__ import annotations

import functools
import math

import numpy as np

from flashcore.problem import Problem

SECTIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Heads of a section that are tried, beside what fills whole rounds."""
AS_EVEN = 0.005
"""Sections whose largest load differs by less than this share are as good as each other."""


@functools.lru_cache(maxsize=1024)
def heads_per_section(problem: Problem, tile_m: int, tile_n: int, blocks: int) -> int:
    """Heads whose tiles are dealt out together: as few as make the deal about as even as it gets, for L2.

    Without a causal mask all tiles are alike, and any number is as even as another.
    """
    if not problem.causal:
        return 1
    heads = problem.batch * problem.num_heads_q
    pages = tile_pages(problem, tile_m, tile_n)
    # So many that forth and back come out even: what a block gets of the heavy tiles it lacks of the light ones.
    whole_rounds = 2 * blocks // math.gcd(2 * blocks, len(pages))
    sections = sorted({section for section in (*SECTIONS, whole_rounds) if section <= min(heads, SECTIONS[-1])})
    largest = {section: largest_load(pages, heads, blocks, section) for section in sections}
    return next(s for s, load in largest.items() if load <= min(largest.values()) * (1 + AS_EVEN))


def tile_pages(problem: Problem, tile_m: int, tile_n: int) -> np.ndarray:
    """Pages that each of a head's tiles sees, in the order in which they are dealt: `[tiles]`."""
    before = np.arange(-(-problem.seqlen_q // tile_m))
    if not problem.causal:
        return np.full(before.shape, -(-problem.seqlen_k // tile_n))
    last_row = problem.seqlen_q - 1 - before * tile_m
    seen = np.clip(last_row + 1 + problem.seqlen_k - problem.seqlen_q, 0, problem.seqlen_k)
    return -(-seen // tile_n)


def largest_load(pages: np.ndarray, heads: int, blocks: int, section: int) -> float:
    """Pages of the block that gets most, and one more for each of its tiles; `deal` of attention_hopper.cu."""
    tiles = len(pages)
    dealt = np.arange(tiles * heads)
    step, place = np.divmod(dealt, blocks)
    block = np.where(step % 2 == 0, place, blocks - 1 - place)
    first_head = dealt // (section * tiles) * section
    before = (dealt - first_head * tiles) // np.minimum(section, heads - first_head)
    return float(np.bincount(block, pages[before] + 1, blocks).max())
