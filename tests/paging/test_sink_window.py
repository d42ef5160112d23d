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
