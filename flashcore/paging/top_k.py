"""The pages whose key bounds promise the highest scores for the query (Quest, Tang et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.library import paged, traced
from flashcore.numerics import ambient, plain
from flashcore.paging import _selecting
from flashcore.paging.bounds import LARGEST, LEAST
from flashcore.paging.selection import PageSelection, first_query_page, query_pages
from flashcore.paging.tables import PagedKV

NO_BOUNDS = (
    "This cache keeps no key bounds, by which TopK chooses; make it with key_bounds=True, "
    "or pass key_bounds=True to from_tables()."
)


@ambient.shielded
def page_scores(q: torch.Tensor, cache: PagedKV) -> torch.Tensor:
    """An upper bound of ``q . k`` over the keys of each page, float32 ``[batch, num_heads_kv, max_pages]``.

    The largest over the query heads of the group and over the query tokens; -inf for a page without keys. A softmax
    scale above 0 does not change the order of pages; for one below 0 pass ``-q``, as `paged_attention` does.
    """
    if cache.key_bounds is None:
        raise PageTableError(NO_BOUNDS)
    cache = cache.within_table()
    batch, heads_q, tokens, head_dim = q.shape
    bounds = cache.key_bounds[cache.page_table.clamp(0, cache.num_pages - 1).long()].float()
    bounds = bounds.permute(3, 0, 2, 4, 1)  # [least or largest, batch, num_heads_kv, head_dim, max_pages]
    resident = cache.resident_pages()[:, None]
    # A page without keys has infinite bounds, and 0 * inf is NaN.
    bounds = bounds.masked_fill(~resident[..., None, :], 0.0)
    rows = q.float().reshape(batch, cache.num_heads_kv, heads_q // cache.num_heads_kv * tokens, head_dim)
    # sum_d max(q_d * least_d, q_d * largest_d): a positive q_d takes the largest, a negative one the least.
    scores = rows.clamp(min=0) @ bounds[LARGEST] + rows.clamp(max=0) @ bounds[LEAST]
    return scores.amax(dim=2).masked_fill(~resident, -math.inf)


@dataclass(frozen=True)
class TopK:
    """The best pages by their bounds, a fixed number or a share of what each sequence has.

    Always among them, and counted: the first `sink_pages`, and the pages of the queries' own tokens, the last page
    before all (its keys are the newest, and under a causal mask a query may see no other). When these alone are more
    than asked for, these are what is selected. Of pages with the same score the first go before the later.

    On a Hopper GPU one kernel does it, for head_dim 64 or 128, up to 128 query rows a KV head and 32768 pages a
    sequence (kernels/page_selection.cu); it is compiled at its first call outside a graph's capture. It adds up in
    another order, so that pages whose scores differ by rounding alone may change places.
    """

    source: ClassVar[str | None] = None
    """Kernel source in place of the file's own; set by a planted fault."""

    pages: int | None = None
    """Pages for each sequence and KV head."""
    share: float | None = None
    """Or the share of the sequence's pages, rounded up: above 0, at most 1."""
    sink_pages: int = 0

    def __post_init__(self):
        if (self.pages is None) == (self.share is None):
            raise InvalidProblem("TopK takes either pages or share; give one of them.")
        # Launches are kept under these: a tensor among them would be known by what it is, not by what it holds.
        object.__setattr__(self, "share", plain.number("share of TopK", self.share))
        object.__setattr__(self, "sink_pages", plain.integer("sink_pages of TopK", self.sink_pages))
        if self.pages is not None:
            object.__setattr__(self, "pages", plain.integer("pages of TopK", self.pages))
        if self.pages is not None and self.pages < 1:
            raise InvalidProblem(f"TopK(pages={self.pages}): it selects at least 1 page.")
        if self.share is not None and not 0 < self.share <= 1:
            raise InvalidProblem(f"TopK(share={self.share}): a share is above 0 and at most 1.")
        if self.sink_pages < 0:
            raise InvalidProblem(f"TopK(sink_pages={self.sink_pages}): it takes at least 0.")

    def select(self, q: torch.Tensor, cache: PagedKV) -> PageSelection:
        cache.check_query(q)
        width = min(cache.max_pages, max(self._most(cache), self.sink_pages + query_pages(q.shape[2], cache.page_size)))
        if not traced():
            return self._select(q, cache, width)
        if cache.key_bounds is None:
            raise PageTableError(NO_BOUNDS)
        tables = cache.k_pool, cache.v_pool, cache.page_table, cache.lengths, cache.key_bounds
        return PageSelection(*paged.select_top_k(q, *tables, width, self.pages, self.share, self.sink_pages))

    @ambient.shielded
    def _select(self, q: torch.Tensor, cache: PagedKV, width: int) -> PageSelection:
        """`select` of tensors that lie in memory; `width` is the room for the pages of a row."""
        cache = cache.within_table()
        asked = {"most": self.pages, "share": self.share, "sink_pages": self.sink_pages}
        found = _selecting.selected(q, cache, width, **asked, source=self.source)
        return self._select_in_torch(q, cache, width) if found is None else found

    def _select_in_torch(self, q: torch.Tensor, cache: PagedKV, width: int) -> PageSelection:
        """`select` on any device, for any head_dim and strides; `width` is the room for the pages of a row."""
        columns = torch.arange(cache.max_pages, device=cache.device)
        resident = cache.resident_pages()
        must = resident & ((columns < self.sink_pages) | (columns >= first_query_page(cache, q.shape[2])[:, None]))
        available = resident.sum(dim=1)
        asked = available if self.pages is not None else torch.ceil(available.double() * self.share).long()
        if self.pages is not None:
            asked = asked.clamp(max=self.pages)
        counts = torch.maximum(asked, must.sum(dim=1))[:, None]

        scores = page_scores(q, cache)
        # Infinite or NaN keys make a page worth a look: behind those that must be in, before any without keys.
        scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).max).masked_fill(must[:, None], math.inf)
        scores = scores.masked_fill(~resident[:, None], -math.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]
        kept = torch.arange(width, device=cache.device) < counts[..., None]
        pages = torch.where(kept, best, cache.max_pages).sort(dim=-1).values
        pages = pages.masked_fill(pages == cache.max_pages, -1).to(torch.int32)
        return PageSelection(pages, counts.to(torch.int32).expand(-1, cache.num_heads_kv).contiguous())

    def _most(self, cache: PagedKV) -> int:
        """A bound on the pages asked for that needs no look at the lengths."""
        return self.pages if self.pages is not None else math.ceil(cache.max_pages * self.share)


def _compute_op(
    q, k_pool, v_pool, page_table, lengths, key_bounds, width, pages=None, share=None, sink_pages=0
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What computes ``torch.ops.flashcore.select_top_k``."""
    cache = PagedKV.from_tables(k_pool, v_pool, page_table, lengths, key_bounds=key_bounds)
    selection = TopK(pages, share, sink_pages)._select(q, cache, width)
    return selection.pages, selection.counts


paged.computed_by(paged.select_top_k, _compute_op)
