"""Every policy selects valid pages, ascending, on the device; users bring their own; bad selections are named."""

from __future__ import annotations

import pytest
import torch
from support.paged_caches import HEADS, LENGTHS, SIZE, chosen, queries

from flashcore.errors import PageTableError
from flashcore.paging import AllPages, PagedKV, PageSelection, Policy, SinkWindow, TopK
from flashcore.paging.selection import query_pages

POLICIES = [AllPages(), SinkWindow(1, 2), SinkWindow(0, 1), SinkWindow(3, 50), TopK(pages=3), TopK(pages=100),
            TopK(share=0.3), TopK(share=1.0), TopK(pages=4, sink_pages=1)]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_every_policy(cache, policy, tokens):
    """Valid, with the queries' own pages, without holes; the same over a view; and no look at a value (on `meta`)."""
    assert isinstance(policy, Policy)
    cache.drop(cache.sequences[0], [2, 5])
    q = queries(tokens)
    selection = policy.select(q, cache)
    selection.check(cache)
    for row, length in enumerate(LENGTHS):
        for head in range(HEADS):
            pages = chosen(selection, row, head)
            last = (length - 1) // SIZE
            assert set(range(max(0, length - tokens) // SIZE, last + 1)) <= set(pages)
            assert row != 0 or not {2, 5} & set(pages)
            assert (selection.pages[row, head, len(pages) :] == -1).all()
    some = cache.view([cache.sequences[2]])
    assert chosen(policy.select(q[2:3], some), 0, 1) == chosen(selection, 2, 1)
    away = PagedKV(*(t.to("meta") for t in (cache.k_pool, cache.v_pool, cache.page_table, cache.lengths)),
                   key_bounds=cache.key_bounds.to("meta"))  # fmt: skip
    assert policy.select(q.to("meta"), away).pages.shape == selection.pages.shape
    assert torch.equal(PageSelection.of_mask(selection.mask(12)).counts, selection.counts)


def test_all_pages(cache):
    cache.drop(cache.sequences[0], [0])
    selection = AllPages().select(queries(), cache)
    assert [chosen(selection, row) for row in range(5)] == [list(range(1, 10)), [0], list(range(9)), [], [0, 1]]


def test_a_policy_of_ones_own(cache):
    class EvenPages:
        def select(self, q, cache):
            even = torch.arange(cache.max_pages, device=cache.device) % 2 == 0
            return PageSelection.of_mask((cache.resident_pages() & even)[:, None].expand(-1, cache.num_heads_kv, -1))

    assert isinstance(EvenPages(), Policy)
    selection = EvenPages().select(queries(), cache)
    selection.check(cache)
    assert chosen(selection, 0) == [0, 2, 4, 6, 8]


def selection_of(pages, counts=None) -> PageSelection:
    """One list of pages for every sequence and head."""
    pages = torch.tensor(pages, dtype=torch.int32).expand(5, HEADS, -1).contiguous()
    count = pages.shape[-1] if counts is None else counts
    return PageSelection(pages, torch.full((5, HEADS), count, dtype=torch.int32))


@pytest.mark.parametrize(("selection", "words"), [
    (selection_of([0, 12]), r"a page that the sequence does not have, first at \[0, 0, 1\]"),
    (selection_of([0, 1]), r"a page that the sequence does not have, first at \[1, 0, 1\]"),
    (selection_of([-1, 0]), r"does not have, first at \[0, 0, 0\]"),
    (selection_of([0], counts=2), r"more pages than the selection has room for, first at \[0, 0\]"),
    (PageSelection(selection_of([0]).pages.long(), selection_of([0]).counts), "pages of the selection is torch.int64"),
    (PageSelection(selection_of([0]).pages, selection_of([0]).counts[:2]), r"counts of the selection is \[2, 2\]"),
    (PageSelection(selection_of([0]).pages.to("meta"), selection_of([0]).counts), "on meta; it has to be contiguous"),
])  # fmt: skip
def test_bad_selections(cache, selection, words):
    with pytest.raises(PageTableError, match=words):
        selection.check(cache)


@pytest.mark.parametrize(("pages", "nth"), [([1, 0], 1), ([1, 1], 1), ([0, 2, 1], 2), ([0, 2, 2], 2)])
def test_a_selection_that_does_not_ascend(cache, pages, nth):
    view = cache.view([cache.sequences[0]])
    selection = selection_of(pages)
    one = PageSelection(selection.pages[:1], selection.counts[:1])
    with pytest.raises(PageTableError, match=rf"pages that do not ascend, first at \[0, 0, {nth}\]"):
        one.check(view)
    one.check(view, contents=False)


def test_a_selection_has_as_much_room_as_somebody_knows_to_be_enough(cache):
    mask = torch.arange(12) % 4 == 0
    for most, width in ((None, 12), (3, 3), (50, 12)):
        found = PageSelection.of_mask(mask.expand(5, HEADS, 12), most)
        assert found.pages.shape == (5, HEADS, width) and found.pages[4, 1, :3].tolist() == [0, 4, 8]
        assert found.counts.tolist() == [[3] * HEADS] * 5
    room = PageSelection.unwritten(cache, 7)
    assert room.pages.shape == (5, HEADS, 7) and room.counts.shape == (5, HEADS)
    assert {room.pages.dtype, room.counts.dtype} == {torch.int32}


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (2, 2), (16, 2), (17, 2), (18, 3), (33, 3), (34, 4)])
def test_tokens_lie_in_one_page_more_than_they_fill_where_they_begin_before_its_end(tokens, pages):
    assert query_pages(tokens, 16) == pages
    assert max(-(-(begin + tokens) // 16) for begin in range(16)) == pages, "wherever they begin in the first one"
