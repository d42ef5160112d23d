"""The first and the last pages: which they are, and sizes that are refused."""

from __future__ import annotations

import pytest
from support.paged_caches import chosen, queries

from flashcore.errors import InvalidProblem
from flashcore.paging import SinkWindow


def test_sink_window(cache):
    selection = SinkWindow(sink_pages=1, window_pages=2).select(queries(), cache)
    assert [chosen(selection, row) for row in range(5)] == [[0, 8, 9], [0], [0, 7, 8], [], [0, 1]]
    assert selection.pages.shape[-1] == 3
    straddling = SinkWindow(sink_pages=0, window_pages=1).select(queries(tokens=2), cache)
    assert [chosen(straddling, row) for row in range(5)] == [[9], [0], [7, 8], [], [0, 1]]


@pytest.mark.parametrize(("make", "words"), [
    (lambda: SinkWindow(0, 0), "0 sink and 0 window pages; it takes at least 0 and 1"),
    (lambda: SinkWindow(-1, 3), "-1 sink"),
])  # fmt: skip
def test_bad_policies(make, words):
    with pytest.raises(InvalidProblem, match=words):
        make()


def test_a_dropped_page_is_not_made_up_for(cache):
    sequence = cache.sequences[0]
    cache.drop(sequence, [0, 8])
    assert chosen(SinkWindow(2, 3).select(queries(), cache), 0, 1) == [1, 7, 9]


def test_more_pages_than_there_are_is_all_of_them(cache):
    for policy in (SinkWindow(0, 10**12), SinkWindow(10**12, 1)):
        selection = policy.select(queries(), cache)
        assert selection.counts[:, 0].tolist() == [10, 1, 9, 0, 2] and selection.pages.shape[-1] == cache.max_pages


def test_the_window_counts_back_from_the_first_query(cache):
    """Of 33 queries of row 0 the first is at position 127, in page 7; each of them sees two pages at least."""
    selection = SinkWindow(0, 2).select(queries(tokens=33), cache)
    assert chosen(selection, 0) == [6, 7, 8, 9] and chosen(selection, 1) == [0] and chosen(selection, 3) == []


def test_queries_that_do_not_fit_are_refused(cache):
    with pytest.raises(InvalidProblem, match="q has batch 4"):
        SinkWindow().select(queries()[:4], cache)
