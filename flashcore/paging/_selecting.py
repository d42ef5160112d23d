"""Launch kernels/page_selection.cu: the pages with the best bounds, by the settings of a `TopK`."""

from __future__ import annotations

import dataclasses
import struct

import torch

from flashcore.gpu.build import HEAD_DIMS
from flashcore.gpu.launching import PreparedLaunch, current_stream, entry_point, facts_of, kept, multiprocessors
from flashcore.paging._launching import (
    MOST_BLOCKS_ACROSS,
    copies_whole,
    loaded,
    runs_ours,
    table_fits,
    version,
)
from flashcore.paging.arguments import DTYPES
from flashcore.paging.selection import PageSelection
from flashcore.paging.tables import PagedKV

KERNEL = "page_selection"
PARAMS = struct.Struct("6Q 7q d 8i")
"""`SelectionParams` of kernels/page_selection.cu: six pointers, two strides of three, the table's row, the share, eight
ints."""
MOST_PAGES, MOST_ROWS = 32768, 128
"""Of the kernel: pages of a sequence, and query rows of a KV head."""
WARP, LEAST_WARPS = 32, 4
WORD_BYTES = 4
"""Of shared memory, for each page of a sequence."""


def takes(q: torch.Tensor, cache: PagedKV) -> bool:
    """Whether the kernel takes these queries and this cache, wherever they are."""
    bounds = cache.key_bounds
    return (
        bounds is not None
        and q.dtype == bounds.dtype
        and q.dtype in DTYPES
        and cache.head_dim in HEAD_DIMS
        and all(t.device == q.device for t in (bounds, cache.page_table, cache.lengths))
        and bounds.shape == (cache.num_pages, cache.num_heads_kv, 2, cache.head_dim)
        and copies_whole(q)
        and copies_whole(bounds)
        and table_fits(cache.page_table, cache.lengths)
        and _rows(q, cache) <= MOST_ROWS
        and cache.max_pages <= MOST_PAGES
        and cache.batch <= MOST_BLOCKS_ACROSS
    )


def packed(q, cache: PagedKV, pages, counts, *, most: int | None, share: float | None, sink_pages: int) -> bytes:
    """`SelectionParams`; `most` and `share` as `TopK` has them."""
    bounds = cache.key_bounds
    return PARAMS.pack(
        *(t.data_ptr() for t in (q, bounds, cache.page_table, cache.lengths, pages, counts)),
        *q.stride()[:3], *bounds.stride()[:3], cache.page_table.stride(0), 1.0 if share is None else share,
        cache.max_pages if most is None else min(most, cache.max_pages), min(sink_pages, cache.max_pages),
        q.shape[1] // cache.num_heads_kv, q.shape[2], cache.num_pages, cache.page_size, cache.max_pages,
        pages.shape[-1],
    )  # fmt: skip


def selected(
    q: torch.Tensor, cache: PagedKV, width: int, *, most: int | None, share: float | None, sink_pages: int,
    source: str | None = None,
) -> PageSelection | None:  # fmt: skip
    """The selection, by the kernel on the current stream; None where it does not run or does not take these.

    Parameters
    ----------
    width
        Room for the pages of a sequence and KV head; at least as many as are selected.
    source
        Kernel source in place of the file's own.
    """
    if not runs_ours(q.device):
        return None
    device = q.device.index
    stream = current_stream(device)
    selection = PageSelection.unwritten(cache, width)
    pages, counts = selection.pages, selection.counts
    asked = {"most": most, "share": share, "sink_pages": sink_pages}

    def make() -> PreparedLaunch | None:
        if not takes(q, cache):
            return None
        kernel = loaded(KERNEL, cache.head_dim, q.dtype, device, source)
        if kernel is None:
            return None
        blocks = cache.num_heads_kv * cache.batch
        warps = _warps(cache.max_pages, blocks, multiprocessors(device), kernel.tile_n, kernel.threads // WARP)
        shape = dataclasses.replace(kernel, threads=warps * WARP, shared_bytes=_shared_bytes(q, cache))
        arguments = [packed(q, cache, pages, counts, **asked)]
        grid = (cache.num_heads_kv, cache.batch, 1)
        return PreparedLaunch(entry_point(kernel, KERNEL, device), shape, grid, arguments, stream)

    tensors = (q, cache.key_bounds, cache.page_table, cache.lengths, pages, counts)
    key = (
        KERNEL,
        version(KERNEL, source),
        device,
        stream,
        cache.page_size,
        most,
        share,
        sink_pages,
        *map(facts_of, tensors),
    )
    launch = kept(key, make)
    if launch is None:
        return None
    launch.launch()
    return selection


def _rows(q: torch.Tensor, cache: PagedKV) -> int:
    """Query rows that share a KV head."""
    return q.shape[1] // cache.num_heads_kv * q.shape[2]


def _shared_bytes(q: torch.Tensor, cache: PagedKV) -> int:
    return _rows(q, cache) * q.shape[3] * q.element_size() + cache.max_pages * WORD_BYTES


def _warps(max_pages: int, blocks: int, at_once: int, pages_a_warp: int, most: int) -> int:
    """Warps of a block: as many as there are pages for, fewer where several blocks share a multiprocessor."""
    blocks_together = -(-blocks // at_once)
    return max(LEAST_WARPS, min(most // blocks_together, -(-max_pages // pages_a_warp)))
