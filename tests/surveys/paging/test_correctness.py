"""The matrix finds bugs that were planted, passes what is right, and records what raises or is missing."""

from __future__ import annotations

import functools

import pytest
import torch
from support.paging_surveys import PLAN, records

from flashcore.backends import Availability, Backend
from flashcore.errors import Unsupported
from flashcore.paging import PagedKV, paged_reference
from flashcore.surveys.paging import correctness as checking
from flashcore.surveys.paging import expected as expecting
from flashcore.surveys.paging.matrix import GROUPS, paged_cases
from flashcore.surveys.paging.measuring import measure
from flashcore.surveys.paging.plan import plan_for
from flashcore.surveys.paging.trials import Book


class Paged(Backend):
    """The reference under another name and role, for bugs to be planted in."""

    id, title, role, device, paged = "planted", "a planted bug", "ours", "any", True

    def run(self, q, k, v, problem):
        raise NotImplementedError

    def run_paged(self, q, cache, problem, selection=None):
        out, lse = paged_reference(q, cache, selection, causal=problem.causal)
        return out.to(q.dtype), lse.float()


class LetsThrough(Paged):
    """Multiplies what lies past the length by probability 0."""

    def run_paged(self, q, cache, problem, selection=None):
        out, lse = super().run_paged(q, cache, problem, selection)
        last = cache.page_table[0, (cache.lengths[0].clamp(min=1) - 1) // cache.page_size]
        return out + 0 * cache.v_pool[last.clamp(min=0), 0, -1, 0], lse


class InOrder(Paged):
    """Takes page j of the pool for logical page j."""

    def run_paged(self, q, cache, problem, selection=None):
        columns = torch.arange(cache.max_pages, dtype=torch.int32).expand(cache.batch, -1) % cache.num_pages
        table = torch.where(cache.page_table >= 0, columns, cache.page_table).contiguous()
        cache = PagedKV(cache.k_pool.nan_to_num(), cache.v_pool.nan_to_num(), table, cache.lengths)
        return super().run_paged(q, cache, problem, selection)


class Deaf(Paged):
    """Does not heed the selection."""

    def run_paged(self, q, cache, problem, selection=None):
        return super().run_paged(q, cache, problem, None)


class OneShort(Paged):
    """Leaves the last token of each sequence out."""

    def run_paged(self, q, cache, problem, selection=None):
        shorter = PagedKV(cache.k_pool, cache.v_pool, cache.page_table, (cache.lengths - 1).clamp(min=0))
        return super().run_paged(q, shorter, problem, None)


class Unwritten(Paged):
    """Never writes the last query head."""

    def run_paged(self, q, cache, problem, selection=None):
        out, lse = super().run_paged(q, cache, problem, selection)
        out[:, -1] = torch.nan
        return out, lse


class Raises(Paged):
    def run_paged(self, q, cache, problem, selection=None):
        raise RuntimeError("an illegal memory access")


class Gone(Paged):
    def availability(self):
        return Availability(False, "no GPU is here", "bring one")


class Picky(Paged):
    def why_not_paged(self, problem, *, selected=False):
        return "it takes no selection" if selected else None


@pytest.fixture(scope="session")
def worked_out():
    """`make` and `expect` that remember: a case and what it has to give are the same whichever bug is planted."""
    make, expect = functools.cache(checking.make), checking.expect
    known = {}

    def expected(q, cache, selection, *, causal, round_scores, exact):
        # `make` keeps its tensors, so that `q` tells the case; the policy of a case always selects the same pages.
        assert exact is None, "only the backend of role `reference` brings results of its own"
        key = (id(q), causal, round_scores)
        if key not in known:
            known[key] = expect(q, cache, selection, causal=causal, round_scores=round_scores)
        return known[key]

    return make, expected


@pytest.fixture
def each_case_once(monkeypatch, worked_out):
    for name, remembers in zip(("make", "expect"), worked_out, strict=True):
        monkeypatch.setattr(checking, name, remembers)


def check_only(run, monkeypatch, backend):
    monkeypatch.setattr(checking.backends, "all_backends", lambda: [backend])
    measure(run, PLAN, what="correctness")
    return records(run, "correctness")


@pytest.mark.slow
@pytest.mark.usefixtures("each_case_once")
def test_a_right_backend_passes_the_whole_matrix(run, monkeypatch):
    trials = check_only(run, monkeypatch, Paged())
    assert [t.data["group"] for t in trials] == list(GROUPS) and {t.status for t in trials} == {"ok"}
    assert all(t.data["elements"] > 0 and 0 < t.data["worst_share_of_bound"] < 1 for t in trials)


@pytest.mark.usefixtures("each_case_once")
@pytest.mark.parametrize("planted", [LetsThrough, InOrder, Deaf, OneShort, Unwritten], ids=lambda c: c.__name__)
@pytest.mark.slow
def test_a_planted_bug_is_found_and_its_first_bad_element_named(run, monkeypatch, planted):
    trials = check_only(run, monkeypatch, planted())
    failed = [t for t in trials if t.status == "failed" and t.variant is None]
    assert failed and all("cases are wrong" in t.reason for t in failed)
    cases = [t for t in trials if t.variant == "case"]
    assert cases and all("first at batch" in t.reason and t.correctness.first_bad and t.problem for t in cases)
    assert all(len([t for t in cases if t.data["group"] == group]) <= 3 for group in GROUPS)


@pytest.mark.usefixtures("each_case_once")
@pytest.mark.slow
def test_what_raises_is_missing_or_is_not_supported_says_so(run, monkeypatch):
    trials = check_only(run, monkeypatch, Raises())
    assert {t.status for t in trials} == {"error", "failed"} and "illegal memory access" in trials[0].reason
    run.records_path.write_text("")
    (gone,) = check_only(run, monkeypatch, Gone())
    assert gone.status == "unavailable" and "bring one" in gone.reason
    run.records_path.write_text("")
    by_group = {t.data["group"]: t for t in check_only(run, monkeypatch, Picky())}
    assert by_group["policies"].data["unsupported"] and by_group["policies"].status == "ok"


@pytest.mark.gpu
def test_the_matrix_on_a_gpu(run):
    trials = measure(run, plan_for("quick", True), what="correctness")
    assert [(t.backend, t.reason) for t in trials if t.status in ("failed", "error")] == []


class Wide(Paged):
    """Takes no bfloat16 when asked, and finds out too late that it takes no selection."""

    def why_not_paged(self, problem, *, selected=False):
        return "it takes no bfloat16" if problem.dtype == "bfloat16" else None

    def run_paged(self, q, cache, problem, selection=None):
        if selection is not None:
            raise Unsupported(self.id, "it takes no selection")
        return super().run_paged(q, cache, problem)


@pytest.mark.slow
@pytest.mark.usefixtures("each_case_once")
def test_what_is_not_supported_is_counted_and_neither_right_nor_wrong(run, monkeypatch):
    trials = {t.data["group"]: t for t in check_only(run, monkeypatch, Wide())}
    assert all(t.data["wrong"] == 0 for t in trials.values())
    some = [group for group, t in trials.items() if t.data["right"]]
    assert {trials[group].status for group in some} == {"ok"} and set(GROUPS) - set(some) == {"random"}
    assert trials["random"].status == "unsupported" and trials["random"].reason.startswith("it takes no ")
    assert (trials["policies"].data["right"], trials["policies"].data["unsupported"]) == (2, 6)
    assert trials["page sizes"].data["unsupported"] == 0 < trials["random"].data["unsupported"]


def test_a_group_without_a_case_that_ran_says_why(run):
    book = Book(run, lambda line: None)
    none = checking._write(book, Paged(), "heads", checking.Tally())
    assert (none.status, none.reason) == ("unsupported", "no case of this group was run")
    refused = checking._write(
        book, Paged(), "heads", checking.Tally(unsupported=2, reasons=["it is old", "it is slow"])
    )
    assert (refused.status, refused.reason) == ("unsupported", "it is old")
    mixed = checking._write(book, Paged(), "heads", checking.Tally(right=3, wrong=1, reasons=["row 5 is off"]))
    assert (mixed.status, mixed.reason) == ("failed", "1 of 4 cases are wrong: row 5 is off")
    endless = checking._write(book, Paged(), "heads", checking.Tally(right=1, worst_share=float("inf")))
    assert endless.data["worst_share_of_bound"] == -1.0


def one_short(q, cache, selection=None, *, causal=True):
    """`paged_reference` with a bug: it leaves the last token of each sequence out."""
    shorter = PagedKV(cache.k_pool, cache.v_pool, cache.page_table, (cache.lengths - 1).clamp(min=0))
    return paged_reference(q, shorter, None, causal=causal)


class Truth(Paged):
    """The role of `paged_reference`, bug and all."""

    role, attention = "reference", staticmethod(paged_reference)

    def run_paged(self, q, cache, problem, selection=None):
        out, lse = self.attention(q, cache, selection, causal=problem.causal)
        return out.to(q.dtype), lse.float()


def test_the_reference_itself_is_held_against_keys_picked_one_by_one(run, monkeypatch):
    """Were it held against itself, no bug of it could show."""
    few = [c for c in paged_cases("quick", False) if c.group == "heads"]
    monkeypatch.setattr(checking, "paged_cases", lambda profile, gpu, *, seed: few)
    monkeypatch.setattr(checking, "GROUPS", ("heads",))
    (right,) = check_only(run, monkeypatch, Truth())
    assert right.status == "ok" and right.data["right"] == len(few) == 6
    run.records_path.write_text("")
    monkeypatch.setattr(expecting, "paged_reference", one_short)
    monkeypatch.setattr(Truth, "attention", staticmethod(one_short))
    *_, wrong = check_only(run, monkeypatch, Truth())
    assert wrong.status == "failed" and wrong.data["wrong"] == len(few)
