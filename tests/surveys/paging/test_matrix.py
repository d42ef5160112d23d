"""The matrix of cases covers every subject, and each case is poisoned wherever no token lies."""

from __future__ import annotations

import torch

from flashcore.paging import gather
from flashcore.surveys.paging.caches import held_slots
from flashcore.surveys.paging.matrix import GROUPS, POLICIES, PagedCase, lengths_for, make, paged_cases


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


def test_lengths_lie_around_the_end_of_a_page():
    assert lengths_for(16) == (1, 15, 16, 17, 0, 53, 80)


def test_a_case_names_its_problem_and_itself():
    case = PagedCase(
        "sharing", (70, 9), page_size=32, q_tokens=2, policy="top_k", prefix=40, dropped=(0, 2), dtype="bfloat16"
    )
    problem = case.problem()
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k, problem.page_size) == (2, 2, 70, 32)
    assert problem.dtype == "bfloat16" and problem.causal
    for words in ("lengths 70/9", "policy top_k", "dropped 0/2", problem.label()):
        assert words in case.label()
    assert "dropped" not in PagedCase("heads", (1,)).label()


def test_random_cases_are_those_of_their_seed():
    def drawn(seed):
        return [c for c in paged_cases("quick", False, seed=seed) if c.group == "random"]

    assert drawn(3) == drawn(3) != drawn(4) and len(drawn(3)) == 8
    assert len([c for c in paged_cases("full", True) if c.group == "random"]) == 40
    assert max(length for c in paged_cases("quick", False) for length in c.lengths) < 2000, "small enough for two cores"


def test_a_seed_gives_the_same_case_and_another_gives_others():
    case = PagedCase("random", (50, 20), page_size=16, policy="top_k")
    (q, cache), (q_again, again), (q_other, other) = (make(case, "cpu", seed=seed) for seed in (5, 5, 6))
    assert torch.equal(q, q_again) and torch.equal(cache.page_table, again.page_table)
    assert torch.equal(cache.k_pool.nan_to_num(), again.k_pool.nan_to_num())
    assert not torch.equal(q, q_other) and not torch.equal(cache.page_table, other.page_table)


def test_a_prefix_is_shared_by_all_that_are_long_enough():
    _, cache = make(
        PagedCase("sharing", (20, 64, 64, 70, 40), page_size=16, prefix=40, dtype="bfloat16", head_dim=128), "cpu"
    )
    table = cache.page_table.tolist()
    assert table[1][:2] == table[2][:2] == table[3][:2] and table[0][0] != table[1][0]
    assert len({table[row][2] for row in (1, 2, 3)}) == 3, "the partial page was copied on write"
    assert table[4][:3] == table[1][:3], "one that ends with the prefix writes nothing, and shares all of it"
    (k1, *_), (k3, *_) = gather(cache, 1), gather(cache, 3)
    assert torch.equal(k1[:, :40], k3[:, :40]) and not torch.equal(k1[:, 40:64], k3[:, 40:64])
    assert cache.dtype == torch.bfloat16 and cache.head_dim == 128


def test_the_last_page_is_never_dropped():
    _, cache = make(PagedCase("dropped pages", (40, 20, 5), page_size=16, dropped=(0, 1)), "cpu")
    resident = cache.resident_pages()
    assert resident.sum(dim=1).tolist() == [1, 1, 1] and resident[0, 2] and resident[1, 1] and resident[2, 0]
