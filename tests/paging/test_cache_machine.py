"""Any order of append, fork, free, drop and truncate keeps the cache whole: a state machine against dense copies."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flashcore.errors import FlashCoreError, PageTableError, PoolExhausted, SequenceGone, SequenceTooLong
from flashcore.paging import DROPPED, PagedKVCache, SequenceHandle, TopK, bounds_of_pool, gather
from flashcore.paging import cache as cache_module
from flashcore.paging import writing as writing_module
from flashcore.paging.ledger import PageLedger

PAGES, BATCH, COLUMNS, SIZE, HEADS, DIM = 7, 4, 5, 16, 2, 4


@dataclass
class Shadow:
    """What a sequence has to hold."""

    k: torch.Tensor
    """``[HEADS, length, DIM]``."""
    v: torch.Tensor
    dropped: set[int]


class CacheMachine(RuleBasedStateMachine):
    """Each rule does one thing to the cache and to the shadows; the invariants compare them after every step."""

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed):
        self.cache = PagedKVCache(num_pages=PAGES, batch=BATCH, max_pages=COLUMNS, num_heads_kv=HEADS, head_dim=DIM,
                                  page_size=SIZE, device="cpu")  # fmt: skip
        self.random = torch.Generator().manual_seed(seed)
        self.shadows: dict[SequenceHandle, Shadow] = {}
        self.gone: list[SequenceHandle] = []
        self.add(prompt=2 * SIZE + 5)  # so that no run spends its steps on an empty cache

    def everything(self):
        cache, ledger = self.cache, self.cache._ledger
        tensors = (cache.k_pool, cache.v_pool, cache.page_table, cache.lengths, cache.key_bounds)
        books = [(row.handle, row.length, tuple(row.pages)) if row else None for row in ledger.rows]
        return [t.clone() for t in tensors], (books, list(ledger.references), list(ledger.free_pages))

    def refused(self, call, *kinds):
        """The call raises one of these and changes nothing."""
        tensors, books = self.everything()
        with pytest.raises(kinds):
            call()
        tensors_after, books_after = self.everything()
        assert books == books_after
        assert all(torch.equal(a, b) for a, b in zip(tensors, tensors_after, strict=True))

    def pages_needed(self, handles, counts) -> int:
        """Fresh pages and copies that an append takes, counted from the page table alone."""
        table = self.cache.page_table.tolist()
        uses = [page for row in table for page in row if page != DROPPED]
        needed = 0
        for handle, count in zip(handles, counts, strict=True):
            length = self.shadows[handle].k.shape[1]
            needed += max(0, -(-(length + count) // SIZE) - len(self.cache.pages(handle)))
            if count and length % SIZE and uses.count(page := table[handle.row][length // SIZE]) > 1:
                uses.remove(page)
                needed += 1
        return needed

    def draw_one(self, data) -> SequenceHandle:
        return data.draw(st.sampled_from(sorted(self.shadows, key=lambda s: s.row)))

    @precondition(lambda self: len(self.shadows) < BATCH)
    @rule(prompt=st.integers(0, 3 * SIZE))
    def add(self, prompt):
        empty = torch.empty(HEADS, 0, DIM, dtype=torch.float16)
        handle = self.cache.add()
        self.shadows[handle] = Shadow(empty, empty, set())
        if prompt:
            self.append_to([handle], prompt, None)

    @precondition(lambda self: self.shadows)
    @rule(data=st.data(), most=st.sampled_from([1, 3, SIZE, 40]), ragged=st.booleans())
    def append(self, data, most, ragged):
        handles = data.draw(st.permutations(sorted(self.shadows, key=lambda s: s.row)))
        handles = handles[: data.draw(st.integers(1, len(handles)))]
        self.append_to(handles, most, [data.draw(st.integers(0, most)) for _ in handles] if ragged else None)

    @precondition(lambda self: self.shadows)
    @rule()
    def decode(self):
        """One token for every sequence."""
        self.append_to(sorted(self.shadows, key=lambda s: s.row), 1, None)

    def append_to(self, handles, most, tokens):
        counts = [most] * len(handles) if tokens is None else tokens
        k, v = torch.randn(2, len(handles), HEADS, most, DIM, generator=self.random).half().unbind(0)

        def call():
            self.cache.append(k, v, handles, tokens=tokens)

        lengths = [self.shadows[h].k.shape[1] for h in handles]
        if any(length + count > COLUMNS * SIZE for length, count in zip(lengths, counts, strict=True)):
            self.refused(call, SequenceTooLong)
        elif self.pages_needed(handles, counts) > PAGES - self.cache.stats().pages_used:
            self.refused(call, PoolExhausted)
        else:
            call()
            for nth, (handle, count) in enumerate(zip(handles, counts, strict=True)):
                shadow = self.shadows[handle]
                shadow.k = torch.cat([shadow.k, k[nth, :, :count]], dim=1)
                shadow.v = torch.cat([shadow.v, v[nth, :, :count]], dim=1)

    @precondition(lambda self: self.shadows)
    @rule(data=st.data(), ahead=st.integers(0, 2 * SIZE))
    def reserve(self, data, ahead):
        handle = self.draw_one(data)
        if self.shadows[handle].k.shape[1] + ahead > COLUMNS * SIZE:
            self.refused(lambda: self.cache.reserve(ahead, [handle]), SequenceTooLong)
        elif self.pages_needed([handle], [ahead]) > PAGES - self.cache.stats().pages_used:
            self.refused(lambda: self.cache.reserve(ahead, [handle]), PoolExhausted)
        else:
            self.cache.reserve(ahead, [handle])
            self.cache.check(tokens=0)

    @precondition(lambda self: self.shadows)
    @rule(data=st.data(), whole=st.booleans())
    def fork(self, data, whole):
        handle = self.draw_one(data)
        shadow = self.shadows[handle]
        tokens = shadow.k.shape[1] if whole else data.draw(st.integers(0, shadow.k.shape[1]))

        def call():
            return self.cache.fork(handle, None if whole else tokens)

        if tokens and (tokens - 1) // SIZE in shadow.dropped:
            self.refused(call, PageTableError)
        elif len(self.shadows) == BATCH:
            self.refused(call, PoolExhausted)
        else:
            dropped = {page for page in shadow.dropped if page * SIZE < tokens}
            self.shadows[call()] = Shadow(shadow.k[:, :tokens], shadow.v[:, :tokens], dropped)

    @precondition(lambda self: len(self.shadows) > 1)
    @rule(data=st.data())
    def free(self, data):
        handle = self.draw_one(data)
        before = self.cache.stats().pages_used
        freed = self.cache.free(handle)
        assert before - self.cache.stats().pages_used == freed
        del self.shadows[handle]
        self.gone.append(handle)

    @precondition(lambda self: self.shadows)
    @rule(data=st.data())
    def drop(self, data):
        handle = self.draw_one(data)
        last = (self.shadows[handle].k.shape[1] - 1) // SIZE
        most = data.draw(st.sampled_from([max(0, last - 1), max(0, last - 1), COLUMNS - 1]))
        pages = data.draw(st.sets(st.integers(0, most), min_size=1, max_size=3))
        if any(page >= last for page in pages):
            self.refused(lambda: self.cache.drop(handle, pages), PageTableError)
        else:
            self.cache.drop(handle, pages)
            self.shadows[handle].dropped |= pages

    @precondition(lambda self: self.shadows)
    @rule(data=st.data())
    def truncate(self, data):
        handle = self.draw_one(data)
        shadow = self.shadows[handle]
        length = data.draw(st.integers(0, shadow.k.shape[1]))
        if length and (length - 1) // SIZE in shadow.dropped:
            self.refused(lambda: self.cache.truncate(handle, length), PageTableError)
        else:
            self.cache.truncate(handle, length)
            shadow.k, shadow.v = shadow.k[:, :length], shadow.v[:, :length]
            shadow.dropped = {page for page in shadow.dropped if page * SIZE < length}

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def use_one_that_is_gone(self, data):
        handle = data.draw(st.sampled_from(self.gone))
        new = torch.ones(1, HEADS, 1, DIM, dtype=torch.float16)
        for call in (
            lambda: self.cache.append(new, new, [handle]), lambda: self.cache.reserve(1, [handle]),
            lambda: self.cache.fork(handle), lambda: self.cache.free(handle),
            lambda: self.cache.drop(handle, [0]), lambda: self.cache.truncate(handle, 0),
        ):  # fmt: skip
            self.refused(call, SequenceGone)
        self.gone.remove(handle)

    @precondition(lambda self: len(self.shadows) == BATCH)
    @rule()
    def add_one_too_many(self):
        self.refused(self.cache.add, PoolExhausted)

    @invariant()
    def reference_counts_are_the_uses(self):
        ledger: PageLedger = self.cache._ledger
        uses = [0] * PAGES
        for handle in self.shadows:
            for page in self.cache.pages(handle):
                if page != DROPPED:
                    uses[page] += 1
        assert uses == ledger.references
        assert sorted(ledger.free_pages) == [page for page in range(PAGES) if uses[page] == 0]
        stats = self.cache.stats()
        assert stats.pages_used == PAGES - len(ledger.free_pages) and stats.pages_shared == sum(u > 1 for u in uses)

    @invariant()
    def the_device_says_what_the_books_say(self):
        self.cache.check()
        assert set(self.cache.sequences) == set(self.shadows)

    @invariant()
    def contents_are_the_shadows(self):
        for handle, shadow in self.shadows.items():
            k, v, present = gather(self.cache, handle.row)
            gone = torch.tensor([position // SIZE in shadow.dropped for position in range(len(present))], dtype=bool)
            assert torch.equal(present, ~gone)
            assert torch.equal(k, shadow.k.masked_fill(gone[:, None], 0))
            assert torch.equal(v, shadow.v.masked_fill(gone[:, None], 0))

    @invariant()
    def bounds_cover_every_key(self):
        exact = bounds_of_pool(self.cache)
        assert (self.cache.key_bounds[:, :, 0] <= exact[:, :, 0]).logical_or(exact[:, :, 0].isinf()).all()
        assert (self.cache.key_bounds[:, :, 1] >= exact[:, :, 1]).logical_or(exact[:, :, 1].isinf()).all()

    @invariant()
    def a_selection_stays_within_the_pages(self):
        q = torch.ones(BATCH, HEADS, 1, DIM, dtype=torch.float16)
        selection = TopK(pages=2).select(q, self.cache)
        selection.check(self.cache)
        assert not (selection.mask(COLUMNS) & ~self.cache.resident_pages()[:, None]).any()


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
LONG = settings(
    max_examples=15, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=QUIET, database=None
)
CacheMachine.TestCase.settings = LONG
TestCacheMachine = pytest.mark.slow(CacheMachine.TestCase)


def forget_to_count_the_fork(fork):
    def changed(self, sequence, tokens=None):
        child = fork(self, sequence, tokens)
        for page in self.row(child).pages:
            self.references[page] -= page != DROPPED
        return child

    return changed


def give_the_dropped_page_back_twice(drop):
    def changed(self, sequence, pages):
        held = list(self.row(sequence).pages)
        columns = drop(self, sequence, pages)
        self.free_pages.extend(held[column] for column in columns)
        return columns

    return changed


def forget_the_rows_length(truncate):
    def changed(self, sequence, length):
        before = self.row(sequence).length
        columns = truncate(self, sequence, length)
        self.row(sequence).length = before
        return columns

    return changed


def take_pages_before_counting_them(reserve):
    def changed(self, rows, tokens):
        try:
            return reserve(self, rows, tokens)
        except PoolExhausted:
            del self.free_pages[-1:]
            raise

    return changed


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name", "plant"), [
    (PageLedger, "fork", forget_to_count_the_fork),
    (PageLedger, "drop", give_the_dropped_page_back_twice),
    (PageLedger, "truncate", forget_the_rows_length),
    (PageLedger, "reserve", take_pages_before_counting_them),
    (cache_module, "copy_pages", lambda copy_pages: lambda pools, source, target: None),
    (writing_module, "widen_bounds", lambda widen_bounds: lambda *arguments: None),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_the_machine_finds_a_planted_bug(monkeypatch, owner, name, plant):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, functools.wraps(original)(plant(original)))
    once = settings(LONG, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, FlashCoreError, IndexError)):
        run_state_machine_as_test(CacheMachine, settings=once)
