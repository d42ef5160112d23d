"""Keys and values in pages, as a kernel reads them: two pools, a page table, lengths, made by anybody."""

from __future__ import annotations

from typing import Literal

import torch

from flashcore.errors import PageTableError
from flashcore.numerics import plain
from flashcore.paging import arguments
from flashcore.paging.arguments import PAGE_SIZES
from flashcore.paging.bounds import bounds_of_pool
from flashcore.paging.checks import check_tables, debugging

Layout = Literal["hnd", "nhd"]


class PagedKV:
    """The keys and values of a batch of sequences, in pages. It reads; `PagedKVCache` also writes and owns.

    Attributes
    ----------
    k_pool, v_pool
        ``[num_pages, num_heads_kv, page_size, head_dim]`` float16 or bfloat16, any strides with the last dimension
        contiguous. In a pool of ours one page of one head is one contiguous ``[page_size, head_dim]`` block: what a
        block of a decode kernel reads, with one bulk copy. A pool in the order page, token, head is a view.
    page_table
        ``[batch, max_pages]`` int32, rows contiguous: pool page of each logical page, -1 for a page that was dropped
        (attention passes over its keys). Entries past a sequence's last page mean nothing.
    lengths
        ``[batch]`` int32: tokens of each sequence, dropped ones included, since positions stay what they were.
    key_bounds
        None, or ``[num_pages, num_heads_kv, 2, head_dim]`` in the dtype of the keys: elementwise least and largest key
        of each page (see `flashcore.paging.bounds`).
    lengths_fit
        Whether its maker vouches that each length fits its row of the table; otherwise see `within_table`.
    holes
        Whether pages of a sequence may be dropped. Our kernels then take the form that is exact whatever the scores
        are; the plain one loses scores far below 0 behind dropped pages (kernels/README.md, Limits). A page that
        `PagedKVCache.drop` drops sets it. A CUDA graph or an exported program keeps what held at its capture: where
        pages are dropped only later, set it before.
    """

    def __init__(
        self, k_pool, v_pool, page_table, lengths, *, key_bounds=None, max_length: int | None = None,
        lengths_fit: bool = False, holes: bool = False,
    ):  # fmt: skip
        self.k_pool, self.v_pool, self.page_table, self.lengths = k_pool, v_pool, page_table, lengths
        self.key_bounds = key_bounds
        self.lengths_fit, self.holes = lengths_fit, holes
        self._max_length = max_length
        self.num_pages, self.num_heads_kv, self.page_size, self.head_dim = k_pool.shape
        self.batch, self.max_pages = page_table.shape
        self.dtype, self.device = k_pool.dtype, k_pool.device

    @staticmethod
    def from_tables(
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        page_table: torch.Tensor,
        lengths: torch.Tensor,
        *,
        layout: Layout = "hnd",
        key_bounds: torch.Tensor | bool = False,
        max_length: int | None = None,
        lengths_fit: bool = False,
        holes: bool = False,
    ) -> PagedKV:
        """Read pages that another allocator owns (vLLM's and FlashInfer's block tables), without a copy.

        The result has no `append`, `fork` or `free`: only the pages' owner knows which are free. To write tokens into
        pages that the owner has already put into the table, call `flashcore.paging.append_tokens`.

        Parameters
        ----------
        k_pool, v_pool
            ``[num_pages, num_heads_kv, page_size, head_dim]`` (`layout` "hnd"), or
            ``[num_pages, page_size, num_heads_kv, head_dim]`` ("nhd"). K and V interleaved in one tensor are
            two views of it: ``kv[:, 0]`` and ``kv[:, 1]`` in FlashInfer, ``kv[0]`` and ``kv[1]`` in vLLM.
        page_table, lengths
            ``[batch, max_pages]`` and ``[batch]``, int32, on the device of the pools. Taken as they are: what their
            owner changes later is seen.
        key_bounds
            True to compute bounds from the pool now (call `refresh_bounds` after the pages change), a tensor made
            elsewhere, or False for none; `TopK` needs them.
        max_length
            A bound on all lengths, which the attribute `max_length` then has, for a policy of your own; None for what
            the table can hold. No backend of ours needs it: the lengths say how far each sequence goes.
        lengths_fit
            You vouch that each length is at least 0 and fits its row of the table, now and whenever it changes. That
            saves each call one small launch, which otherwise sees to it (`within_table`).
        holes
            True if a sequence may have pages that were dropped, now or later: see the attribute.

        Nothing is read back to be checked, so that a table that is wrong means something, and the same to every
        backend: an entry outside the pool is a page of zeros, a negative one a page that was dropped, and a length that
        its row cannot hold is the nearest that it can. `check` says what is wrong. `cublaslt-paged`, which reads
        the table to the host anyway, refuses an entry outside the pool.

        Raises
        ------
        PageTableError
            A tensor of the wrong shape, dtype, stride or device. With FLASHCORE_DEBUG=1 also what `check` finds.
        """
        if layout not in ("hnd", "nhd"):
            raise PageTableError(f"layout is {layout!r}; it has to be 'hnd' (heads before tokens) or 'nhd'.")
        arguments.check_pools(k_pool, v_pool)
        if layout == "nhd":
            k_pool, v_pool = k_pool.transpose(1, 2), v_pool.transpose(1, 2)
        if k_pool.shape[2] not in PAGE_SIZES:
            raise PageTableError(
                f"The pools have pages of {k_pool.shape[2]} tokens in layout '{layout}'; "
                f"a page has {', '.join(map(str, PAGE_SIZES))} tokens."
            )
        arguments.check_table(page_table, lengths, k_pool.device)
        max_length = None if max_length is None else arguments.whole("max_length", max_length)
        lengths_fit, holes = plain.flag("lengths_fit", lengths_fit), plain.flag("holes", holes)
        kv = PagedKV(k_pool, v_pool, page_table, lengths, max_length=max_length, lengths_fit=lengths_fit, holes=holes)
        if isinstance(key_bounds, torch.Tensor):
            wanted = (kv.num_pages, kv.num_heads_kv, 2, kv.head_dim)
            if key_bounds.shape != wanted or key_bounds.dtype != kv.dtype or key_bounds.device != kv.device:
                raise PageTableError(
                    f"key_bounds is {key_bounds.dtype} {list(key_bounds.shape)} on {key_bounds.device}; "
                    f"it has to be {kv.dtype} {list(wanted)} on {kv.device}."
                )
            kv.key_bounds = key_bounds
        elif plain.flag("key_bounds", key_bounds):
            kv.refresh_bounds()
        if debugging():
            kv.check()
        return kv

    @property
    def max_length(self) -> int:
        """A bound on every length, known on the host."""
        return self.max_pages * self.page_size if self._max_length is None else self._max_length

    def within_table(self) -> PagedKV:
        """The same pages, with a length that its row of the table cannot hold brought to the nearest that it can.

        What whoever reads pages begins with, so that no length leads out of the table: itself where the lengths are
        known to fit, and otherwise with a copy of them, made on the device without synchronisation.
        """
        if self.lengths_fit:
            return self
        most = min(self.max_pages * self.page_size, torch.iinfo(torch.int32).max)
        fitting = PagedKV(self.k_pool, self.v_pool, self.page_table, self.lengths.clamp(0, most),
                          key_bounds=self.key_bounds, max_length=self._max_length, lengths_fit=True,
                          holes=self.holes)  # fmt: skip
        fitting.device = self.device
        return fitting

    def used_pages(self) -> torch.Tensor:
        """``[batch]`` int32: logical pages that each sequence's length takes, holes included. No synchronisation."""
        return torch.div(self.lengths + (self.page_size - 1), self.page_size, rounding_mode="floor")

    def resident_pages(self) -> torch.Tensor:
        """``[batch, max_pages]`` bool: logical pages that hold tokens and were not dropped. No synchronisation."""
        columns = torch.arange(self.max_pages, device=self.device)
        return (columns < self.used_pages()[:, None]) & (self.page_table >= 0)

    def refresh_bounds(self) -> None:
        """Compute `key_bounds` anew from all that lies in the pages in use, on the device."""
        self.key_bounds = bounds_of_pool(self)

    def check(self, tokens: int = 0) -> None:
        """Read lengths and page table on the device and raise at the first thing wrong. Waits for the device.

        Parameters
        ----------
        tokens
            When positive, also that each sequence could write its next `tokens` tokens: their pages are in the table
            and nobody else uses them. Rows without a sequence (length 0, no page) are passed over.

        Raises
        ------
        SequenceTooLong
            A length is negative, or beyond what a row of the table can hold.
        PageTableError
            A page index outside the pool.
        PagesOverlap
            A page that is to be written is used more than once.
        """
        check_tables(self, tokens)

    def check_query(self, q: torch.Tensor) -> None:
        """Raise `InvalidProblem` unless `q` is ``[batch, num_heads_q, q_tokens, head_dim]`` for this cache."""
        arguments.check_query(q, self)
