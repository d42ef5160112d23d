"""What callers may pass to a paged cache, and the one sentence they get when they pass something else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.numerics import plain
from flashcore.paging._pages import Pages

DTYPES = (torch.float16, torch.bfloat16)
PAGE_SIZES = (16, 32, 64, 128, 256)
"""Tokens in a page. Powers of two, so that a position splits into page and offset by a shift and a mask."""


def whole(name: str, value) -> int:
    """`value` as an int of at least 0."""
    number = plain.integer(name, value)
    if number < 0:
        raise InvalidProblem(f"{name} is {number}; it has to be at least 0.")
    return number


def counts_of(tokens: int | Sequence[int], num_sequences: int) -> list[int]:
    """One count for each sequence, from one for all or a list."""
    if not hasattr(tokens, "__iter__") or (isinstance(tokens, (torch.Tensor, np.ndarray)) and tokens.ndim == 0):
        return [whole("tokens", tokens)] * num_sequences
    counts = [whole("tokens", count) for count in tokens]
    if len(counts) != num_sequences:
        raise InvalidProblem(f"tokens has {len(counts)} numbers for {num_sequences} sequences.")
    return counts


def checked_sizes(sizes: dict[str, object], page_size, dtype) -> tuple[int, ...]:
    """Sizes that a cache can be made with as ints of Python's own, `page_size` last; `InvalidProblem` for any other."""
    found = []
    for name, value in sizes.items():
        number = plain.integer(name, value)
        if not 0 < number < 2**31:
            raise InvalidProblem(f"{name} is {number}; it has to be a whole number from 1 to 2**31 - 1.")
        found.append(number)
    size = plain.integer("page_size", page_size)
    if size not in PAGE_SIZES:
        raise InvalidProblem(f"page_size is {size}; it has to be one of {', '.join(map(str, PAGE_SIZES))}.")
    if dtype not in DTYPES:
        raise InvalidProblem(f"dtype is {dtype}; a cache holds {' or '.join(map(str, DTYPES))}.")
    return *found, size


def listed(name: str, values) -> list:
    """The values as a list; `InvalidProblem` for one value alone."""
    try:
        return list(values)
    except TypeError:
        raise InvalidProblem(f"{name} is {plain.shown(values)}; pass a list.") from None


def checked_device(device) -> torch.device:
    """A device that is here, as torch numbers it; `InvalidProblem` for any other."""
    try:
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, TypeError):  # by release and by what is missing
        named = str(device) if isinstance(device, torch.device) else device
        if str(named).startswith("cuda") and not torch.cuda.is_available():
            raise InvalidProblem(
                f"device is {named!r}, and no CUDA GPU is visible to torch; pass device='cpu', or run on a machine "
                "with an NVIDIA GPU and a CUDA build of torch."
            ) from None
        raise InvalidProblem(f"device is {named!r}, which is not here; pass 'cpu', 'cuda' or 'meta'.") from None


def check_new(k, v, kv: Pages, num_sequences: int) -> None:
    """Raise `InvalidProblem` unless k and v are ``[num_sequences, num_heads_kv, tokens, head_dim]`` for these pools."""
    for name, new in (("k", k), ("v", v)):
        if not isinstance(new, torch.Tensor) or new.dtype != kv.dtype or new.device != kv.device:
            found = f"{new.dtype} on {new.device}" if isinstance(new, torch.Tensor) else type(new).__name__
            raise InvalidProblem(f"{name} is {found}, and the cache is {kv.dtype} on {kv.device}.")
        wanted = (num_sequences, kv.num_heads_kv, k.shape[2] if k.dim() == 4 else 0, kv.head_dim)
        if tuple(new.shape) != wanted or wanted[2] == 0:
            raise InvalidProblem(
                f"{name} is {list(new.shape)}; it has to be [{num_sequences} sequences, {kv.num_heads_kv} heads, "
                f"tokens, {kv.head_dim}], with as many tokens, at least one, in k as in v."
            )


def rows_given(rows, batch: int) -> int:
    """Rows of new keys that `rows` asks for: all `batch` of them when it is None. `check_rows` checks the rest."""
    if rows is None:
        return batch
    if not isinstance(rows, torch.Tensor) or rows.dim() != 1:
        raise InvalidProblem(f"rows is {plain.shown(rows)}; it has to be an integer tensor [rows].")
    return rows.shape[0]


def check_rows(rows, counts, num_rows: int, device: torch.device) -> None:
    """Raise `InvalidProblem` unless each is None or an integer tensor ``[num_rows]`` on `device`; nothing is read."""
    for name, tensor in (("rows", rows), ("counts", counts)):
        if tensor is None:
            continue
        whole = isinstance(tensor, torch.Tensor) and not (tensor.is_floating_point() or tensor.is_complex())
        if not whole or tensor.dtype == torch.bool or tuple(tensor.shape) != (num_rows,):
            raise InvalidProblem(f"{name} is {plain.shown(tensor)}; it has to be an integer tensor [{num_rows}].")
        if tensor.device != device:
            raise InvalidProblem(f"{name} lies on {tensor.device}, and the pools on {device}; move it there.")


