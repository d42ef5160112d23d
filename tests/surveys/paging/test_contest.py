"""Ways of one step in the same rounds: checked before they are timed, compared with the fastest that is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.paging_surveys import PLAN

from flashcore import backends
from flashcore.errors import Unsupported
from flashcore.records import Ledger, Timing
from flashcore.surveys.paging import contest as contests
from flashcore.surveys.paging.caches import mixed_cache
from flashcore.surveys.paging.contest import CHECKED, Judge, Way, contest, pages_way
from flashcore.surveys.paging.plan import decode_problem
from flashcore.surveys.paging.trials import Book

LENGTHS = tuple(range(20, 180, 10))
PROBLEM = decode_problem(len(LENGTHS), 4, 2, max(LENGTHS), 64).with_(page_size=32)


@pytest.fixture
def step():
    cache = mixed_cache(LENGTHS, 2, 64, page_size=32, dtype=torch.float16, device="cpu")
    q = torch.randn(1, len(LENGTHS), 4, 1, 64, generator=torch.Generator().manual_seed(0)).half()
    return q, cache, Judge(q[0], cache)


@pytest.fixture
def latencies(monkeypatch):
    """The times that are found, by name of the way: three samples around each."""
    given = {}

    def timed(candidates, problem, *, gpu, sets, rounds, l2="rotating"):
        return {
            c.name: Timing(method="graph_replay", latency_us=given[c.name], samples_us=[given[c.name] * f for f in
                           (0.9, 1.0, 1.1)], round="r", l2="rotating", quartiles_us=[given[c.name]] * 2)
            for c in candidates
        }  # fmt: skip

    monkeypatch.setattr(contests, "time_calls", timed)
    return given


def held(book):
    return {t.variant: t for t in book.trials}


def test_ours_is_held_against_the_fastest_of_each_side_that_is_right(step, latencies):
    q, cache, judge = step
    ours = pages_way(
        "ours", "reference", q, [cache], PROBLEM, judge, {"dense": ("a", "b", "wrong"), "other": ("gone",)}
    )
    real = ours.make()

    def way(name, call):
        return Way(name, "reference", PROBLEM, lambda: call, judge)

    def broken():
        raise Unsupported("reference", "not this")

    ways = [
        ours, way("a", real), way("b", real), way("wrong", lambda i: (real(i)[0] + 1, None)),
        Way("gone", "reference", PROBLEM, broken, judge),
    ]  # fmt: skip
    latencies.update({"ours": 50.0, "a": 80.0, "b": 60.0, "wrong": 1.0})
    book = Book(Ledger(), lambda line: None)
    good = contest(book, "shapes", ways, plan=PLAN, sets=1, data={"kv_bytes": 10_000_000})
    assert set(good) == {"ours", "a", "b"}
    found = held(book)
    data = found["ours"].data
    assert data["dense"] == "b" and data["over_dense"] == 1.2 and data["over_dense_quartiles"] == [1.2, 1.2]
    assert "over_other" not in data and data["tbs"] == 0.2 and found["b"].data["tbs"] == pytest.approx(1 / 6, rel=1e-3)
    assert found["wrong"].status == "failed" and "counts for nothing" in found["wrong"].reason
    assert (found["gone"].status, found["gone"].reason) == ("unsupported", "not this")
    assert found["ours"].timing.samples_us == [] and found["ours"].problem == PROBLEM


def test_results_are_judged_from_the_shortest_sequence_to_the_longest(step):
    q, cache, judge = step
    lengths = cache.lengths[judge.rows].tolist()
    assert len(lengths) == CHECKED and lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (min(LENGTHS), max(LENGTHS))
    call = pages_way("ours", "reference", q, [cache], PROBLEM, judge, {}).make()
    assert judge.wrong(call, "reference", False) is None
    last = int(judge.rows[-1])

    def wrong(i):
        out, lse = call(i)
        out[last, 3] += 1
        return out, lse

    def not_finite(i):
        out, lse = call(i)
        unseen = next(row for row in range(len(LENGTHS)) if row not in judge.rows.tolist())
        out[unseen, 0, 0, 5] = torch.nan
        return out, lse

    assert "64 of" in judge.wrong(wrong, "reference", False)
    assert judge.wrong(not_finite, "reference", False) == "1 elements of out are not finite"


def test_what_a_problem_asks_of_the_bits_reaches_the_backend(step, monkeypatch):
    q, cache, judge = step
    reference, asked = backends.get("reference"), []
    real = type(reference).run_paged
    monkeypatch.setattr(type(reference), "batch_invariant", True)
    monkeypatch.setattr(type(reference), "run_paged", lambda self, q, cache, problem, *more: asked.append(problem)
                        or real(self, q, cache, problem, *more))  # fmt: skip
    for wanted in (False, True):
        problem = PROBLEM.with_(batch_invariant=wanted)
        call = pages_way("ours", "reference", q, [cache], problem, judge, {}).make()
        assert judge.wrong(call, "reference", False) is None
        assert (asked[-1].batch_invariant, asked[-1].seqlen_k) == (wanted, cache.max_pages * cache.page_size)


def test_a_backend_that_is_not_here_is_said_once(step, latencies):
    q, cache, judge = step
    ways = [contests.peer_way(f"peer {n}", q, [cache], PROBLEM, judge) for n in (1, 2)]
    if not torch.cuda.is_available():
        book = Book(Ledger(), lambda line: None)
        for _ in range(2):
            assert contest(book, "serving", ways, plan=PLAN, sets=1, data={"kv_bytes": 1}) == {}
        (only,) = book.trials
        assert only.status == "unavailable" and only.backend == "flashinfer" and only.variant is only.problem is None


def test_room_is_asked_for_on_a_gpu_alone(monkeypatch):
    contests.check_room("decode", PLAN, 1 << 60)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gpu = replace(PLAN, gpu=True)
    contests.check_room("decode", gpu, 1 << 30)
    with pytest.raises(Unsupported, match="takes 6 GiB, and 3 GiB are free"):
        contests.check_room("decode", gpu, 2 << 30)


def test_the_data_sheet_is_that_of_this_gpu(monkeypatch):
    gpu = replace(PLAN, gpu=True)
    assert contests.sheet_data(PLAN) == {}
    for name, found in (("NVIDIA H100 80GB HBM3", {"sheet_tbs": 3.35}), ("NVIDIA H200", {"sheet_tbs": 4.8}), ("?", {})):
        monkeypatch.setattr(contests.device, "gpu_name", lambda name=name: name)
        assert contests.sheet_data(gpu) == found
