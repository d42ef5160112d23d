"""A K/V cache in pages that owns them: append, fork, free, drop, truncate. Books on the host, data on the device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from flashcore.errors import InvalidProblem, PageTableError, PagingError
from flashcore.numerics import ambient, plain
from flashcore.paging.arguments import (
    check_new,
    check_rows,
    checked_device,
    checked_sizes,
    counts_of,
    listed,
    rows_given,
    whole,
)
from flashcore.paging.bounds import empty_bounds
from flashcore.paging.checks import can_read_back, debugging
from flashcore.paging.ledger import DROPPED, Changes, PageLedger, Row, SequenceHandle
from flashcore.paging.stats import CacheStats, stats_of
from flashcore.paging.tables import PagedKV
from flashcore.paging.writing import copy_pages, write_tokens


def in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a cache that one thread is in at a time: it finds the books as they are between two others."""

    @functools.wraps(method)
    def alone(self, *args, **kwargs):
        with self._turn:
            return method(self, *args, **kwargs)

    return alone


class PagedKVCache(PagedKV):
    """Pages for the keys and values of up to `batch` sequences, given out as the sequences grow.

    The host keeps the books and never reads from the device; what it decides reaches the page table by small
    asynchronous copies in the order of torch's current stream. Use one stream, or order several yourself. Threads may
    share a cache, each with sequences of its own: calls on the books come one after the other, and each is whole.

    `append` is `reserve` (the host finds pages), `write` (the device stores) and `advance` (the host counts). To decode
    under CUDA graphs, capture ``cache.write(k, v)`` with the rest of the step, and around each replay call
    ``cache.reserve(1)`` and ``cache.advance(1)``.

    Parameters
    ----------
    num_pages
        Pages in the pool, at most 2**31 - 1.
    batch
        Rows of the page table: sequences alive at once.
    num_heads_kv, head_dim
        Of K and V alike.
    max_pages
        Columns of the page table: pages of the longest sequence. None for `num_pages`.
    page_size
        Tokens in a page: 16, 32, 64, 128 or 256.
    dtype
        ``torch.float16`` or ``torch.bfloat16``.
    device
        Where pools and tables are made. On ``meta`` the books are real and the data is not there; without a GPU pass
        ``"cpu"``.
    key_bounds
        Keep each page's key bounds, which `TopK` needs; they take ``1 / page_size`` of the pools' bytes.

    Raises
    ------
    InvalidProblem
        A size, page_size or dtype that no cache has, or a device that is not here.
    """

    @ambient.judging
    def __init__(
        self,
        *,
        num_pages: int,
        batch: int,
        num_heads_kv: int,
        head_dim: int,
        max_pages: int | None = None,
        page_size: int = 128,
        dtype: torch.dtype = torch.float16,
        device: str | torch.device = "cuda",
        key_bounds: bool = True,
    ):
        max_pages = num_pages if max_pages is None else max_pages
        sizes = {"num_pages": num_pages, "batch": batch, "num_heads_kv": num_heads_kv, "head_dim": head_dim,
                 "max_pages": max_pages}  # fmt: skip
        num_pages, batch, num_heads_kv, head_dim, max_pages, page_size = checked_sizes(sizes, page_size, dtype)
        device, key_bounds = checked_device(device), plain.flag("key_bounds", key_bounds)
        pools = [
            torch.zeros(num_pages, num_heads_kv, page_size, head_dim, dtype=dtype, device=device) for _ in range(2)
        ]
        # Zeros, not whatever lay there: the rest of a partial page is multiplied by probability 0, and 0 * NaN is NaN.
        device = pools[0].device
        bounds = empty_bounds(num_pages, num_heads_kv, head_dim, dtype, device) if key_bounds else None
        page_table = torch.full((batch, max_pages), DROPPED, dtype=torch.int32, device=device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        super().__init__(*pools, page_table, lengths, key_bounds=bounds, lengths_fit=True)
        self._ledger = PageLedger(num_pages=num_pages, page_size=page_size, batch=batch, max_pages=max_pages)
        self._rows: tuple[tuple[int, ...], torch.Tensor] | None = None  # the last rows asked for, on the device
        self._turn = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}  # a copy has one of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._turn = threading.RLock()

    # --- the books, on the host ------------------------------------------------------------------------------------

    @property
    def sequences(self) -> list[SequenceHandle]:
        """All sequences alive, by row."""
        return self._ledger.live()

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, from the host's books."""
        return max((row.length for row in self._ledger.rows if row is not None), default=0)

    def length(self, sequence: SequenceHandle) -> int:
        """Tokens of one sequence, dropped ones included."""
        return self._ledger.row(sequence).length

    def pages(self, sequence: SequenceHandle) -> list[int]:
        """Pool page of each logical page of one sequence, reserved ones included, -1 where it was dropped."""
        return list(self._ledger.row(sequence).pages)

    @in_turn
    def stats(self) -> CacheStats:
        """Pages, tokens and bytes as the books have them. Does not touch the device."""
        return stats_of(self, self._ledger)

    # --- sequences -------------------------------------------------------------------------------------------------

    @in_turn
    def add(self) -> SequenceHandle:
        """Begin an empty sequence in the first free row; raises `PoolExhausted` when there is none."""
        return self._ledger.add()

    @in_turn
    def fork(self, sequence: SequenceHandle, tokens: int | None = None) -> SequenceHandle:
        """Begin a sequence with the first `tokens` tokens of another (all when None), sharing their pages.

        No page is taken until one of them writes into the partial last page, which it then copies first.

        Raises
        ------
        SequenceGone, PoolExhausted, PageTableError
            The sequence was freed; no free row; it has fewer tokens, or has dropped the last page of that prefix.
        """
        tokens = None if tokens is None else whole("tokens", tokens)
        child = self._ledger.fork(sequence, tokens)
        row = self._ledger.row(child)
        columns = len(row.pages)
        self.page_table[child.row, :columns].copy_(self.page_table[sequence.row, :columns])
        self.lengths[child.row].fill_(row.length)
        self._check_if_debugging()
        return child

    @in_turn
    def free(self, sequence: SequenceHandle) -> int:
        """End a sequence and return how many pages became free: those that no other sequence shares."""
        freed = self._ledger.free(sequence)
        self.page_table[sequence.row].fill_(DROPPED)
        self.lengths[sequence.row].zero_()
        self._check_if_debugging()
        return freed

    @in_turn
    def drop(self, sequence: SequenceHandle, pages: Iterable[int]) -> None:
        """Give up whole logical pages, first ones or any in the middle, as a sliding window or eviction does.

        Attention passes over their keys from then on; positions and `length` stay. The page of the last token stays.
        A CUDA graph that was captured before the first drop has to know of it: see `PagedKV.holes`.
        Pages already dropped are passed over, so that a window may drop ``range(n)`` at each step.

        Raises
        ------
        SequenceGone, PageTableError
            The sequence was freed; a page that it does not have, or its last one.
        """
        columns = self._ledger.drop(sequence, [whole("a page", page) for page in listed("pages", pages)])
        self.holes = self.holes or bool(columns)
        self._set_entries([(sequence.row, column, DROPPED) for column in columns])
        self._check_if_debugging()

    @in_turn
    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        """Forget the tokens from `length` on, as when guessed tokens are refused; gives up reserved pages too."""
        columns = self._ledger.truncate(sequence, whole("length", length))
        if columns:
            self.page_table[sequence.row, columns[0] : columns[-1] + 1].fill_(DROPPED)
        self.lengths[sequence.row].fill_(length)
        self._check_if_debugging()

    # --- tokens ----------------------------------------------------------------------------------------------------

    @in_turn
    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequence[SequenceHandle] | None = None,
        *,
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Write each sequence's next keys and values: a whole prompt, or one token.

        Parameters
        ----------
        k, v
            ``[sequences, num_heads_kv, tokens, head_dim]``, dtype and device of the cache, any strides. They stay on
            the device.
        sequences
            Whose rows they are; None for all alive, by row.
        tokens
            How many tokens of each row are real when prompts differ in length (the rest is padding at the end); None
            for all.

        Raises
        ------
        PoolExhausted, SequenceTooLong, SequenceGone, InvalidProblem
            Too few free pages; too long for the page table; a freed sequence; tensors that do not fit. Then nothing
            has changed.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise PagingError("append() keeps books on the host, which a CUDA graph would not replay; capture write().")
        books = self._books(sequences)
        check_new(k, v, self, len(books))
        counts = counts_of(k.shape[2] if tokens is None else tokens, len(books))
        if max(counts) > k.shape[2]:
            raise InvalidProblem(f"tokens asks for {max(counts)} tokens of a row, and k and v hold {k.shape[2]}.")
        self._commit(self._ledger.reserve(books, counts))
        in_order = len(books) == self.batch and books == self._ledger.rows
        self.write(
            k,
            v,
            rows=None if in_order else self._rows_of(books),
            counts=None if tokens is None else self._upload(counts),
        )
        self._ledger.advance(books, counts)
        self._check_if_debugging()

    @in_turn
    def reserve(self, tokens: int | Sequence[int], sequences: Sequence[SequenceHandle] | None = None) -> None:
        """Give each sequence the pages for its next `tokens` tokens, and its own copy of a shared partial last page.

        Touches the device only when a page is needed: for one token each, once in `page_size` steps.
        """
        books = self._books(sequences)
        self._commit(self._ledger.reserve(books, counts_of(tokens, len(books))))

    def write(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        rows: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> None:
        """The device's part of `append` alone: into reserved pages, and on to `lengths`. Can be captured in a graph.

        The books do not change until `advance` is called.

        Parameters
        ----------
        k, v
            ``[rows, num_heads_kv, tokens, head_dim]``.
        rows, counts
            Integer tensors on the device, which a captured graph goes on reading: whose rows they are (None for all
            `batch` of them; one without a sequence is passed over), and how many tokens of each are real (None: all).
        """
        num_rows = rows_given(rows, self.batch)
        check_new(k, v, self, num_rows)
        check_rows(rows, counts, num_rows, self.device)
        write_tokens(k, v, self.k_pool, self.v_pool, self.page_table, self.lengths,
                      rows=rows, counts=counts, key_bounds=self.key_bounds)  # fmt: skip

    @in_turn
    def advance(self, tokens: int | Sequence[int], sequences: Sequence[SequenceHandle] | None = None) -> None:
        """Enter into the books what `write` wrote, after it or after a replay of the graph that holds it.

        Raises
        ------
        SequenceTooLong, PageTableError
            The tokens had no reserved page, or went to a page that a fork had come to share.
        """
        books = self._books(sequences)
        self._ledger.advance(books, counts_of(tokens, len(books)))

    # --- reading ---------------------------------------------------------------------------------------------------

    @in_turn
    def view(self, sequences: Sequence[SequenceHandle]) -> PagedKV:
        """Some sequences, in this order, to attend to: the same pages, a copy of their rows of table and lengths."""
        books = self._books(sequences)
        rows, longest = self._rows_of(books), max(row.length for row in books)
        return PagedKV(self.k_pool, self.v_pool, self.page_table[rows], self.lengths[rows],
                       key_bounds=self.key_bounds, max_length=longest, lengths_fit=True, holes=self.holes)  # fmt: skip

    @in_turn
    def check(self, tokens: int = 0) -> None:
        """As `PagedKV.check`; and the tables on the device say what the books say. Waits for the device."""
        super().check(tokens)
        if not can_read_back(self.device):
            return
        table, lengths = self.page_table.tolist(), self.lengths.tolist()
        for index, row in enumerate(self._ledger.rows):
            length, pages = (row.length, row.pages) if row else (0, [])
            if lengths[index] != length:
                raise PageTableError(
                    f"lengths[{index}] is {lengths[index]} on the device and {length} in the cache's books; "
                    "after each write() or replay of a graph that holds one, call advance()."
                )
            if table[index] != pages + [DROPPED] * (self.max_pages - len(pages)):
                raise PageTableError(
                    f"page_table[{index}] on the device is not what the cache's books say; nothing but the cache may "
                    "write to it."
                )

    # --- details ---------------------------------------------------------------------------------------------------

    def _check_if_debugging(self) -> None:
        if debugging():
            self.check()

    def _books(self, sequences: Sequence[SequenceHandle] | None) -> list[Row]:
        """The books of the sequences meant, each once; of all alive, by row, when None."""
        if sequences is None:
            books = [row for row in self._ledger.rows if row is not None]
        else:
            books = [self._ledger.row(sequence) for sequence in listed("sequences", sequences)]
            indices = [row.handle.row for row in books]
            if len(set(indices)) != len(indices):
                twice = next(row.handle for row in books if indices.count(row.handle.row) > 1)
                raise InvalidProblem(f"{twice} is given twice; each sequence can have one row of k and v.")
        if not books:
            raise InvalidProblem("No sequence was given, or none is alive; begin one with add().")
        return books

    def _upload(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        """int64 on the device. The staging memory is pinned and torch's own: it is not used again before the copy."""
        host = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
        if self.device.type == "cuda":
            return host.pin_memory().to(self.device, non_blocking=True)
        return host.to(self.device)

    def _rows_of(self, books: list[Row]) -> torch.Tensor:
        """Rows on the device; kept, since decoding asks for the same ones token after token."""
        rows = tuple(row.handle.row for row in books)
        if self._rows is None or self._rows[0] != rows:
            self._rows = (rows, self._upload(rows))
        return self._rows[1]

    def _set_entries(self, entries: list[tuple[int, int, int]]) -> None:
        if entries:
            row, column, page = self._upload(np.array(entries).T)
            self.page_table[row, column] = page.to(torch.int32)

    def _commit(self, changes: Changes) -> None:
        self._set_entries(changes.entries)
        if changes.copies:
            source, target = self._upload(np.array(changes.copies).T)
            copy_pages(self.pools(), source, target)

    def pools(self) -> list[torch.Tensor]:
        """All that a page consists of: what is copied when a shared page is written to."""
        return [self.k_pool, self.v_pool] + ([] if self.key_bounds is None else [self.key_bounds])
