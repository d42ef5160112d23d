"""A policy that selects other pages each time, or pages that are not valid, is found; a stable one is not."""

from __future__ import annotations

import pytest
import torch

from flashcore.errors import InvalidProblem
from flashcore.paging import PagedKVCache, PageSelection, SinkWindow, TopK
from flashcore.paging.stability import SelectionFinding, check_selection


class Shaky:
    """A policy whose list is another one each time; every `bad_at`-th repeats a page."""

    def __init__(self, bad_at: int):
        self.calls, self.bad_at = 0, bad_at

    def select(self, q, cache):
        self.calls += 1
        second = 1 if self.calls % self.bad_at == 0 else 2 + self.calls % 3
        pages = torch.tensor([1, second], dtype=torch.int32).expand(cache.batch, cache.num_heads_kv, 2).contiguous()
        return PageSelection(pages, torch.full_like(pages[..., 0], 2))


@pytest.fixture
def small() -> tuple[torch.Tensor, PagedKVCache]:
    cache = PagedKVCache(num_pages=20, batch=2, num_heads_kv=2, head_dim=64, page_size=16, device="cpu")
    for _ in range(2):
        cache.add()
    cache.append(*torch.randn(2, 2, 2, 130, 64).half().unbind(0))
    return torch.randn(2, 4, 1, 64).half(), cache


def test_a_policy_that_always_selects_the_same_is_stable(small):
    for policy in (TopK(pages=3), SinkWindow(1, 2)):
        found = check_selection(policy, *small, runs=5)
        assert found.ok and "5 runs over the same inputs selected the same valid pages" in str(found)


def test_a_policy_that_selects_others_each_time_is_found(small):
    found = check_selection(Shaky(bad_at=100), *small, runs=7)
    assert not found.ok and found.invalid is None and (found.runs_that_differ, found.place) == (4, (0, 0, 1))
    assert "other pages in 4 of 6 repeats, first at sequence 0, KV head 0, place 1 of the list" in str(found)


def test_an_overlap_is_found(small):
    found = check_selection(Shaky(bad_at=3), *small, runs=4)
    assert "pages that do not ascend" in found.invalid and "do not ascend" in str(found)
    with pytest.raises(InvalidProblem, match="give at least 2"):
        check_selection(Shaky(1), *small, runs=1)


def test_counts_alone_may_differ(small):
    q, cache = small
    both = [PageSelection(torch.tensor([[[0, 1]] * 2] * 2, dtype=torch.int32),
                          torch.full((2, 2), count, dtype=torch.int32)) for count in (1, 2)]  # fmt: skip

    class Turns:
        def select(self, q, cache):
            both.append(both.pop(0))
            return both[0]

    assert check_selection(Turns(), q, cache, runs=2).place == (0, 0, 1)


class Unwritten:
    """A policy that leaves the room for its list as it came."""

    def select(self, q, cache):
        return PageSelection.unwritten(cache, 2)


def test_a_list_that_nobody_wrote_is_found(small):
    found = check_selection(Unwritten(), *small, runs=2)
    assert not found.ok and found.runs_that_differ == 0
    assert "counts says more pages than the selection has room for, first at [0, 0]" in found.invalid


def test_each_finding_is_one_sentence():
    right = SelectionFinding(20, 0, None, None)
    assert right.ok and str(right) == "20 runs over the same inputs selected the same valid pages."
    both = SelectionFinding(5, 2, (1, 0, 7), "The selection has pages that do not ascend.")
    assert not both.ok and str(both) == (
        "the same inputs gave other pages in 2 of 4 repeats, first at sequence 1, KV head 0, place 7 of the list; "
        "The selection has pages that do not ascend."
    )
    assert str(SelectionFinding(5, 0, None, "Only this.")) == "Only this."


def test_pages_after_the_count_are_compared_too(small):
    """They have to be -1; one that is something else in some runs was written by somebody."""
    q, cache = small
    lists = [torch.tensor([0, 1, last], dtype=torch.int32).expand(2, 2, 3).contiguous() for last in (-1, -1, 6)]

    class Stray:
        def select(self, q, cache):
            return PageSelection(lists.pop(), torch.full((2, 2), 2, dtype=torch.int32))

    found = check_selection(Stray(), q, cache, runs=3)
    assert found.runs_that_differ == 2 and found.place == (0, 0, 2) and found.invalid is None
