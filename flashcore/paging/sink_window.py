"""The first pages and the last ones, whatever lies in them (StreamingLLM, Xiao et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.errors import InvalidProblem
from flashcore.library import paged, traced
from flashcore.numerics import ambient, plain
from flashcore.paging import _window
from flashcore.paging.selection import PageSelection, first_query_page, query_pages
from flashcore.paging.tables import PagedKV


@dataclass(frozen=True)
class SinkWindow:
    """The first pages and the last ones, the same for all heads.

    The window counts back from the page of the first query, so that each query sees at least that many pages.

    On a Hopper GPU one kernel does it, for any head_dim (`page_window` of kernels/page_selection.cu); it is compiled at
    its first call outside a graph's capture.
    """

    sink_pages: int = 1
    window_pages: int = 8

    def __post_init__(self):
        for name in ("sink_pages", "window_pages"):
            object.__setattr__(self, name, plain.integer(f"{name} of SinkWindow", getattr(self, name)))
        if self.sink_pages < 0 or self.window_pages < 1:
            raise InvalidProblem(
                f"SinkWindow has {self.sink_pages} sink and {self.window_pages} window pages; it takes at least 0 and "
                "1, the last page being the one that the newest token is in."
            )

    def select(self, q: torch.Tensor, cache: PagedKV) -> PageSelection:
        cache.check_query(q)
        most = self.sink_pages + self.window_pages - 1 + query_pages(q.shape[2], cache.page_size)
        width = min(cache.max_pages, most)
        if not traced():
            return self._select(q.shape[2], cache, width)
        tables = cache.k_pool, cache.v_pool, cache.page_table, cache.lengths
        return PageSelection(*paged.select_window(q, *tables, width, self.sink_pages, self.window_pages))

    @ambient.shielded
    def _select(self, q_tokens: int, cache: PagedKV, width: int) -> PageSelection:
        """`select` of tensors that lie in memory; `width` is the room for the pages of a row."""
        cache = cache.within_table()
        found = _window.selected(cache, q_tokens, width, sink_pages=self.sink_pages, window_pages=self.window_pages)
        return self._select_in_torch(cache, q_tokens, width) if found is None else found

    def _select_in_torch(self, cache: PagedKV, q_tokens: int, width: int) -> PageSelection:
        """`select` on any device; `width` is the room for the pages of a row."""
        # More pages than a row of the table has are all of them: a larger number would not fit the table's integers.
        sink, before = min(self.sink_pages, cache.max_pages), min(self.window_pages, cache.max_pages) - 1
        columns = torch.arange(cache.max_pages, device=cache.device)
        window = first_query_page(cache, q_tokens) - before
        mask = cache.resident_pages() & ((columns < sink) | (columns >= window[:, None]))
        return PageSelection.of_mask(mask[:, None].expand(-1, cache.num_heads_kv, -1), width)


def _compute_op(
    q, k_pool, v_pool, page_table, lengths, width, sink_pages, window_pages
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What computes ``torch.ops.flashcore.select_window``."""
    cache = PagedKV.from_tables(k_pool, v_pool, page_table, lengths)
    selection = SinkWindow(sink_pages, window_pages)._select(q.shape[2], cache, width)
    return selection.pages, selection.counts


paged.computed_by(paged.select_window, _compute_op)
