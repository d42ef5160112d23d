"""Which pages a query attends to: what a policy is, what it returns, and the policy that takes them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from flashcore.errors import PageTableError
from flashcore.library import traced
from flashcore.numerics import ambient
from flashcore.numerics.outputs import new_output
from flashcore.paging.checks import can_read_back
from flashcore.paging.tables import PagedKV


@dataclass(frozen=True)
class PageSelection:
    """Logical pages to attend to, for each sequence and KV head; the query heads of a group share them.

    ``pages[b, h, :counts[b, h]]`` ascend and none comes twice; the rest is -1. Logical page j holds positions
    ``j * page_size`` on; its pool page is ``page_table[b, j]``.
    """

    pages: torch.Tensor
    """``[batch, num_heads_kv, max_selected]`` int32."""
    counts: torch.Tensor
    """``[batch, num_heads_kv]`` int32."""

    @staticmethod
    def unwritten(cache: PagedKV, width: int) -> PageSelection:
        """Room for a kernel to write: `width` pages for each sequence and KV head, and their counts."""
        # As floats, so that what is never written is a NaN while outputs are poisoned: no sequence has that page.
        shapes = ((cache.batch, cache.num_heads_kv, width), (cache.batch, cache.num_heads_kv))
        return PageSelection(*(new_output(s, torch.float32, cache.device).view(torch.int32) for s in shapes))

    @staticmethod
    def of_mask(mask: torch.Tensor, max_selected: int | None = None) -> PageSelection:
        """From ``[batch, num_heads_kv, max_pages]`` bool, without a wait for the device.

        `max_selected` is a bound on the pages of any row that the caller knows without looking; None for all.
        """
        num_pages = mask.shape[-1]
        width = num_pages if max_selected is None else min(max_selected, num_pages)
        columns = torch.arange(num_pages, dtype=torch.int32, device=mask.device)
        pages = torch.where(mask, columns, num_pages).sort(dim=-1).values[..., :width]
        return PageSelection(
            pages.masked_fill(pages == num_pages, -1).contiguous(), mask.sum(dim=-1, dtype=torch.int32)
        )

    def mask(self, max_pages: int) -> torch.Tensor:
        """``[batch, num_heads_kv, max_pages]`` bool: which logical pages are selected."""
        nth = torch.arange(self.pages.shape[-1], device=self.pages.device)
        valid = nth < self.counts[..., None]
        # One column more, where what is not valid lands.
        target = torch.where(valid, self.pages, max_pages).long()
        found = torch.zeros(*self.counts.shape, max_pages + 1, dtype=torch.bool, device=self.pages.device)
        return found.scatter_(-1, target, True)[..., :max_pages]

    def check(self, cache: PagedKV, *, contents: bool = True) -> None:
        """Raise `PageTableError` unless this fits the cache; with `contents`, read it back from the device as well."""
        for name, tensor, dims in (("pages", self.pages, 3), ("counts", self.counts, 2)):
            if tensor.dim() != dims or tuple(tensor.shape[:2]) != (cache.batch, cache.num_heads_kv):
                raise PageTableError(
                    f"{name} of the selection is {list(tensor.shape)}; it has to begin with "
                    f"[{cache.batch} sequences, {cache.num_heads_kv} KV heads] and have {dims} dimensions."
                )
            if tensor.dtype != torch.int32 or tensor.device != cache.device or not tensor.is_contiguous():
                raise PageTableError(
                    f"{name} of the selection is {tensor.dtype} on {tensor.device}; it has to be contiguous "
                    f"torch.int32 on {cache.device}."
                )
        if not contents or not can_read_back(cache.device):
            return
        nth = torch.arange(self.pages.shape[-1], device=cache.device)
        valid = nth < self.counts[..., None]
        wrong_count = (self.counts < 0) | (self.counts > self.pages.shape[-1])
        outside = valid & ((self.pages < 0) | (self.pages >= cache.used_pages()[:, None, None]))
        descends = torch.zeros_like(valid)
        descends[..., 1:] = valid[..., 1:] & (self.pages[..., 1:] <= self.pages[..., :-1])
        for mask, what in (
            (wrong_count, "counts says more pages than the selection has room for"),
            (outside, "a page that the sequence does not have"),
            (descends, "pages that do not ascend"),
        ):
            if mask.any():
                where = ", ".join(map(str, mask.nonzero()[0].tolist()))
                raise PageTableError(f"The selection has {what}, first at [{where}]; a policy has to return others.")


@runtime_checkable
class Policy(Protocol):
    """Chooses pages. Any object with this one method is a policy."""

    def select(self, q: torch.Tensor, cache: PagedKV) -> PageSelection:
        """Pages for one step of attention, on the device and without waiting for it.

        Parameters
        ----------
        q
            ``[batch, num_heads_q, q_tokens, head_dim]``: queries of each sequence's last `q_tokens` tokens.
        cache
            Its tables, lengths, pools and, where kept, `key_bounds`.
        """
        ...


def query_pages(q_tokens: int, page_size: int) -> int:
    """The most pages that the last `q_tokens` positions of a sequence can lie in."""
    return (q_tokens + page_size - 2) // page_size + 1


def first_query_page(cache: PagedKV, q_tokens: int) -> torch.Tensor:
    """``[batch]`` int32: logical page of the first query's position.

    Every policy here takes the pages from this one to the last, so that no query is left without a key under a causal
    mask.
    """
    return torch.div((cache.lengths - q_tokens).clamp(min=0), cache.page_size, rounding_mode="floor")


@dataclass(frozen=True)
class AllPages:
    """Every page that holds keys: dense attention, spelled as a selection."""

    def select(self, q: torch.Tensor, cache: PagedKV) -> PageSelection:
        cache.check_query(q)
        return _every_page(cache) if traced() else ambient.shielded(_every_page)(cache)


def _every_page(cache: PagedKV) -> PageSelection:
    resident = cache.within_table().resident_pages()[:, None].expand(-1, cache.num_heads_kv, -1)
    return PageSelection.of_mask(resident)
