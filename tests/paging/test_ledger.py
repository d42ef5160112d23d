"""The books of a page pool: who holds which page after each call, and that an error leaves them as they were."""

from __future__ import annotations

import pytest

from flashcore.errors import PageTableError, PoolExhausted, SequenceGone, SequenceTooLong
from flashcore.paging.ledger import DROPPED, PageLedger, SequenceHandle

SIZE = 16


@pytest.fixture
def ledger() -> PageLedger:
    return PageLedger(num_pages=6, page_size=SIZE, batch=3, max_pages=4)


def grown(ledger: PageLedger, tokens: int):
    """A new sequence of so many tokens, and its books."""
    handle = ledger.add()
    row = ledger.row(handle)
    ledger.reserve([row], [tokens])
    ledger.advance([row], [tokens])
    return handle, row


def books(ledger: PageLedger):
    rows = [(row.handle, row.length, list(row.pages)) if row else None for row in ledger.rows]
    return rows, list(ledger.references), list(ledger.free_pages)


def test_the_lowest_free_page_goes_out_first(ledger):
    _, first = grown(ledger, 17)
    _, second = grown(ledger, 1)
    assert (first.pages, second.pages) == ([0, 1], [2]) and ledger.references == [1, 1, 1, 0, 0, 0]
    assert ledger.live() == [first.handle, second.handle] and str(first.handle).endswith("(row 0)")


def test_reserving_says_what_the_page_table_has_to_learn(ledger):
    _, row = grown(ledger, 17)
    changes = ledger.reserve([row], [15])
    assert changes.entries == [] and changes.copies == [], "the second page has room for 15 more"
    changes = ledger.reserve([row], [16])
    assert changes.entries == [(0, 2, 2)] and changes.copies == [] and row.length == 17
    assert ledger.reserve([row], [16]).entries == [], "the page is there already"


def test_a_shared_partial_page_is_copied_for_the_one_who_writes_and_the_last_keeps_it(ledger):
    parent, row = grown(ledger, 20)
    child = ledger.fork(parent)
    assert ledger.row(child).pages == [0, 1] and ledger.references[:2] == [2, 2]
    changes = ledger.reserve([row, ledger.row(child)], [1, 1])
    assert changes.copies == [(1, 2)] and changes.entries == [(0, 1, 2)]
    assert row.pages == [0, 2] and ledger.row(child).pages == [0, 1] and ledger.references[:3] == [2, 1, 1]


def test_a_fork_of_a_prefix_shares_the_pages_of_that_prefix_alone(ledger):
    parent, _ = grown(ledger, 40)
    child = ledger.fork(parent, 16)
    assert ledger.row(child).pages == [0] and ledger.references[:3] == [2, 1, 1]
    assert ledger.row(ledger.fork(parent, 0)).pages == []
    before = books(ledger)
    for tokens in (41, -1):
        with pytest.raises(PageTableError, match=f"has 40 tokens; its first {tokens} cannot be kept"):
            ledger.fork(parent, tokens)
    assert books(ledger) == before


def test_pages_come_back_when_their_last_user_goes(ledger):
    parent, _ = grown(ledger, 40)
    child = ledger.fork(parent, 20)
    assert ledger.free(parent) == 1 and ledger.references == [1, 1, 0, 0, 0, 0]
    assert ledger.free(child) == 2 and sorted(ledger.free_pages) == list(range(6))
    again, row = grown(ledger, 1)
    assert again.row == 0 and again not in (parent, child) and len(row.pages) == 1


def test_truncating_gives_up_reserved_pages_too(ledger):
    handle, row = grown(ledger, 20)
    ledger.reserve([row], [30])
    assert len(row.pages) == 4
    assert ledger.truncate(handle, 16) == [1, 2, 3] and row.pages == [0] and row.length == 16
    assert ledger.truncate(handle, 16) == []
    assert ledger.truncate(handle, 0) == [0] and row.pages == [] and sum(ledger.references) == 0


def test_dropping_leaves_holes_once(ledger):
    handle, row = grown(ledger, 50)
    assert ledger.drop(handle, [1, 0, 1]) == [0, 1] and row.pages == [DROPPED, DROPPED, 2, 3]
    assert ledger.drop(handle, range(3)) == [2] and row.length == 50 and ledger.references == [0, 0, 0, 1, 0, 0]
    child = ledger.fork(handle)
    assert ledger.row(child).pages == [DROPPED] * 3 + [3] and ledger.references[3] == 2
    before = books(ledger)
    with pytest.raises(PageTableError, match="has dropped the page of token 39"):
        ledger.truncate(handle, 40)
    with pytest.raises(PageTableError, match="cannot drop page 3: it has 4 pages and keeps the last one, so that"):
        ledger.drop(handle, [0, 3])
    empty = ledger.add()
    with pytest.raises(PageTableError, match="cannot drop page 0: it has 0 pages and keeps the last one"):
        ledger.drop(empty, [0])
    ledger.free(empty)
    assert books(ledger) == before


def test_what_does_not_fit_changes_nothing(ledger):
    _, first = grown(ledger, 40)
    _, second = grown(ledger, 30)
    before = books(ledger)
    with pytest.raises(PoolExhausted) as caught:
        ledger.reserve([first, second], [9, 3])
    assert (caught.value.needed, caught.value.free, caught.value.total) == (2, 1, 6)
    with pytest.raises(SequenceTooLong) as caught:
        ledger.reserve([second, first], [3, 25])
    assert (caught.value.row, caught.value.length, caught.value.capacity) == (0, 65, 64)
    with pytest.raises(SequenceTooLong, match=r"Row 1 would hold 33 tokens and its pages hold 32; call reserve"):
        ledger.advance([first, second], [1, 3])
    assert books(ledger) == before


def test_a_write_after_a_fork_has_to_be_reserved_again(ledger):
    handle, row = grown(ledger, 20)
    ledger.reserve([row], [1])
    ledger.fork(handle)
    with pytest.raises(PageTableError, match="wrote to page 1 after a fork had shared it"):
        ledger.advance([row], [1])
    ledger.advance([row], [0])
    ledger.reserve([row], [1])
    ledger.advance([row], [1])
    assert row.length == 21 and row.pages == [0, 2]


def test_a_handle_of_nobody_is_refused(ledger):
    handle, _ = grown(ledger, 1)
    other = PageLedger(num_pages=1, page_size=SIZE, batch=9, max_pages=1)
    theirs = [other.add() for _ in range(9)]
    for wrong in (*theirs, SequenceHandle(-1, handle.serial), SequenceHandle(1, handle.serial), 0, None):
        with pytest.raises(SequenceGone):
            ledger.row(wrong)
    assert ledger.row(handle).length == 1
