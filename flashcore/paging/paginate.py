"""Dense keys and values as pages of a pool, in no particular order: what a paged kernel is checked on."""

from __future__ import annotations

import math

import torch

from flashcore.numerics import ambient
from flashcore.paging.tables import PagedKV
from flashcore.problem import Problem

SPARE_PAGES = 3
"""Pages of the pool that nobody uses."""
SPARE_COLUMNS, UNNAMED = 1, 2
"""Columns of the table past the last page of any sequence, and entries of its rows that belong to no column."""
BLOCK = 64
"""Keys that a kernel takes at a time, or a part of them."""


@ambient.judging
def paginate(k: torch.Tensor, v: torch.Tensor, page_size: int) -> PagedKV:
    """Copy dense K and V into a pool, the pages of all sequences mixed up, and NaN wherever there is no key.

    Nothing is random, and nothing is read from the device, so that it can be captured in a CUDA graph.

    Parameters
    ----------
    k, v
        ``[batch, num_heads_kv, seqlen_k, head_dim]``; every sequence has ``seqlen_k`` tokens.
    """
    table, order = _tables(k.shape[0], k.shape[2], page_size, k.device)
    lengths = torch.full(k.shape[:1], k.shape[2], dtype=torch.int32, device=k.device)
    pools = (_pool(dense, page_size, order) for dense in (k, v))
    return PagedKV(*pools, table, lengths, max_length=k.shape[2], lengths_fit=True)


@ambient.judging
def among_others(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, *, even: int | None = None
) -> tuple[torch.Tensor, PagedKV, Problem]:
    """The same sequences in pages, after one more that differs, so that nothing is alike by chance: for checks.

    The first sequence is one key shorter or longer, within the block of keys that the others end in, and is there to be
    passed over. V lies in its pool by page, token and head, and K by page, head and token. The table has a column more
    than any sequence uses, and its rows lie further apart than that; what is named there is a page of NaN.

    Parameters
    ----------
    q, k, v, problem
        As `flashcore.backends.Backend.run` takes them.
    even
        Keys that a kernel takes at a time, where it has to take as many blocks of them of the first sequence as of the
        others, though a window hides what lies before it. The first sequence is then shorter by a block, or as long as
        the others, where a key more or less changes that.

    Returns
    -------
    q, cache, problem
        One sequence more than given, the first; `q` in its own memory order.
    """
    last = problem.seqlen_k
    first = _first_length(problem, even)
    longest = max(first, last)

    def with_first(dense: torch.Tensor) -> torch.Tensor:
        """``[batch + 1, heads, longest, head_dim]``, NaN past each sequence's end."""
        one = torch.cat([dense[:1], dense[:1, :, -1:]], dim=2)[:, :, :first]
        ends = ((one, first), (dense, last))
        return torch.cat([torch.nn.functional.pad(t, (0, 0, 0, longest - n), value=math.nan) for t, n in ends])

    batch = problem.batch + 1
    wide = SPARE_COLUMNS + UNNAMED
    table, order = _tables(batch, longest, problem.page_size, k.device, wide)
    lengths = torch.full((batch,), last, dtype=torch.int32, device=k.device)
    lengths[:1] = first
    k_pool = _pool(with_first(k), problem.page_size, order)
    v_pool = _pool(with_first(v), problem.page_size, order).transpose(1, 2).contiguous().transpose(1, 2)
    table = table[:, : table.shape[1] - UNNAMED]
    cache = PagedKV(k_pool, v_pool, table, lengths, max_length=longest, lengths_fit=True)
    return _once_more(q), cache, problem.with_(batch=batch)


def _first_length(problem: Problem, even: int | None) -> int:
    """Keys of the sequence that is passed over."""
    last = problem.seqlen_k
    first = last - 1 if (last - 1) % BLOCK else last + 1
    if even is None or problem.window_left < 0:
        return first
    # Where the windows begin with a block and the keys end with one, only a whole block leaves as many to be read.
    # Where not even that does, all sequences are as long.
    lengths = (first, last + 1 if first < last else last - 1, last - even, last)
    return next(n for n in lengths if n > 0 and _blocks(problem, n, even) == _blocks(problem, last, even))


def _blocks(problem: Problem, length: int, size: int) -> int:
    """Blocks of `size` keys that some query of a sequence of this length has in its window."""
    return -(-length // size) - max(0, length - problem.seqlen_q - problem.window_left) // size


def _tables(
    batch: int, seqlen: int, page_size: int, device: torch.device, wide: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A page table with `wide` columns to spare, which name a page that nobody uses; and the pool page of each page."""
    pages = -(-seqlen // page_size)
    num_pages = batch * pages + SPARE_PAGES
    step = next(s for s in range(max(1, int(0.618 * num_pages)), num_pages + 1) if math.gcd(s, num_pages) == 1)
    order = (torch.arange(batch * pages, device=device) * step + 1) % num_pages
    unused = (batch * pages * step + 1) % num_pages
    table = torch.full((batch, pages + wide), unused, dtype=torch.int32, device=device)
    table[:, :pages] = order.view(batch, pages)
    return table, order


def _pool(dense: torch.Tensor, page_size: int, order: torch.Tensor) -> torch.Tensor:
    """Dense keys or values in a pool's pages, NaN where there is none."""
    batch, heads, seqlen, head_dim = dense.shape
    pages = order.numel() // batch
    padded = torch.nn.functional.pad(dense, (0, 0, 0, pages * page_size - seqlen), value=math.nan)
    shape = (batch * pages + SPARE_PAGES, heads, page_size, head_dim)
    filled = torch.full(shape, math.nan, dtype=dense.dtype, device=dense.device)
    return filled.index_copy_(0, order, padded.unflatten(2, (pages, page_size)).transpose(1, 2).flatten(0, 1))


def _once_more(q: torch.Tensor) -> torch.Tensor:
    """The queries of the first sequence, then all of them, in the memory order of `q`."""
    order = sorted(range(q.dim()), key=lambda dim: (-q.stride(dim), dim))
    back = [order.index(dim) for dim in range(q.dim())]
    return torch.cat([q[:1].permute(order), q.permute(order)], dim=back[0]).permute(back)
