"""Keys or values that lie in pages, as a tensor: attention of ours reads the pages, and all else a dense copy."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map

from flashcore import backends, paged_ops
from flashcore.errors import Unsupported
from flashcore.paging import PagedKV


class InPages(torch.Tensor):
    """``[batch, num_heads_kv, length, head_dim]`` keys or values of sequences of one length.

    No memory is behind its shape. An operation of torch on it runs on a dense copy, which is made anew each time, so
    that code which knows no pages gets the numbers that it expects.
    """

    @staticmethod
    def __new__(cls, pages: PagedKV, pool: torch.Tensor, length: int):
        shape = (pages.batch, pages.num_heads_kv, length, pages.head_dim)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=pool.dtype, device=pool.device)

    def __init__(self, pages: PagedKV, pool: torch.Tensor, length: int):
        self.pages, self.pool, self.length = pages, pool, length

    def dense(self) -> torch.Tensor:
        """The numbers, contiguous. No synchronisation."""
        columns = -(-self.length // self.pages.page_size)
        pages = self.pool[self.pages.page_table[:, :columns].long()]  # [batch, columns, heads, page_size, head_dim]
        return pages.transpose(1, 2).flatten(2, 3)[:, :, : self.length].contiguous()

    __torch_function__ = torch._C._disabled_torch_function_impl  # what comes out is an ordinary tensor

    def __repr__(self) -> str:
        return f"InPages({list(self.shape)}, {self.dtype}, {self.device}, page_size={self.pages.page_size})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(value):
            return value.dense() if isinstance(value, InPages) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def reader_of(
    query: torch.Tensor, pages: PagedKV, backend: str, *, window_left: int = -1, softcap: float | None = None,
    sink: torch.Tensor | None = None,
) -> str | None:  # fmt: skip
    """Id of the backend that shall read these pages; None where attention over a dense copy is quicker.

    Parameters
    ----------
    backend
        An id, which counts where that backend reads page tables; ``auto`` for a kernel of ours, if one takes this.
    window_left, softcap, sink
        As `flashcore.paged_attention` is to be told of them.
    """
    if backend != "auto":
        asked = {"window": window_left >= 0, "softcap": softcap is not None, "sink": sink is not None}
        named = backends.get(backend)
        takes = {name for name, given in asked.items() if given} <= set(named.paged_masks)
        return backend if named.paged and takes else None
    masks = {"window_left": window_left, "softcap": softcap, "sink": sink is not None}
    try:
        chosen = paged_ops.picked_for(query, pages, **masks)
    except Unsupported:  # batch-invariant bits are asked for: not over pages here
        return None
    return chosen.id if chosen.role == "ours" else None
