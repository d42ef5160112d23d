"""Write new tokens into their pages, on the device: slots come from the page table and the lengths that lie there.

Nothing here waits for the device or reads from it, so that it can be captured in a CUDA graph. Where it can run, the
kernel in kernels/paged_append.cu does it in two launches; what stands here is the portable path, in torch's index
operations, and says what the kernel has to do.
"""

from __future__ import annotations

import torch

from flashcore.library import paged, traced
from flashcore.numerics import ambient, transforms
from flashcore.paging import _appending, arguments
from flashcore.paging.bounds import widen_bounds
from flashcore.paging.checks import can_read_back, check_tables, debugging
from flashcore.paging.tables import PagedKV


def append_tokens(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    key_bounds: torch.Tensor | None = None,
) -> None:
    """Write the next tokens of some sequences at positions ``lengths[row]`` and on, then add to `lengths`.

    A row whose tokens do not all have a page in the table (-1, outside the pool, or past the last column), whose length
    is negative, or which is not in the table, is passed over whole, and its length stays. So rows without a sequence
    may ride along in a captured graph, and a table that is wrong never harms the pool; ``PagedKV.check(tokens)`` says
    what is wrong with it, and with FLASHCORE_DEBUG=1 so does this.

    Under `torch.compile` and `torch.export` the call is one op, ``torch.ops.flashcore.append_tokens``.

    On a Hopper GPU, with head_dim 64 or 128 and rows that start at multiples of 16 bytes, a kernel does it. It is
    compiled at its first call; one that a graph captures before that is captured in torch's operations.

    Parameters
    ----------
    k_new, v_new
        ``[rows, num_heads_kv, tokens, head_dim]`` in the dtype of the pools, any strides.
    k_pool, v_pool
        ``[num_pages, num_heads_kv, page_size, head_dim]``, any strides.
    page_table, lengths
        ``[batch, max_pages]`` and ``[batch]`` int32; `lengths` is changed.
    rows
        ``[rows]`` integer: which sequence each row of `k_new` belongs to, each at most once; None for all in order.
    counts
        ``[rows]`` integer: how many of the tokens are real, the rest being padding; None for all of them.
    key_bounds
        ``[num_pages, num_heads_kv, 2, head_dim]``, kept up to date when given.

    Raises
    ------
    InvalidProblem, PageTableError
        Tensors that do not fit together. Numbers in `rows` and `counts` are checked on a CPU, and on a GPU with
        FLASHCORE_DEBUG=1.
    """
    arguments.check_pools(k_pool, v_pool)
    arguments.check_table(page_table, lengths, k_pool.device)
    tables = PagedKV(k_pool, v_pool, page_table, lengths)
    num_rows = arguments.rows_given(rows, tables.batch)
    arguments.check_new(k_new, v_new, tables, num_rows)
    arguments.check_rows(rows, counts, num_rows, k_pool.device)
    write_tokens(k_new, v_new, k_pool, v_pool, page_table, lengths, rows=rows, counts=counts, key_bounds=key_bounds)


def write_tokens(
    k_new, v_new, k_pool, v_pool, page_table, lengths, *, rows=None, counts=None, key_bounds=None
) -> None:  # fmt: skip
    """`append_tokens` for whoever has checked what it is given, as a cache of ours does."""
    compute = paged.append_tokens if traced() else _append
    with torch.no_grad():
        if not traced() and transforms.under_way():
            transforms.refuse("k or v", k_new, v_new)
        compute(k_new, v_new, k_pool, v_pool, page_table, lengths, rows, counts, key_bounds)


@ambient.shielded
@torch.no_grad()
def _append(
    k_new, v_new, k_pool, v_pool, page_table, lengths, rows=None, counts=None, key_bounds=None
) -> None:  # fmt: skip
    """`append_tokens` of tensors that lie in memory."""
    if (not k_new.is_cuda or debugging()) and can_read_back(lengths.device):
        arguments.check_row_numbers(rows, counts, page_table.shape[0], k_new.shape[2])
    if debugging():
        wanted = torch.full(k_new.shape[:1], k_new.shape[2], device=lengths.device) if counts is None else counts.long()
        if rows is not None:
            wanted = torch.zeros_like(lengths, dtype=torch.int64).index_copy_(0, rows.long(), wanted)
        check_tables(PagedKV(k_pool, v_pool, page_table, lengths), wanted)
    if not _appending.launched(k_new, v_new, k_pool, v_pool, page_table, lengths, rows, counts, key_bounds):
        _append_in_torch(k_new, v_new, k_pool, v_pool, page_table, lengths, rows, counts, key_bounds)


paged.computed_by(paged.append_tokens, _append)


def _append_in_torch(k_new, v_new, k_pool, v_pool, page_table, lengths, rows, counts, key_bounds) -> None:
    """`append_tokens` on any device, for any head_dim and strides."""
    num_pages, _, page_size, _ = k_pool.shape
    tokens = k_new.shape[2]
    batch = page_table.shape[0]
    # A row that is not there reads one that is, and writes nothing.
    at = None if rows is None else rows.long().clamp(0, batch - 1)
    table, start = (page_table, lengths) if rows is None else (page_table[at], lengths[at])
    nth = torch.arange(tokens, device=k_pool.device)
    position = start[:, None].long() + nth
    column, offset = position // page_size, position % page_size
    page = table.gather(1, column.clamp(0, page_table.shape[1] - 1)).long()
    fits = (position >= 0) & (column < page_table.shape[1]) & (page >= 0) & (page < num_pages)
    real = torch.ones_like(fits) if counts is None else nth < counts[:, None]
    fits = (fits | ~real).all(dim=1) & (start >= 0)
    if rows is not None:
        fits &= (rows >= 0) & (rows < batch)
    page, offset, wanted = page.flatten(), offset.flatten(), (real & fits[:, None]).flatten()
    k_flat, v_flat = (t.transpose(1, 2).flatten(0, 1) for t in (k_new, v_new))

    if key_bounds is not None:
        widen_bounds(key_bounds, k_flat, page, offset, wanted)
    # Without a branch on the device's values, a token that is not wanted repeats the first one that is: same slot, same
    # numbers. With none wanted, all write back what slot 0 of page 0 holds.
    nth_flat = torch.arange(page.shape[0], device=page.device)
    source = torch.where(wanted, nth_flat, wanted.int().argmax())
    some = wanted.any()
    page, offset = torch.where(some, page[source], 0), torch.where(some, offset[source], 0)
    for pool, new in ((k_pool, k_flat), (v_pool, v_flat)):
        pool[page, :, offset] = torch.where(some, new[source], pool[0, :, 0])

    added = (fits * (tokens if counts is None else counts)).to(lengths.dtype)
    if rows is None:
        lengths += added
    else:
        lengths.index_add_(0, at, added)


@ambient.shielded
@torch.no_grad()
def copy_pages(pools: list[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy whole pages within each pool ``[num_pages, ...]``; `source` and `target` are int64 and disjoint."""
    for pool in pools:
        pool[target] = pool[source]
