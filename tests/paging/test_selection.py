"""Policies select what they say, ascending, on the device; and users bring their own."""

from __future__ import annotations

import pytest
import torch

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.paging import AllPages, PagedKV, PagedKVCache, PageSelection, Policy, SinkWindow, TopK, page_scores

HEADS, DIM, SIZE = 2, 8, 16
LENGTHS = [160, 5, 129, 0, 17]  # pages: 10, 1, 9, 0, 2


@pytest.fixture
def cache() -> PagedKVCache:
    cache = PagedKVCache(num_pages=40, batch=5, max_pages=12, num_heads_kv=HEADS, head_dim=DIM, page_size=SIZE,
                         device="cpu")  # fmt: skip
    k, v = torch.randn(2, 5, HEADS, 160, DIM).half().unbind(0)
    for _ in LENGTHS:
        cache.add()
    cache.append(k, v, tokens=LENGTHS)
    return cache


def queries(tokens=1, heads=4, device="cpu"):
    return torch.randn(len(LENGTHS), heads, tokens, DIM).half().to(device)


def chosen(selection: PageSelection, row: int, head: int = 0) -> list[int]:
    return selection.pages[row, head, : selection.counts[row, head]].tolist()


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


def test_sink_window(cache):
    selection = SinkWindow(sink_pages=1, window_pages=2).select(queries(), cache)
    assert [chosen(selection, row) for row in range(5)] == [[0, 8, 9], [0], [0, 7, 8], [], [0, 1]]
    assert selection.pages.shape[-1] == 3
    straddling = SinkWindow(sink_pages=0, window_pages=1).select(queries(tokens=2), cache)
    assert [chosen(straddling, row) for row in range(5)] == [[9], [0], [7, 8], [], [0, 1]]


def test_page_scores_bound_every_score_from_above_and_are_reached(cache):
    q = queries(tokens=3)
    scores = page_scores(q, cache)
    from flashcore.paging import gather

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
    (lambda: SinkWindow(0, 0), "0 sink and 0 window pages; it takes at least 0 and 1"),
    (lambda: SinkWindow(-1, 3), "-1 sink"),
])  # fmt: skip
def test_bad_policies(make, words):
    with pytest.raises(InvalidProblem, match=words):
        make()


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


@pytest.mark.parametrize("pages", [[1, 0], [1, 1]])
def test_a_selection_that_does_not_ascend(cache, pages):
    view = cache.view([cache.sequences[0]])
    selection = selection_of(pages)
    one = PageSelection(selection.pages[:1], selection.counts[:1])
    with pytest.raises(PageTableError, match=r"pages that do not ascend, first at \[0, 0, 1\]"):
        one.check(view)
