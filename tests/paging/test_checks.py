"""Reading tables back: each thing that can be wrong with them is one typed sentence."""

from __future__ import annotations

import pytest
import torch
from support.paged_caches import DIM, HEADS

from flashcore.errors import PagesOverlap, PageTableError, SequenceTooLong
from flashcore.paging import PagedKV, append_tokens, paged_reference
from flashcore.paging.checks import can_read_back, check_tables, debugging


@pytest.mark.parametrize("number", [6, -2, 2**31 - 1])
def test_a_page_outside_the_pool(tables, number, monkeypatch):
    tables[2][1, 2] = number
    kv = PagedKV.from_tables(*tables)
    with pytest.raises(PageTableError, match=rf"page_table\[1, 2\] is {number} and the pool has pages 0 to 5"):
        kv.check()
    monkeypatch.setenv("FLASHCORE_DEBUG", "1")
    with pytest.raises(PageTableError, match="the pool has pages"):
        PagedKV.from_tables(*tables)
    with pytest.raises(PageTableError, match="the pool has pages"):
        paged_reference(torch.zeros(2, 2, 1, DIM).half(), kv)


@pytest.mark.parametrize("length", [65, -1])
def test_a_length_beyond_the_table(tables, length):
    tables[3][1] = length
    with pytest.raises(SequenceTooLong, match=f"Row 1 would hold {length} tokens and its pages hold 64"):
        PagedKV.from_tables(*tables).check()


def test_a_row_may_be_full_and_a_page_that_is_full_may_be_shared(tables):
    kv = PagedKV.from_tables(*tables)
    tables[3][0] = 64
    kv.check()
    with pytest.raises(SequenceTooLong, match="Row 0 would hold 65 tokens"):
        kv.check(1)
    tables[3][0] = 16  # its next token begins page 0, and page 5, which row 1 has too, is not written again
    kv.check(1)


def test_a_length_that_leaves_no_room(tables):
    kv = PagedKV.from_tables(*tables)
    with pytest.raises(SequenceTooLong, match="Row 1 would hold 65 tokens"):
        kv.check(tokens=32)


def test_overlapping_pages_are_wrong_only_where_they_are_written(tables, monkeypatch):
    tables[2][0, 1] = 1  # the partial last page of both
    kv = PagedKV.from_tables(*tables)
    kv.check()
    with pytest.raises(
        PagesOverlap, match="Row 0 writes its next tokens to page 1, which the page table names 2 times"
    ):
        kv.check(tokens=1)
    new = torch.ones(2, HEADS, 1, DIM, dtype=torch.float16)
    monkeypatch.setenv("FLASHCORE_DEBUG", "1")
    with pytest.raises(PagesOverlap):
        append_tokens(new, new, *tables)
    only_row_1 = torch.tensor([1])
    with pytest.raises(PagesOverlap, match="Row 1"):
        append_tokens(new[:1], new[:1], *tables, rows=only_row_1)
    assert tables[3].tolist() == [20, 33]


def test_a_page_ahead_that_another_reads(tables):
    tables[3][0] = 32  # the next token begins a new page, and the table names one that row 1 reads
    tables[2][0, 2] = 3
    kv = PagedKV.from_tables(*tables)
    kv.check()
    with pytest.raises(PagesOverlap, match="Row 0 writes its next tokens to page 3"):
        kv.check(tokens=1)


def test_a_page_ahead_that_is_not_there(tables):
    tables[2][1, 2] = 4
    tables[2][0, 1] = 0
    tables[2][0, 2] = -1
    kv = PagedKV.from_tables(*tables)
    kv.check(tokens=12)
    with pytest.raises(
        PageTableError, match=r"page_table\[0, 2\] is -1, and row 0 writes its next tokens there; reserve"
    ):
        kv.check(tokens=13)


@pytest.mark.parametrize(("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)])
def test_debugging_is_asked_for_by_the_environment(monkeypatch, value, wanted):
    monkeypatch.delenv("FLASHCORE_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("FLASHCORE_DEBUG", value)
    assert debugging() is wanted


def test_nothing_is_read_back_from_meta_or_while_a_graph_is_captured(tables, monkeypatch):
    assert can_read_back(torch.device("cpu")) and not can_read_back(torch.device("meta"))
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert can_read_back(torch.device("cuda", 0)) is not capturing
    tables[2][0, 0] = 99
    wrong = PagedKV(*(t.to("meta") for t in tables))
    check_tables(wrong, 1)  # says nothing, since it could not look


def test_each_row_may_write_another_number_of_tokens(tables):
    tables[2][0, 2] = 3  # the page that row 0 comes to after 12 tokens is one that row 1 reads
    tables[2][0, 1] = 0
    kv = PagedKV.from_tables(*tables)
    check_tables(kv, torch.tensor([12, 1]))
    check_tables(kv, torch.tensor([0, 15]))
    with pytest.raises(PagesOverlap) as caught:
        check_tables(kv, torch.tensor([13, 0]))
    assert (caught.value.row, caught.value.page, caught.value.uses) == (0, 3, 2)
    with pytest.raises(PageTableError, match=r"page_table\[1, 3\] is 77, and row 1 writes its next tokens there"):
        check_tables(kv, torch.tensor([0, 16]))
    with pytest.raises(SequenceTooLong, match="Row 1 would hold 65 tokens"):
        check_tables(kv, torch.tensor([0, 32]))


def test_a_row_without_a_sequence_is_passed_over(tables):
    tables[3][0] = 0
    tables[2][0] = -1
    PagedKV.from_tables(*tables).check(tokens=1)
    tables[2][0, 1] = 3  # a page further on gives it no sequence
    PagedKV.from_tables(*tables).check(tokens=1)
    tables[2][0, 0] = 5  # but a first page does: that of row 1
    with pytest.raises(PagesOverlap, match="Row 0"):
        PagedKV.from_tables(*tables).check(tokens=1)


def test_a_wrong_length_is_named_before_what_follows_from_it(tables):
    tables[3][1] = -3
    tables[2][0, 0] = 99
    with pytest.raises(SequenceTooLong, match="Row 1 would hold -3"):
        PagedKV.from_tables(*tables).check()
