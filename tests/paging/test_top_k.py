"""Pages by their key bounds: the scores bound every key, the best are taken, bad numbers lose nothing."""

from __future__ import annotations

import pytest
import torch
from support.paged_caches import DIM, HEADS, LENGTHS, SIZE, chosen, queries

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.paging import PagedKV, TopK, gather, page_scores


def test_page_scores_bound_every_score_from_above_and_are_reached(cache):
    q = queries(tokens=3)
    scores = page_scores(q, cache)
    for row, length in enumerate(LENGTHS):
        k = gather(cache, row)[0].double()
        exact = torch.einsum("hgtd,hkd->hgtk", q[row].double().view(HEADS, 2, 3, DIM), k).flatten(1, 2)
        for page in range(12):
            if page * SIZE >= length:
                assert (scores[row, :, page] == -torch.inf).all()
                continue
            keys = exact[..., page * SIZE : (page + 1) * SIZE]
            assert (keys.amax(dim=(1, 2)) <= scores[row, :, page] + 1e-4).all()
            if keys.shape[-1] == 1:  # one key is its own bound
                torch.testing.assert_close(keys.amax(dim=(1, 2)), scores[row, :, page].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [2, 6])
def test_top_k_takes_the_best_pages_and_the_last(cache, heads):
    q = queries(heads=heads)
    scores = page_scores(q, cache)
    selection = TopK(pages=4).select(q, cache)
    for head in range(HEADS):
        best = scores[0, head, :9].argsort(descending=True)[:3].tolist()
        assert chosen(selection, 0, head) == sorted([*best, 9])
    assert selection.counts[:, 0].tolist() == [4, 1, 4, 0, 2]


def test_top_k_by_share_rounds_up(cache):
    selection = TopK(share=0.3).select(queries(), cache)
    assert selection.counts.tolist() == [[n, n] for n in (3, 1, 3, 0, 1)]
    assert selection.pages.shape == (5, HEADS, 4), "room for the share of the longest sequence that the table holds"
    assert TopK(share=1.0).select(queries(), cache).counts[:, 0].tolist() == [10, 1, 9, 0, 2]


def test_top_k_finds_a_key_that_stands_out(cache):
    sequence = cache.sequences[0]
    cache.k_pool[cache.pages(sequence)[4], 1, 7] = 6.0
    cache.refresh_bounds()
    q = torch.full((5, 4, 1, DIM), 0.5).half()
    assert 4 in chosen(TopK(pages=2).select(q, cache), 0, 1)


def test_top_k_does_not_lose_pages_with_nan_or_infinite_keys(cache):
    pages = cache.pages(cache.sequences[0])
    cache.k_pool[pages[3], :, 0] = torch.nan
    cache.k_pool[pages[6], :, 0] = torch.inf
    cache.k_pool[pages[7]] = -torch.inf
    cache.refresh_bounds()
    q = torch.ones(5, 4, 1, DIM).half()
    assert chosen(TopK(pages=3).select(q, cache), 0) == [3, 6, 9]
    everything = TopK(pages=10).select(q, cache)
    assert chosen(everything, 0) == list(range(10))


def test_top_k_needs_bounds(cache):
    bare = PagedKV(cache.k_pool, cache.v_pool, cache.page_table, cache.lengths)
    with pytest.raises(PageTableError, match="keeps no key bounds.*key_bounds=True"):
        TopK(pages=3).select(queries(), bare)
    made = PagedKV.from_tables(cache.k_pool, cache.v_pool, cache.page_table, cache.lengths, key_bounds=True)
    q = queries()
    assert torch.equal(TopK(pages=3).select(q, made).pages, TopK(pages=3).select(q, cache).pages)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: TopK(), "either pages or share"),
    (lambda: TopK(pages=3, share=0.5), "either pages or share"),
    (lambda: TopK(pages=0), "at least 1 page"),
    (lambda: TopK(share=0.0), "above 0 and at most 1"),
    (lambda: TopK(share=float("nan")), "above 0 and at most 1"),
    (lambda: TopK(pages=1, sink_pages=-1), "at least 0"),
])  # fmt: skip
def test_bad_policies(make, words):
    with pytest.raises(InvalidProblem, match=words):
        make()


def test_of_pages_with_the_same_score_the_first_go_before_the_later(cache):
    cache.key_bounds.fill_(1.0)
    assert chosen(TopK(pages=4).select(queries(), cache), 0) == [0, 1, 2, 9]
    assert chosen(TopK(pages=4, sink_pages=2).select(queries(), cache), 0, 1) == [0, 1, 2, 9]


def test_pages_that_must_be_in_are_counted_and_may_be_more_than_asked_for(cache):
    cache.key_bounds.zero_()
    cache.key_bounds[cache.pages(cache.sequences[0])[5]] = 9.0
    q = torch.ones(5, 4, 1, DIM).half()
    assert chosen(TopK(pages=3, sink_pages=1).select(q, cache), 0) == [0, 5, 9]
    assert chosen(TopK(pages=1, sink_pages=3).select(q, cache), 0) == [0, 1, 2, 9]
    many = torch.ones(5, 4, 40, DIM).half()  # their own tokens lie in pages 7 to 9 of row 0
    assert chosen(TopK(pages=2).select(many, cache), 0) == [7, 8, 9]


def test_a_share_is_of_the_pages_that_are_there(cache):
    cache.drop(cache.sequences[0], range(5))
    assert TopK(share=0.5).select(queries(), cache).counts[0].tolist() == [3, 3], "half of 5, rounded up"
    assert not set(chosen(TopK(pages=4).select(queries(), cache), 0)) & set(range(5))


def test_a_score_takes_the_bound_that_each_sign_asks_for(cache):
    """One query entry at a time, the others 0: its bound times the entry; the largest of the group counts."""
    page = cache.pages(cache.sequences[0])[3]
    least, largest = cache.key_bounds[page, 1, :, 2].float().tolist()
    q = torch.zeros(5, 4, 1, DIM).half()
    q[0, 2, 0, 2] = 2.0
    assert page_scores(q, cache)[0, 1, 3] == max(2 * largest, 0.0)
    q[0, 2, 0, 2], q[0, 3, 0, 2] = -2.0, -4.0
    assert page_scores(q, cache)[0, 1, 3] == max(-2 * least, -4 * least)
    assert page_scores(q, cache)[0, 0, 3] == 0.0, "the other KV head has other queries"


def test_the_last_page_of_a_pool_has_bounds_of_its_own(tables):
    tables[0][5] = 9.0
    scores = page_scores(torch.ones(2, 4, 1, DIM).half(), PagedKV.from_tables(*tables, key_bounds=True))
    assert (scores[:, :, 0] == 9 * DIM).all() and (scores[1, :, 1:3] < 9 * DIM).all()


def test_a_page_that_was_dropped_has_no_score(cache):
    cache.drop(cache.sequences[0], [4])
    scores = page_scores(queries(), cache)
    assert (scores[0, :, 4] == -torch.inf).all() and scores[0, :, :4].isfinite().all()
