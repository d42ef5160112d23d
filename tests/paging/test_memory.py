"""The three cases of memory: figures from the books of real caches, which agree with arithmetic."""

from __future__ import annotations

import pytest

from flashcore.paging import KVShape, memory_cases
from flashcore.paging.memory import mixed_lengths, no_sharing, shared_prefix

SMALL = KVShape(num_heads_kv=1, head_dim=4, page_size=16)


@pytest.mark.slow
def test_the_three_cases():
    shared, mixed, alone = memory_cases()
    assert [case.name for case in (shared, mixed, alone)] == ["shared_prefix", "mixed_lengths", "no_sharing"]
    pages = 6144 // 128 + 16 * (8192 - 6144) // 128
    assert shared.stats.pages_used == shared.stats.pages_total == pages == 304
    assert shared.saved == 1 - pages / (16 * 64) == 0.703125
    assert shared.stats.pages_shared == 48 and shared.stats.fragmentation == 0
    assert shared.stats.resident_bytes == pages * 128 * 8 * 128 * 2 * 2
    assert shared.stats.dense_bytes == shared.stats.padded_bytes == 16 * 8192 * 8 * 128 * 2 * 2
    assert mixed.stats.sequences == 64 and mixed.stats.longest == 8192 and mixed.stats.pages_shared == 0
    assert 0.4 < mixed.saved == 1 - mixed.stats.pages_used / (64 * 64) < 0.6
    assert -128 / 4200 < mixed.stats.saved_of_dense < 0
    assert alone.saved == pytest.approx(1 - 8064 / 8000) and alone.stats.fragmentation == pytest.approx(64 / 8064)
    assert "share their first 6144" in shared.words and "200 to 8192" in mixed.words


def test_the_books_of_meta_are_those_of_a_cache_with_data():
    for case, sizes in (
        (shared_prefix, {"sequences": 3, "length": 50, "prefix": 37}),
        (mixed_lengths, {"sequences": 5, "shortest": 3, "longest": 70}),
        (no_sharing, {"sequences": 2, "length": 33}),
    ):
        assert case(SMALL, "cpu", **sizes) == case(SMALL, **sizes)
