"""`parallel.plan`: every query meets every key that it sees once, work is even, and calls are as few as masks allow."""

from __future__ import annotations

from collections import Counter

import pytest

from flashcore.parallel.plan import PLANS, Call, Zigzag, chunks, fused, held, owned

LENGTHS = [(16, 16), (24, 24), (17, 17), (23, 24), (9, 30), (30, 9), (8, 8)]


def pairs_of(cut: Zigzag, rank: int, plan: str) -> tuple[Counter, int]:
    """How often each (query, key) is computed on a rank, and by how many calls; keys that never came fail."""
    rows = [i for chunk in owned(rank, cut.ranks) for i in range(*cut.query_chunks[chunk])]
    met: Counter = Counter()
    number = 0

    def take(calls, keys):
        nonlocal number
        for call in calls:
            number += 1
            some, seen = rows[slice(*call.rows)], keys[slice(*call.keys)]
            assert some and None not in seen and len(seen) == call.keys[1] - call.keys[0] > 0
            for a, i in enumerate(some):
                met.update((i, j) for b, j in enumerate(seen) if not call.causal or b <= a + len(seen) - len(some))

    if plan == "gather":
        only = cut.gathered(rank)
        here = {*owned(rank, cut.ranks), *only.wanted}
        take(only.calls, [j if c in here else None for c, part in enumerate(cut.key_chunks) for j in range(*part)])
    else:
        take(cut.at_home(rank), [j for chunk in owned(rank, cut.ranks) for j in range(*cut.key_chunks[chunk])])
        for step in range(1, cut.ranks):
            one = cut.arriving(rank, step)
            take(one.calls, [j for chunk in one.wanted for j in range(*cut.key_chunks[chunk])])
    return met, number


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_query_meets_each_key_that_it_sees_exactly_once(ranks, causal, plan):
    for seqlen_q, seqlen_k in LENGTHS:
        cut = Zigzag(seqlen_q, seqlen_k, ranks, causal)
        for rank in range(ranks):
            rows = [i for chunk in owned(rank, ranks) for i in range(*cut.query_chunks[chunk])]
            seen = {(i, j) for i in rows for j in range(seqlen_k) if not causal or j <= i + seqlen_k - seqlen_q}
            met, _ = pairs_of(cut, rank, plan)
            assert met == dict.fromkeys(seen, 1), (cut, rank)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_work_is_even_and_calls_are_few(ranks):
    cut = Zigzag(24, 24, ranks, True)
    found = [pairs_of(cut, rank, "gather") for rank in range(ranks)]
    assert len({sum(met.values()) for met, _ in found}) == 1
    assert [number for _, number in found] == [2] * (ranks - 1) + [1]  # the last rank's two chunks are neighbours
    assert [pairs_of(cut, rank, "ring")[1] for rank in range(ranks)] == [ranks] * ranks
    whole = Zigzag(24, 24, ranks, False)
    assert [pairs_of(whole, rank, "gather")[1] for rank in range(ranks)] == [1] * ranks


def test_a_causal_mask_spares_the_chunks_that_nobody_sees():
    cut = Zigzag(64, 64, 4, True)
    assert [len(cut.wanted(rank)) for rank in range(4)] == [6, 5, 4, 3]
    assert cut.wanted(2) == (0, 1, 3, 4) and cut.wanted(3) == (0, 1, 2)
    assert cut.sent(3, 0) == (3, 4) and cut.sent(0, 3) == (0,)
    assert Zigzag(64, 64, 4, False).wanted(2) == (0, 1, 3, 4, 6, 7)


@pytest.mark.parametrize("seqlen", [4, 12, 13, 23])
def test_chunks_cover_a_sequence_and_differ_by_one_at_most(seqlen):
    cut = chunks(seqlen, 2)
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])] and cut[-1][1] == seqlen
    sizes = [stop - start for start, stop in cut]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1
    assert [held(seqlen, rank, 2) for rank in range(2)] == [sizes[0] + sizes[3], sizes[1] + sizes[2]]


def test_calls_become_one_where_a_mask_allows_it():
    whole, diagonal = Call((4, 8), (0, 4), False), Call((4, 8), (4, 8), True)
    assert fused([whole, diagonal]) == (Call((4, 8), (0, 8), True),)
    assert fused([Call((0, 4), (0, 4), True), whole, diagonal]) == (Call((0, 8), (0, 8), True),)
    assert fused([Call((0, 4), (0, 3), False), Call((4, 8), (0, 3), False)]) == (Call((0, 8), (0, 3), False),)
    apart = (Call((0, 4), (0, 4), True), Call((4, 8), (0, 9), True))  # the second's diagonal begins elsewhere
    assert fused(apart) == apart
    assert fused([diagonal, Call((4, 8), (8, 12), False)]) == (diagonal, Call((4, 8), (8, 12), False))
