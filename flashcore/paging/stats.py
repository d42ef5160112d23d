"""The memory that a cache's pages need, and that the same tokens would need in dense caches: counted in its books."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashcore.paging.ledger import DROPPED, PageLedger

if TYPE_CHECKING:
    from flashcore.paging.tables import PagedKV


@dataclass(frozen=True)
class CacheStats:
    """One layer's cache at one moment. Bytes count K and V."""

    page_size: int
    sequences: int
    """Sequences alive."""
    longest: int
    """Tokens of the longest of them."""
    tokens: int
    """Sum of the sequences' lengths: a shared token counts once for each sequence, a dropped one counts too."""
    tokens_resident: int
    """Tokens that lie in pages: a shared one counts once, a dropped one does not."""
    pages_total: int
    pages_used: int
    """Pages that at least one sequence holds."""
    pages_shared: int
    """Pages that more than one sequence holds."""
    bytes_per_token: int
    """Of K and V in all KV heads."""
    overhead_bytes: int
    """What paging adds beside the pages: page table, lengths, and key bounds where kept."""

    @property
    def fragmentation(self) -> float:
        """Share of the used pages' slots that hold no token: partial last pages, and pages reserved ahead."""
        slots = self.pages_used * self.page_size
        return 1 - self.tokens_resident / slots if slots else 0.0

    @property
    def resident_bytes(self) -> int:
        """Pages in use, whole."""
        return self.pages_used * self.page_size * self.bytes_per_token

    @property
    def pool_bytes(self) -> int:
        """All pages, used or free: what the pools were allocated with."""
        return self.pages_total * self.page_size * self.bytes_per_token

    @property
    def dense_bytes(self) -> int:
        """The dense equivalent: each sequence its own K and V, exactly as long as it is."""
        return self.tokens * self.bytes_per_token

    @property
    def padded_bytes(self) -> int:
        """The padded equivalent: one tensor ``[sequences, heads, longest, head_dim]`` for K and one for V."""
        return self.sequences * self.longest * self.bytes_per_token

    @property
    def saved_of_dense(self) -> float:
        """Share of the dense equivalent that paging saves; negative where it costs."""
        return 1 - self.resident_bytes / self.dense_bytes if self.dense_bytes else 0.0

    @property
    def saved_of_padded(self) -> float:
        """Share of the padded equivalent that paging saves; negative where it costs."""
        return 1 - self.resident_bytes / self.padded_bytes if self.padded_bytes else 0.0


def stats_of(cache: PagedKV, ledger: PageLedger) -> CacheStats:
    """Count the books; sizes of elements come from the cache's tensors."""
    rows = [row for row in ledger.rows if row is not None]
    filled = np.zeros(ledger.num_pages, dtype=np.int64)  # of a page's users, the longest decides what it holds
    for row in rows:
        pages = np.array(row.pages, dtype=np.int64)
        held = np.clip(row.length - np.arange(len(pages)) * ledger.page_size, 0, ledger.page_size)
        here = pages != DROPPED
        filled[pages[here]] = np.maximum(filled[pages[here]], held[here])
    references = np.array(ledger.references)
    beside = [cache.page_table, cache.lengths] + ([] if cache.key_bounds is None else [cache.key_bounds])
    return CacheStats(
        page_size=ledger.page_size,
        sequences=len(rows),
        longest=max((row.length for row in rows), default=0),
        tokens=sum(row.length for row in rows),
        tokens_resident=int(filled.sum()),
        pages_total=ledger.num_pages,
        pages_used=int((references > 0).sum()),
        pages_shared=int((references > 1).sum()),
        bytes_per_token=2 * cache.num_heads_kv * cache.head_dim * cache.k_pool.element_size(),
        overhead_bytes=sum(tensor.numel() * tensor.element_size() for tensor in beside),
    )
