"""Read a table of pages that a call attends to, and say which call covers which sequences."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from flashcore.errors import PageTableError
from flashcore.problem import Problem

END = -1
"""Ends a row of a table: what follows it is not read, so that sequences of a batch may have different many pages."""
PageTable = Sequence[int] | torch.Tensor
"""Page indices for all sequences, or an integer tensor ``[batch, max_pages]`` with a row for each."""


class Page(NamedTuple):
    """A piece of K and V that one step of the page loop takes."""

    first_key: int
    """The row of K that it begins with, and of V unless `first_value` says otherwise."""
    keys: int
    position: int
    """Of its first key among the keys that the causal mask and a trace count."""
    first_value: int | None = None
    """The row of V that it begins with, where V's pages lie in another order than K's."""


class Part(NamedTuple):
    """Sequences that attend to the same pages, as a problem of their own."""

    sequences: slice
    problem: Problem
    pages: tuple[int, ...]
    """Page indices in order of visit."""


def page_at(index: int, problem: Problem, page_size: int) -> Page:
    """Page `index` of a problem's keys: `page_size` of them, or fewer where the keys end."""
    first_key = index * page_size
    return Page(first_key, min(page_size, problem.seqlen_k - first_key), first_key)


def read_page_table(table: PageTable, problem: Problem, page_size: int) -> list[tuple[int, ...]]:
    """The pages of each sequence, checked, in the order of the table.

    A tensor on a GPU is read to the host, which waits for what was launched before.

    Raises
    ------
    PageTableError
        The table has another shape or is none of integers, names a page that does not exist, or lies on a GPU while
        its stream is being captured into a CUDA graph.
    """
    if isinstance(table, torch.Tensor):
        rows = _rows_of(table, problem.batch)
    else:
        try:
            rows = [[operator.index(page) for page in table]] * problem.batch
        except TypeError:
            raise PageTableError(
                "A page table is a list of page indices for all sequences, or an int32 tensor [batch, max_pages]; "
                f"this one is a {type(table).__name__} that holds something else."
            ) from None
    num_pages = -(-problem.seqlen_k // page_size)
    found = []
    for sequence, row in enumerate(rows):
        row = row[: row.index(END)] if END in row else row
        for place, page in enumerate(row):
            if not 0 <= page < num_pages:
                raise PageTableError(
                    f"The page table names page {page} for sequence {sequence}, place {place}; {problem.seqlen_k} keys "
                    f"make {num_pages} pages of {page_size}, so give 0 to {num_pages - 1}, or {END} to end the row."
                )
        found.append(tuple(row))
    return found


def _rows_of(table: torch.Tensor, batch: int) -> list[list[int]]:
    """A tensor's rows, one a sequence."""
    whole = not (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool)
    if table.dim() != 2 or table.shape[0] != batch or not whole:
        raise PageTableError(
            f"A page table is an integer tensor [batch, max_pages] with batch {batch}; "
            f"this one is {table.dtype} {list(table.shape)}."
        )
    if table.is_cuda and torch.cuda.is_current_stream_capturing():
        raise PageTableError(
            "The page table lies on the GPU and has to be read to the host, which a CUDA graph cannot capture; "
            "give the table as a CPU tensor or a list."
        )
    return table.tolist()


def parts(table: PageTable, problem: Problem, page_size: int) -> Iterator[Part]:
    """The calls that cover a batch: one when all sequences have the same pages, otherwise one for each.

    Raises
    ------
    PageTableError
        See `read_page_table`.
    """
    tables = read_page_table(table, problem, page_size)
    if len(set(tables)) == 1:
        yield Part(slice(0, problem.batch), problem, tables[0])
        return
    one = problem.with_(batch=1)
    for sequence, pages in enumerate(tables):
        yield Part(slice(sequence, sequence + 1), one, pages)
