"""Three batches whose memory tells what paging saves and what it costs, each counted in the books of a real cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flashcore.paging.cache import PagedKVCache
from flashcore.paging.stats import CacheStats


@dataclass(frozen=True)
class KVShape:
    """Of one layer's K and V."""

    num_heads_kv: int = 8
    head_dim: int = 128
    page_size: int = 128
    dtype: torch.dtype = torch.float16


@dataclass(frozen=True)
class MemoryCase:
    """One batch of sequences, in words and as its cache counted it."""

    name: str
    words: str
    stats: CacheStats

    @property
    def saved(self) -> float:
        """Share of memory saved against what the case is about: the padded tensor where lengths differ, else dense."""
        return self.stats.saved_of_padded if self.name == "mixed_lengths" else self.stats.saved_of_dense


def fill(lengths: Sequence[int], *, prefix: int = 0, shape: KVShape, device) -> PagedKVCache:
    """A cache with one sequence a length, all of which begin with the same `prefix` tokens.

    The prompts are appended as a server would: the prefix once, a fork a sequence, then each one's own tokens. On
    ``meta`` no key is stored and the books are the same. The pool has as many pages as that takes and none to spare,
    so that what it saves is saved.
    """
    whole = prefix // shape.page_size
    cache = PagedKVCache(
        num_pages=whole + sum(-(-length // shape.page_size) - whole for length in lengths),
        batch=len(lengths), max_pages=-(-max(lengths) // shape.page_size), page_size=shape.page_size,
        num_heads_kv=shape.num_heads_kv, head_dim=shape.head_dim, dtype=shape.dtype, device=device,
    )  # fmt: skip

    def tokens(count: int) -> torch.Tensor:
        return torch.zeros(1, shape.num_heads_kv, count, shape.head_dim, dtype=shape.dtype, device=device)

    first = cache.add()
    if prefix:
        cache.append(tokens(prefix), tokens(prefix), [first])
    sequences = [first, *(cache.fork(first) for _ in lengths[1:])]
    for sequence, length in zip(sequences, lengths, strict=True):
        if length > prefix:
            own = tokens(length - prefix)
            cache.append(own, own, [sequence])
    return cache


def shared_prefix(shape: KVShape, device="meta", *, sequences: int = 16, length: int = 8192, prefix: int = 6144):
    """Case (a): as many sequences with one system prompt."""
    stats = fill([length] * sequences, prefix=prefix, shape=shape, device=device).stats()
    words = f"{sequences} sequences of {length} tokens that share their first {prefix}, against a dense cache each"
    return MemoryCase("shared_prefix", words, stats)


def mixed_lengths(
    shape: KVShape, device="meta", *, sequences: int = 64, shortest: int = 200, longest: int = 8192, seed: int = 0
):
    """Case (b): a batch of mixed lengths, uniform between the two ends and with one sequence at each of them."""
    drawn = np.random.default_rng(seed).integers(shortest, longest + 1, size=sequences - 2).tolist()
    stats = fill([shortest, longest, *drawn], shape=shape, device=device).stats()
    words = (
        f"{sequences} sequences of {shortest} to {longest} tokens (seed {seed}), against a tensor padded to the longest"
    )
    return MemoryCase("mixed_lengths", words, stats)


def no_sharing(shape: KVShape, device="meta", *, sequences: int = 16, length: int = 8000):
    """Case (c): what paging costs where it saves nothing; `length` ends inside a page."""
    stats = fill([length] * sequences, shape=shape, device=device).stats()
    words = f"{sequences} sequences of {length} tokens that share nothing, against a dense cache each"
    return MemoryCase("no_sharing", words, stats)


MEMORY_CASES: dict[str, Callable[..., MemoryCase]] = {
    case.__name__: case for case in (shared_prefix, mixed_lengths, no_sharing)
}
"""By name; each takes a `KVShape` and a device, and its own sizes by keyword."""


def memory_cases(shape: KVShape | None = None, device: str | torch.device = "meta") -> list[MemoryCase]:
    """All three, for one layer of a model; on ``meta`` no memory is allocated."""
    return [case(shape or KVShape(), device) for case in MEMORY_CASES.values()]
