"""The matrix of cases covers every subject, and each case is poisoned wherever no token lies."""

from __future__ import annotations

from flashcore.paging_survey.caches import held_slots
from flashcore.paging_survey.matrix import GROUPS, POLICIES, PagedCase, make, paged_cases


def test_the_matrix_covers_every_subject_on_every_profile():
    for profile, gpu in (("quick", False), ("full", True)):
        cases = paged_cases(profile, gpu)
        assert {c.group for c in cases} == set(GROUPS) and {c.policy for c in cases} == set(POLICIES)
        assert (
            any(c.prefix for c in cases)
            and any(c.dropped for c in cases)
            and {c.causal for c in cases} == {True, False}
        )
        assert {1, 8} <= {c.q_tokens for c in cases} and any(c.q_tokens > 8 for c in cases)
        assert {1, 4, 8} <= {c.num_heads_q // c.num_heads_kv for c in cases}
        assert all(case.problem() for case in cases)
    full = paged_cases("full", True)
    assert {c.page_size for c in full} == {16, 32, 64, 128, 256}
    assert {c.dtype for c in full} == {"float16", "bfloat16"} and {c.head_dim for c in full} == {64, 128}
    assert {0, 1, 63, 64, 65} <= {length for c in full for length in c.lengths}


def test_a_case_is_poisoned_wherever_no_token_lies():
    case = PagedCase("sharing", (300, 300, 1, 0), prefix=150, dropped=(0,), page_size=64)
    q, cache = make(case, "cpu")
    held = held_slots(cache)
    for pool in (cache.k_pool, cache.v_pool):
        assert bool(pool.transpose(1, 2)[held].isfinite().all()) and bool(pool.transpose(1, 2)[~held].isnan().all())
    assert bool((~held).any()) and cache.lengths.tolist() == [300, 300, 1, 0]
    cache.check()
    assert cache.page_table[0, 0] == -1 and cache.page_table[2, 3] > cache.num_pages, "the table's rest is nonsense"
    assert bool((cache.page_table[0, 1:2] == cache.page_table[1, 1:2]).all()), "the prefix is shared"
    assert q.shape == (4, 4, 1, 64)
