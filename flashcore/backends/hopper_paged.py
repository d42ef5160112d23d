"""Backend `hopper-paged`: the Hopper kernel over K and V in pages."""

from __future__ import annotations

import struct

from flashcore.backends._dealing import WARP_ROWS
from flashcore.backends._masks import OVER_PAGES
from flashcore.backends._paged import PagedBackend
from flashcore.backends._registry import register
from flashcore.backends.hopper import HopperUnsplit
from flashcore.paging import PagedKV
from flashcore.problem import Problem


@register
class HopperPaged(PagedBackend, HopperUnsplit):
    """`kernels/attention_hopper.cu`, compiled for pages: any lengths, all pages of each sequence."""

    id = "hopper-paged"
    title = "Our Hopper kernel over pages"
    variant_of = "hopper"
    masks = paged_masks = OVER_PAGES

    def defines(self, problem: Problem, device: int) -> tuple[tuple[str, int], ...]:
        return (("FLASHCORE_PAGED", 1), *super().defines(problem, device))

    def paged_arguments(self, q, cache: PagedKV, problem: Problem, selection, out, lse, loaded, stream, traced):
        arguments = [
            self.params(q, cache.k_pool, cache.v_pool, out, lse, problem),
            self.row_map("q", q, loaded.tile_m, problem.dtype),
            self.pool_map("k", cache.k_pool, loaded.tile_n, problem.dtype, promote=True),
            self.pool_map("v", cache.v_pool, loaded.tile_n, problem.dtype, promote=True),
            self.row_map("out", out, WARP_ROWS, problem.dtype),
            struct.pack("i", self.sections(problem, loaded, q.device.index or 0)),
            self.paged_params(cache, selection),
        ]
        return arguments, self.blocks(problem, loaded, q.device.index or 0)[0], None
