"""Backend `cublaslt-paged`: cuBLASLt's products over K and V in pages, one sequence after the other."""

from __future__ import annotations

from dataclasses import replace

import torch

from flashcore.backends._page_tables import Page
from flashcore.backends._paged import OverPages
from flashcore.backends._registry import register
from flashcore.backends.cublaslt import LARGEST_PAGE, CublasLt, takeable
from flashcore.errors import PageTableError
from flashcore.gpu.launching import outputs_for
from flashcore.numerics.reference import STAGES, Trace
from flashcore.paging import PAGE_SIZES, PagedKV, among_others
from flashcore.problem import Problem


def _as_one(pool: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A pool ``[pages, heads, page_size, head_dim]`` as ``[1, heads, rows, head_dim]``; rows from page to page.

    The pool is copied first where cuBLASLt cannot take it: its view as one may not be, since it ends before the rows of
    the last page do.
    """
    pool = takeable(pool)
    page, head, row, _ = pool.stride()
    if page % row:
        raise PageTableError(
            f"The pages of this pool lie {page} elements apart, no multiple of its rows' {row}; cuBLASLt's backend "
            "cannot reach them."
        )
    # Reaches from the first page to the last one's first row; a product is told of the rows of one page.
    shape = (1, pool.shape[1], (pool.shape[0] - 1) * (page // row) + 1, pool.shape[3])
    return pool.as_strided(shape, (0, head, row, 1)), page // row


@register
class CublasLtPaged(OverPages, CublasLt):
    """The same over K and V in pages. Reads table and lengths to the host: slow, and right."""

    id = "cublaslt-paged"
    title = "cuBLASLt over pages, one sequence after the other"
    variant_of = "cublaslt"
    lanes = 1

    def run(self, q, k, v, problem: Problem, page_table=None):
        if page_table is not None:
            return super().run(q, k, v, problem, page_table)
        out, lse = self.run_paged(*among_others(q, k, v, problem))
        return out[1:], lse[1:]

    def run_paged(self, q, cache: PagedKV, problem: Problem, selection=None):
        out, lse = outputs_for(q)
        (k, k_apart), (v, v_apart) = _as_one(cache.k_pool), _as_one(cache.v_pool)
        for row, (part, pages) in enumerate(self._sequences(cache, problem, k_apart, v_apart)):
            one = slice(row, row + 1)
            self._compute(q[one], k, v, out[one], lse[one], part, cache.page_size, pages)
        return out, lse

    def trace(self, q, k, v, problem: Problem, page_table=None) -> Trace:
        if page_table is not None:
            return super().trace(q, k, v, problem, page_table)
        q, cache, problem = among_others(q, k, v, problem)
        (k, k_apart), (v, v_apart) = _as_one(cache.k_pool), _as_one(cache.v_pool)
        traces = [
            self._trace(q[row : row + 1], k, v, part, cache.page_size, pages)
            for row, (part, pages) in enumerate(self._sequences(cache, problem, k_apart, v_apart))
        ][1:]
        stages = {stage: torch.cat([getattr(trace, stage) for trace in traces]) for stage in STAGES}
        return replace(traces[0], **stages)

    def _sequences(
        self, cache: PagedKV, problem: Problem, k_apart: int, v_apart: int
    ) -> list[tuple[Problem, list[Page]]]:
        """Each sequence's problem and resident pages; waits for the device.

        Parameters
        ----------
        k_apart, v_apart
            Rows from one page to the next, in K's pool and in V's, which may lie in another order.

        Raises
        ------
        PageTableError
            The table names a page outside the pool: cuBLASLt would be told of memory that is not the pool's.
        """
        found = []
        size, lengths = cache.page_size, cache.within_table().lengths.tolist()
        for sequence, (length, row) in enumerate(zip(lengths, self.page_rows(cache), strict=True)):
            used = list(enumerate(row[: -(-length // size)]))
            for nth, page in used:
                if page >= cache.num_pages:
                    raise PageTableError(
                        f"page_table[{sequence}, {nth}] is {page} and the pool has pages 0 to {cache.num_pages - 1}; "
                        "write a page of the pool there, or -1 for a page that was dropped."
                    )
            pages = [
                Page(page * k_apart, min(size, length - nth * size), nth * size, first_value=page * v_apart)
                for nth, page in used
                if page >= 0
            ]
            found.append((problem.with_(batch=1, seqlen_k=max(1, length)), pages))
        return found

    def page_rows(self, cache: PagedKV) -> list[list[int]]:
        """The page table, on the host."""
        return cache.page_table.tolist()


assert max(PAGE_SIZES) <= LARGEST_PAGE
