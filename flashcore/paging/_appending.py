"""Launch kernels/paged_append.cu: new tokens into their pages, then lengths, from the arguments of `append_tokens`."""

from __future__ import annotations

import struct

import torch

from flashcore.gpu.build import HEAD_DIMS
from flashcore.gpu.launching import PreparedLaunch, current_stream, entry_point, facts_of, kept
from flashcore.paging._launching import (
    MOST_BLOCKS_ACROSS,
    copies_whole,
    loaded,
    runs_ours,
    table_fits,
    version,
)
from flashcore.paging.arguments import DTYPES, PAGE_SIZES
from flashcore.paging.selection import query_pages

KERNEL = "paged_append"
PARAMS = struct.Struct("9Q 16q 7i 4x")
"""`AppendParams` of kernels/paged_append.cu: nine pointers, five strides of three, the table's row, seven ints."""
INT_BYTES = 4


def takes(k_new, v_new, k_pool, v_pool, page_table, lengths, rows, counts, key_bounds) -> bool:
    """Whether the kernel takes these tensors, wherever they are; what it does not take is torch's to do, or refuse."""
    given = [t for t in (k_new, v_new, k_pool, v_pool, key_bounds) if t is not None]
    numbers = [t for t in (rows, counts) if t is not None]
    everything = [*given, page_table, lengths, *numbers]
    if k_new.dim() != 4 or k_new.numel() == 0 or k_pool.dim() != 4 or k_pool.numel() == 0:
        return False
    num_pages, heads, page_size, head_dim = k_pool.shape
    num_rows = page_table.shape[0] if rows is None else rows.numel()
    return (
        all(t.device == k_pool.device for t in everything)
        and k_pool.dtype in DTYPES
        and all(t.dtype == k_pool.dtype for t in given)
        and head_dim in HEAD_DIMS
        and page_size in PAGE_SIZES
        and v_pool.shape == k_pool.shape
        and k_new.shape == v_new.shape == (num_rows, heads, k_new.shape[2], head_dim)
        and (key_bounds is None or key_bounds.shape == (num_pages, heads, 2, head_dim))
        and all(copies_whole(t) for t in given)
        and table_fits(page_table, lengths)
        and all(t.shape == (num_rows,) and t.dtype in (torch.int32, torch.int64) for t in numbers)
        and max(num_rows, heads) <= MOST_BLOCKS_ACROSS
    )


def packed(k_new, v_new, k_pool, v_pool, page_table, lengths, rows, counts, key_bounds) -> bytes:
    """`AppendParams`."""
    tensors = (k_new, v_new, k_pool, v_pool, key_bounds, page_table, lengths, rows, counts)
    rows_step, counts_step = (0 if t is None else t.stride(0) * t.element_size() // INT_BYTES for t in (rows, counts))
    return PARAMS.pack(
        *(0 if t is None else t.data_ptr() for t in tensors),
        *k_new.stride()[:3], *v_new.stride()[:3], *k_pool.stride()[:3], *v_pool.stride()[:3],
        *((0, 0, 0) if key_bounds is None else key_bounds.stride()[:3]),
        page_table.stride(0), rows_step, counts_step,
        *page_table.shape, k_pool.shape[0], k_pool.shape[2], k_new.shape[2],
    )  # fmt: skip


def launched(*tensors: torch.Tensor | None) -> bool:
    """Append on the current stream, if the kernel runs here and takes these tensors; the order is that of `takes`."""
    k_new, _, k_pool, _, _, _, _, _, key_bounds = tensors
    if not runs_ours(k_pool.device):
        return False
    device = k_pool.device.index
    stream = current_stream(device)

    def make() -> tuple[PreparedLaunch, PreparedLaunch] | None:
        if not takes(*tensors):
            return None
        kernel = loaded(KERNEL, k_pool.shape[3], k_pool.dtype, device, None)
        if kernel is None:
            return None
        num_rows, heads, tokens = k_new.shape[:3]
        grids = {KERNEL: (query_pages(tokens, k_pool.shape[2]), heads, num_rows), f"{KERNEL}_advance": (num_rows, 1, 1)}
        write, advance = (
            PreparedLaunch(entry_point(kernel, entry, device), kernel, blocks, [packed(*tensors)], stream)
            for entry, blocks in grids.items()
        )
        return write, advance

    launches = kept((KERNEL, version(KERNEL), device, stream, *map(facts_of, tensors)), make)
    for launch in launches or ():
        launch.launch()
    return launches is not None
