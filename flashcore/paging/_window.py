"""Launch `page_window` of kernels/page_selection.cu: first and last pages, by the settings of a `SinkWindow`."""

from __future__ import annotations

import struct

from flashcore.gpu.build import HEAD_DIMS
from flashcore.gpu.launching import PreparedLaunch, current_stream, entry_point, facts_of, kept
from flashcore.paging._launching import loaded, runs_ours, table_fits, version
from flashcore.paging._selecting import KERNEL
from flashcore.paging.arguments import DTYPES
from flashcore.paging.selection import PageSelection
from flashcore.paging.tables import PagedKV

ENTRY = "page_window"
PARAMS = struct.Struct("4Q q 8i")
"""`WindowParams` of kernels/page_selection.cu: four pointers, the table's row, eight ints."""
MOST_ROWS = 2**31 - 1
"""Sequences times KV heads: they are numbered by an int."""


def takes(cache: PagedKV) -> bool:
    """Whether the kernel takes this cache, wherever it is: of any head_dim and dtype, since it looks at no key."""
    table, lengths = cache.page_table, cache.lengths
    return (
        table.device == lengths.device == cache.device
        and table_fits(table, lengths)
        and cache.batch * cache.num_heads_kv <= MOST_ROWS
    )


def packed(cache: PagedKV, q_tokens: int, pages, counts, *, sink_pages: int, window_pages: int) -> bytes:
    """`WindowParams`; `sink_pages` and `window_pages` as `SinkWindow` has them."""
    return PARAMS.pack(
        *(t.data_ptr() for t in (cache.page_table, cache.lengths, pages, counts)), cache.page_table.stride(0),
        min(sink_pages, cache.max_pages), min(window_pages, cache.max_pages), cache.batch * cache.num_heads_kv,
        cache.num_heads_kv, q_tokens, cache.page_size, cache.max_pages, pages.shape[-1],
    )  # fmt: skip


def selected(cache: PagedKV, q_tokens: int, width: int, *, sink_pages: int, window_pages: int) -> PageSelection | None:
    """The selection, by the kernel on the current stream; None where it does not run or does not take this cache.

    Parameters
    ----------
    width
        Room for the pages of a sequence and KV head; at least as many as are selected.
    """
    if not runs_ours(cache.device):
        return None
    device = cache.device.index
    stream = current_stream(device)
    selection = PageSelection.unwritten(cache, width)
    pages, counts = selection.pages, selection.counts
    asked = {"sink_pages": sink_pages, "window_pages": window_pages}

    def make() -> PreparedLaunch | None:
        if not takes(cache):
            return None
        # The same in every variant of the kernel.
        kernel = loaded(KERNEL, HEAD_DIMS[0], DTYPES[0], device, None, ENTRY)
        if kernel is None:
            return None
        blocks = -(-cache.batch * cache.num_heads_kv // kernel.tile_m)
        arguments = [packed(cache, q_tokens, pages, counts, **asked)]
        return PreparedLaunch(entry_point(kernel, ENTRY, device), kernel, (blocks, 1, 1), arguments, stream)

    tensors = (cache.page_table, cache.lengths, pages, counts)
    key = (
        ENTRY,
        version(KERNEL),
        device,
        stream,
        q_tokens,
        cache.page_size,
        sink_pages,
        window_pages,
        *map(facts_of, tensors),
    )
    launch = kept(key, make)
    if launch is None:
        return None
    launch.launch()
    return selection