def check_row_numbers(rows: torch.Tensor | None, counts: torch.Tensor | None, batch: int, tokens: int) -> None:
    """Raise `InvalidProblem` for a row that is there twice, or for more tokens of a row than there are. Reads them.

    A row that is not in the table is passed over by whatever writes, and may be there any number of times.
    """
    given = [] if rows is None else [row for row in rows.tolist() if 0 <= row < batch]
    if len(set(given)) < len(given):
        twice = next(row for row in given if given.count(row) > 1)
        raise InvalidProblem(f"rows has {twice} twice; each sequence can have one row of k and v.")
    for nth, count in enumerate([] if counts is None else counts.tolist()):
        if not 0 <= count <= tokens:
            raise InvalidProblem(f"counts[{nth}] is {count}; it has to be from 0 to the {tokens} tokens of k and v.")


def check_query(q, kv: Pages) -> None:
    """Raise `InvalidProblem` unless `q` is ``[batch, num_heads_q, q_tokens, head_dim]`` for these tables."""
    if not isinstance(q, torch.Tensor) or q.dim() != 4 or 0 in q.shape:
        shape = list(q.shape) if isinstance(q, torch.Tensor) else type(q).__name__
        raise InvalidProblem(f"q is {shape}; it has to be a tensor [batch, num_heads_q, q_tokens, head_dim].")
    if q.device != kv.device or q.dtype != kv.dtype:
        raise InvalidProblem(f"q is {q.dtype} on {q.device}, and the cache is {kv.dtype} on {kv.device}.")
    if q.shape[0] != kv.batch or q.shape[3] != kv.head_dim:
        raise InvalidProblem(
            f"q has batch {q.shape[0]} and head_dim {q.shape[3]}, and the cache has {kv.batch} and "
            f"{kv.head_dim}; for some of a cache's sequences, pass cache.view(sequences)."
        )
    heads_q, heads_kv = q.shape[1], kv.num_heads_kv
    if heads_q % heads_kv:
        raise InvalidProblem(f"num_heads_q ({heads_q}) must be a multiple of num_heads_kv ({heads_kv}).")


def check_pools(k_pool, v_pool) -> None:
    """Raise `PageTableError` unless these are two pools alike, of four dimensions and a dtype that a cache holds."""
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if not isinstance(pool, torch.Tensor) or pool.dim() != 4 or 0 in pool.shape:
            shape = list(pool.shape) if isinstance(pool, torch.Tensor) else type(pool).__name__
            raise PageTableError(f"{name} is {shape}; it has to be a tensor of four dimensions, none of them empty.")
        if pool.dtype not in DTYPES:
            raise PageTableError(f"{name} is {pool.dtype}; a cache holds {' or '.join(map(str, DTYPES))}.")
        if pool.stride(3) != 1:
            raise PageTableError(f"The last dimension of {name} is not contiguous; head_dim has to lie together.")
    if k_pool.shape != v_pool.shape or k_pool.dtype != v_pool.dtype or k_pool.device != v_pool.device:
        raise PageTableError(
            f"k_pool is {k_pool.dtype} {list(k_pool.shape)} on {k_pool.device} and v_pool is {v_pool.dtype} "
            f"{list(v_pool.shape)} on {v_pool.device}; they have to be alike."
        )


def check_table(page_table, lengths, device: torch.device) -> None:
    """Raise `PageTableError` unless these are int32 ``[batch, max_pages]`` and ``[batch]`` on `device`."""
    for name, tensor, dims in (("page_table", page_table, 2), ("lengths", lengths, 1)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != dims or math.prod(tensor.shape) == 0:
            shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            wanted = "[batch, max_pages]" if dims == 2 else "[batch]"
            raise PageTableError(f"{name} is {shape}; it has to be a tensor {wanted}.")
        if tensor.dtype != torch.int32:
            raise PageTableError(f"{name} is {tensor.dtype}; convert it with {name}.to(torch.int32).")
        if tensor.device != device:
            raise PageTableError(f"{name} lies on {tensor.device} and the pools on {device}; move it there.")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise PageTableError(f"{name} has stride {tensor.stride(-1)} in its last dimension; pass a contiguous one.")
    if page_table.shape[0] != lengths.shape[0]:
        raise PageTableError(
            f"page_table has {page_table.shape[0]} rows and lengths has {lengths.shape[0]}; they have to be the same."
        )
