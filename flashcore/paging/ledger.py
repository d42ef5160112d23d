"""The host's books of a page pool: who holds which page. Plain numbers, no tensor and no GPU.

Every method plans first and changes nothing until the plan is known to fit, so that an error leaves the books as they
were. What the page table on the device has to learn comes back as a `Changes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flashcore.errors import PageTableError, PoolExhausted, SequenceGone, SequenceTooLong

DROPPED = -1
"""In a page table: no page here, because it was dropped or never given."""

_serial = itertools.count(1)


@dataclass(frozen=True)
class SequenceHandle:
    """One sequence of one cache. A handle is never given twice, so that one kept after `free` is told from the next."""

    row: int
    """The sequence's row in `page_table`, `lengths`, and in the batch of queries."""
    serial: int

    def __str__(self) -> str:
        return f"Sequence {self.serial} (row {self.row})"


@dataclass(frozen=True)
class Changes:
    """What a plan changes on the device."""

    entries: list[tuple[int, int, int]] = field(default_factory=list)
    """(row, column, page) to write into the page table."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(from page, to page): contents to copy before anything is written."""


@dataclass(eq=False)
class Row:
    """The books of one sequence."""

    handle: SequenceHandle
    length: int = 0
    pages: list[int] = field(default_factory=list)
    """Pool page of each logical page, `DROPPED` for a hole; may run ahead of `length` by pages reserved."""


