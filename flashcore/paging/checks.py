"""Read tables back from the device and name the first thing in them that is wrong."""

from __future__ import annotations

import os

import torch

from flashcore.errors import PagesOverlap, PageTableError, SequenceTooLong
from flashcore.paging._pages import Pages
from flashcore.paging.ledger import DROPPED


def debugging() -> bool:
    """Whether FLASHCORE_DEBUG=1 asks for tables to be read back and checked at every step."""
    return os.environ.get("FLASHCORE_DEBUG", "") not in ("", "0")


def can_read_back(device: torch.device) -> bool:
    """Whether values can be fetched now: not from `meta`, nor while a CUDA graph is being captured."""
    return device.type != "meta" and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def check_tables(kv: Pages, tokens: int | torch.Tensor = 0) -> None:
    """See `PagedKV.check`; `tokens` may also be ``[batch]``. One wait for the device when all is well."""
    if not can_read_back(kv.device):
        return
    lengths, table = kv.lengths.long(), kv.page_table.long()
    capacity = kv.max_pages * kv.page_size
    columns = torch.arange(kv.max_pages, device=kv.device)
    used = columns < kv.used_pages()[:, None]

    bad_length = (lengths < 0) | (lengths + tokens > capacity)
    outside = used & ((table < DROPPED) | (table >= kv.num_pages))
    # Pages that hold any position from the length on, up to the last token: none where there are no tokens.
    begins = columns * kv.page_size
    written = (begins + kv.page_size > lengths[:, None]) & (begins < (lengths + tokens)[:, None])
    without_sequence = (lengths == 0) & (table[:, 0] == DROPPED)  # passed over by whatever writes
    written &= (torch.as_tensor(tokens, device=kv.device) > 0).expand(kv.batch)[:, None] & ~without_sequence[:, None]
    missing = written & ((table < 0) | (table >= kv.num_pages))
    named = (used | written) & (table >= 0) & (table < kv.num_pages)
    counts = torch.zeros(kv.num_pages, dtype=torch.int64, device=kv.device)
    uses = counts.index_add_(0, table.clamp(0, kv.num_pages - 1).flatten(), named.flatten().long())
    uses = uses[table.clamp(0, kv.num_pages - 1)]
    overlapping = written & named & (uses > 1)

    # A length that is wrong makes nonsense of the rest, so the order of the questions matters.
    problems = torch.stack([bad_length.any(), outside.any(), missing.any(), overlapping.any()]).tolist()
    if problems[0]:
        row = _first(bad_length)[0]
        needed = int(lengths[row] + tokens[row] if isinstance(tokens, torch.Tensor) else lengths[row] + tokens)
        fix = "each length has to be at least 0, and within the table together with what is to be written"
        raise SequenceTooLong(row, needed, capacity, fix)
    if problems[1]:
        row, column = _first(outside)
        raise PageTableError(
            f"page_table[{row}, {column}] is {int(table[row, column])} and the pool has pages 0 to {kv.num_pages - 1}; "
            "write a page of the pool there, or -1 for a page that was dropped."
        )
    if problems[2]:
        row, column = _first(missing)
        raise PageTableError(
            f"page_table[{row}, {column}] is {int(table[row, column])}, and row {row} writes its next tokens there; "
            "reserve pages for them first."
        )
    if problems[3]:
        row, column = _first(overlapping)
        raise PagesOverlap(row, int(table[row, column]), int(uses[row, column]))


def _first(mask: torch.Tensor) -> list[int]:
    """Coordinates of the first True."""
    return mask.nonzero()[0].tolist()
