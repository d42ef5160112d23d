"""The matrix finds bugs that were planted, passes what is right, and records what raises or is missing."""

from __future__ import annotations

import pytest
import torch
from support.paging_surveys import PLAN, records

from flashcore.backends import Availability, Backend
from flashcore.paging import PagedKV, paged_reference
from flashcore.paging_survey import correctness as checking
from flashcore.paging_survey.matrix import GROUPS
from flashcore.paging_survey.measuring import measure
from flashcore.paging_survey.plan import plan_for


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


def check_only(run, monkeypatch, backend):
    monkeypatch.setattr(checking.backends, "all_backends", lambda: [backend])
    measure(run, PLAN, what="correctness")
    return records(run, "correctness")


def test_a_right_backend_passes_the_whole_matrix(run, monkeypatch):
    trials = check_only(run, monkeypatch, Paged())
    assert [t.data["group"] for t in trials] == list(GROUPS) and {t.status for t in trials} == {"ok"}
    assert all(t.data["elements"] > 0 and 0 < t.data["worst_share_of_bound"] < 1 for t in trials)


@pytest.mark.parametrize("planted", [LetsThrough, InOrder, Deaf, OneShort, Unwritten], ids=lambda c: c.__name__)
def test_a_planted_bug_is_found_and_its_first_bad_element_named(run, monkeypatch, planted):
    trials = check_only(run, monkeypatch, planted())
    failed = [t for t in trials if t.status == "failed" and t.variant is None]
    assert failed and all("cases are wrong" in t.reason for t in failed)
    cases = [t for t in trials if t.variant == "case"]
    assert cases and all("first at batch" in t.reason and t.correctness.first_bad and t.problem for t in cases)
    assert all(len([t for t in cases if t.data["group"] == group]) <= 3 for group in GROUPS)


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