class PageLedger:
    """Reference counts, the free list, and each sequence's pages and length.

    Held at all times: the reference count of a page is the number of its uses in all rows; a page is free or used and
    never both; the page of a sequence's last token is never a hole; pages that hold no token yet belong to one row.
    """

    def __init__(self, *, num_pages: int, page_size: int, batch: int, max_pages: int):
        self.num_pages, self.page_size, self.batch, self.max_pages = num_pages, page_size, batch, max_pages
        self.references = [0] * num_pages
        self.free_pages = list(range(num_pages - 1, -1, -1))  # the lowest page goes out first
        self.rows: list[Row | None] = [None] * batch

    def live(self) -> list[SequenceHandle]:
        """Handles of all sequences, by row."""
        return [row.handle for row in self.rows if row is not None]

    def row(self, sequence: SequenceHandle) -> Row:
        """The books of one sequence; raises `SequenceGone` when it was freed or is another cache's."""
        known = isinstance(sequence, SequenceHandle) and 0 <= sequence.row < self.batch
        row = self.rows[sequence.row] if known else None
        if row is None or row.handle != sequence:
            raise SequenceGone(str(sequence))
        return row

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // self.page_size)

    def _free_row(self) -> int:
        for index, row in enumerate(self.rows):
            if row is None:
                return index
        raise PoolExhausted(
            "rows of the page table", 1, 0, self.batch, "free a sequence, or make the cache with a larger batch"
        )

    def add(self) -> SequenceHandle:
        """Begin an empty sequence."""
        handle = SequenceHandle(self._free_row(), next(_serial))
        self.rows[handle.row] = Row(handle)
        return handle

    def reserve(self, rows: Sequence[Row], tokens: Sequence[int]) -> Changes:
        """See to it that each sequence can write its next `tokens`: fresh pages, and a copy of a shared partial page.

        Of several sequences that share a partial page and all write, the last one keeps it and the others get copies.
        """
        changes, taken, released = Changes(), 0, {}
        for row, count in zip(rows, tokens, strict=True):
            length, wanted, index = row.length + count, self.pages_for(row.length + count), row.handle.row
            if wanted > self.max_pages:
                fix = "make the cache with a larger max_pages, or begin another sequence"
                raise SequenceTooLong(index, length, self.max_pages * self.page_size, fix)
            writes_into = row.length // self.page_size
            if count and row.length % self.page_size:
                page = row.pages[writes_into]
                if self.references[page] - released.get(page, 0) > 1:
                    released[page] = released.get(page, 0) + 1
                    changes.entries.append((index, writes_into, taken))
                    changes.copies.append((page, taken))
                    taken += 1
            for column in range(len(row.pages), wanted):
                changes.entries.append((index, column, taken))
                taken += 1
        if taken > len(self.free_pages):
            fix = "free or drop what is not needed, or make the cache with more num_pages"
            raise PoolExhausted("pages", taken, len(self.free_pages), self.num_pages, fix)
        # The plan fits. Up to here pages were numbered 0, 1, 2, ... in the order in which they are now taken.
        pages = [self.free_pages.pop() for _ in range(taken)]
        entries = [(index, column, pages[nth]) for index, column, nth in changes.entries]
        for index, column, page in entries:
            self.references[page] = 1
            held = self.rows[index].pages
            if column < len(held):
                self.references[held[column]] -= 1
                held[column] = page
            else:
                held.append(page)
        return Changes(entries, [(source, pages[nth]) for source, nth in changes.copies])

    def advance(self, rows: Sequence[Row], tokens: Sequence[int]) -> None:
        """Count tokens that were written into pages reserved before."""
        for row, count in zip(rows, tokens, strict=True):
            capacity = len(row.pages) * self.page_size
            if row.length + count > capacity:
                fix = "call reserve() before the tokens are written"
                raise SequenceTooLong(row.handle.row, row.length + count, capacity, fix)
            first = row.length // self.page_size
            if count and self.references[row.pages[first]] > 1:
                raise PageTableError(
                    f"{row.handle} wrote to page {row.pages[first]} after a fork had shared it; "
                    "call reserve() again after a fork, before the next tokens are written."
                )
        for row, count in zip(rows, tokens, strict=True):
            row.length += count

    def fork(self, sequence: SequenceHandle, tokens: int | None = None) -> SequenceHandle:
        """A new sequence that shares the pages of the first `tokens` tokens (all of them when None)."""
        parent = self.row(sequence)
        tokens = parent.length if tokens is None else tokens
        self._require_prefix(parent, tokens)
        child = Row(SequenceHandle(self._free_row(), next(_serial)), tokens, parent.pages[: self.pages_for(tokens)])
        for page in child.pages:
            if page != DROPPED:
                self.references[page] += 1
        self.rows[child.handle.row] = child
        return child.handle

    def _require_prefix(self, row: Row, tokens: int) -> None:
        if not 0 <= tokens <= row.length:
            raise PageTableError(f"{row.handle} has {row.length} tokens; its first {tokens} cannot be kept.")
        if tokens and row.pages[(tokens - 1) // self.page_size] == DROPPED:
            raise PageTableError(
                f"{row.handle} has dropped the page of token {tokens - 1}, and a sequence's last page has to be "
                "there; choose a length that ends in a page that is."
            )

    def _release(self, pages: Iterable[int]) -> int:
        """Give up one use of each page; returns how many became free."""
        before = len(self.free_pages)
        for page in pages:
            if page != DROPPED:
                self.references[page] -= 1
                if self.references[page] == 0:
                    self.free_pages.append(page)
        return len(self.free_pages) - before

    def free(self, sequence: SequenceHandle) -> int:
        """End a sequence; returns how many pages became free (those that no other sequence shares)."""
        row = self.row(sequence)
        self.rows[sequence.row] = None
        return self._release(row.pages)

    def truncate(self, sequence: SequenceHandle, length: int) -> list[int]:
        """Forget the tokens from `length` on, and reserved pages; returns the columns of the table given up."""
        row = self.row(sequence)
        self._require_prefix(row, length)
        kept = self.pages_for(length)
        columns = list(range(kept, len(row.pages)))
        self._release(row.pages[kept:])
        del row.pages[kept:]
        row.length = length
        return columns

    def drop(self, sequence: SequenceHandle, pages: Iterable[int]) -> list[int]:
        """Give up whole logical pages and leave holes; returns those that were not holes yet."""
        row = self.row(sequence)
        wanted = sorted(set(pages))
        last = (row.length - 1) // self.page_size  # -1 for an empty sequence
        bad = [page for page in wanted if not 0 <= page < last]
        if bad:
            raise PageTableError(
                f"{sequence} cannot drop page {bad[0]}: it has {last + 1} pages and keeps the last one, "
                f"so that pages 0 to {last - 1} can go; free() or truncate() takes the end."
                if last > 0
                else f"{sequence} cannot drop page {bad[0]}: it has {last + 1} pages and keeps the last one."
            )
        columns = [page for page in wanted if row.pages[page] != DROPPED]
        self._release(row.pages[page] for page in columns)
        for page in columns:
            row.pages[page] = DROPPED
        return columns
