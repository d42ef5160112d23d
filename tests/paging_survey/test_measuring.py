"""The survey of paging: plans, the matrix that has to find bugs, every measurement whole on the CPU, failures kept."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.backends import Availability, Backend
from flashcore.errors import UnknownName
from flashcore.paging import AllPages, PagedKV, TopK, paged_reference
from flashcore.paging_survey import append as appending
from flashcore.paging_survey import correctness as checking
from flashcore.paging_survey import decode as decoding
from flashcore.paging_survey import facts, measuring
from flashcore.paging_survey.caches import dense_of, held_slots, random_cache, rows_of
from flashcore.paging_survey.expected import by_positions, expect
from flashcore.paging_survey.matrix import GROUPS, POLICIES, PagedCase, make, paged_cases
from flashcore.paging_survey.measuring import ON_CPU, WHATS, measure
from flashcore.paging_survey.plan import ModelShape, decode_problem, plan_for
from flashcore.paging_survey.read_speed import NAME, read_speed
from flashcore.paging_survey.trials import compact, over
from flashcore.records import Timing

PLAN = plan_for("quick", False)


def records(run, what):
    return facts.paging_trials(run.trials(), what)


# --- the plan and the matrix -----------------------------------------------------------------------------------------


def test_a_plan_on_a_gpu_holds_the_shapes_that_are_asked_for():
    full, quick = plan_for("full", True), plan_for("quick", True)
    assert [p.label() for p in full.decode] == [
        "B=64,H=32,Hkv=8,Sq=1,Sk=4096,D=128", "B=16,H=16,Sq=1,Sk=8192,D=64", "B=1,H=32,Hkv=8,Sq=1,Sk=32768,D=128",
    ]  # fmt: skip
    assert full.shares == (1.0, 0.5, 0.3, 0.1) and full.append.batch == 64
    assert full.batches == (1, 2, 4, 8, 16, 32, 64, 128, 256) and set(quick.batches) < set(full.batches)
    model, report = full.models
    assert (model.layers, model.stated_batch, model.context) == (32, 64, 8192) and report.layers == 1
    assert plan_for("quick", True, report_layers=24).models[1].words().startswith("24 layers, 16 query heads")
    with pytest.raises(UnknownName, match="quick, full"):
        plan_for("fast", True)


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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("causal", [True, False])
def test_two_references_that_share_no_line_agree(policy, causal):
    case = PagedCase("random", (130, 3, 0, 64), page_size=32, q_tokens=5, policy=policy, causal=causal, dropped=(1,))
    q, cache = make(case, "cpu")
    selection = POLICIES[policy].select(q, cache) if POLICIES[policy] else None
    for mine, theirs in zip(by_positions(q, cache, selection, causal=causal),
                            paged_reference(q, cache, selection, causal=causal), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


# --- planted bugs ----------------------------------------------------------------------------------------------------


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


# --- every measurement on the CPU ------------------------------------------------------------------------------------


@pytest.fixture
def surveyed(run):
    """Everything, times included, at the CPU's sizes."""
    said = []
    trials = measure(run, PLAN, what=",".join(WHATS), progress=said.append)
    assert trials == [t for t in run.trials() if t.kind == "paging"]
    assert {line.split(":")[0] for line in said} == set(WHATS)
    return run


def test_a_whole_survey_on_the_cpu(surveyed):
    trials = facts.paging_trials(surveyed.trials())
    assert {t.status for t in trials} == {"ok"} and {t.data["what"] for t in trials} == set(WHATS)
    memory = {t.data["case"]: t.data["saved_percent"] for t in records(surveyed, "memory")}
    assert memory == {"shared_prefix": pytest.approx(70.3, abs=0.05), "mixed_lengths": pytest.approx(47.1, abs=0.05),
                      "no_sharing": pytest.approx(-0.8, abs=0.05)}  # fmt: skip
    assert all("resident K and V pages" in t.data["definition"] for t in records(surveyed, "memory"))
    decode = records(surveyed, "decode")
    assert len({t.timing.round for t in decode}) == 1, "what is compared was interleaved"
    assert len({t.problem for t in decode}) == 1 and decode[0].problem.page_size == PLAN.page_size
    by_name = {t.variant: t for t in decode}
    assert by_name["top_k 50 %"].data["pages_share"] == 0.5 and by_name["top_k 30 %"].data["pages_share"] == 3 / 8
    assert by_name["sink_window 30 %"].data["kv_bytes"] == by_name["top_k 30 %"].data["kv_bytes"]
    every = by_name["all pages"]
    assert every.data["of_dense"] == 1 and every.data["of_floor"] == pytest.approx(
        every.data["floor_us"] / every.timing.latency_us, rel=1e-3)  # fmt: skip
    assert every.data["over_peer"] > 0 and "sdpa-math" in every.data["peer"]
    assert {"dense", "dense, group as rows"} <= set(by_name)
    tokens = records(surveyed, "tokens")[-1]
    assert tokens.data["tokens_per_s"] == pytest.approx(2 / (2 * tokens.timing.latency_us) * 1e6, rel=1e-3)
    assert tokens.data["stated"] is True and tokens.data["definition"].startswith("attention only, batch 2, 2 layers")


def test_the_records_are_compact(surveyed):
    sizes = [len(line) for line in surveyed.records_path.read_text().splitlines()]
    assert max(sizes) < 1000 and sum(sizes) < 50_000
    assert all(len(t.timing.samples_us) <= 10 for t in surveyed.trials() if t.timing)


def test_a_lost_needle_shows_and_a_found_one_too(surveyed):
    at = {(t.data["pattern"], t.data["policy"]): t for t in records(surveyed, "accuracy") if t.data["share"] == 0.3}
    assert facts.verdict_on_needle(at["needle", "sink_window"]) == "LOST"
    assert facts.verdict_on_needle(at["needle", "top_k"]) == "FOUND"
    assert at["needle", "sink_window"].data["mass_mean"] < 0.1 < 0.8 < at["needle", "top_k"].data["mass_least"]
    assert at["drifting", "sink_window"].data["mass_mean"] > 0.9
    assert len(at) == 10


def test_all_leaves_out_on_the_cpu_what_says_nothing_there():
    assert measuring.chosen("all", False) == list(ON_CPU) and measuring.chosen("all", True) == list(WHATS)
    assert measuring.chosen("tokens, memory", False) == ["memory", "tokens"]
    with pytest.raises(UnknownName, match="no measurement of paging 'speed'"):
        measuring.chosen("speed", True)


def test_a_wrong_step_is_timed_and_counts_for_nothing(run, monkeypatch):
    real = decoding.Inputs.call

    def call(self, step, i):
        out, lse = real(self, step, i)
        return (out + 1, lse) if step.name == "all pages" else (out, lse)

    monkeypatch.setattr(decoding.Inputs, "call", call)
    trials = {t.variant: t for t in measure(run, PLAN, what="decode")}
    assert trials["all pages"].status == "failed" and "counts for nothing" in trials["all pages"].reason
    assert trials["top_k 50 %"].status == "ok" and "of_dense" not in trials["top_k 50 %"].data


def test_what_is_missing_or_breaks_is_a_record_and_the_rest_goes_on(run, monkeypatch):
    from dataclasses import replace

    gone = replace(PLAN, decode_backend="no-such-kernel", prefill_backend="no-such-kernel")
    monkeypatch.setattr(appending, "_check", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    trials = measure(run, gone, what="decode,prefill,append,tokens,memory")
    of = {what: [t for t in trials if t.data["what"] == what] for what in WHATS}
    assert {t.status for t in of["decode"] if t.backend == "no-such-kernel"} == {"unavailable"}
    assert {t.status for t in of["decode"] if t.backend == "sdpa-math"} == {"ok"}
    assert {t.status for t in of["tokens"]} == {"unavailable"} and "no-such-kernel" in of["tokens"][0].reason
    assert of["prefill"][0].status == "unavailable"
    assert of["append"][0].status == "error" and of["append"][0].reason == "RuntimeError: out of memory"
    assert len(of["memory"]) == 3


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_read_speed_is_measured_once_a_run(run):
    first = read_speed(run)
    assert first.kind == "ceiling" and first.data["name"] == NAME and first.data["unit"] == "TB/s"
    assert first.data["value"] > 0
    assert read_speed(run).data == first.data and len(run.trials(kind="ceiling")) == 1


def test_a_random_caches_rows_and_dense_copies_hold_the_same_keys():
    cache = random_cache(4, 96, 2, 16, page_size=32, dtype=torch.float16, device="cpu")
    assert cache.page_table.flatten().tolist() != list(range(12)), "pages lie in any order"
    part = rows_of(cache, 2, 2)
    k, v = dense_of(part, 96)
    q = torch.randn(2, 4, 1, 16).half()
    paged, _ = paged_reference(q, part, causal=False)
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    torch.testing.assert_close(paged, want)


def test_bounds_let_rounding_through_and_nothing_more():
    q, cache = make(PagedCase("random", (200, 7), page_size=16, q_tokens=2), "cpu")
    wanted = expect(q, cache, AllPages().select(q, cache))
    out, lse = paged_reference(q, cache)
    assert wanted.judge(out.to(q.dtype), lse.float())[0].passed
    off = out.to(q.dtype)
    off[1, 3, 1, 5] += 0.05
    judged, reason = wanted.judge(off, lse.float())
    assert judged.first_bad["head"] == 3 and "batch 1, head 3, row 1, column 5" in reason
    assert not wanted.judge(out.to(q.dtype), lse.float() + 0.01)[0].passed
    assert "expected torch.float16" in wanted.judge(out, None)[1]


def test_ratios_are_of_samples_of_one_round():
    ours = Timing(method="graph_replay", latency_us=2.0, samples_us=[2.0, 4.0, 2.0], round="a")
    theirs = Timing(method="graph_replay", latency_us=3.0, samples_us=[3.0, 6.0, 3.0], round="a")
    assert over(ours, theirs) == (1.5, [1.5, 1.5])
    assert compact(ours).samples_us == [2.0, 4.0, 2.0] and compact(ours).model_extra["n"] == 3


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_measurement_on_a_gpu_at_small_sizes(run):
    from dataclasses import replace

    from flashcore.problem import square

    plan = replace(
        plan_for("quick", True), decode=(decode_problem(4, 8, 2, 1024, 128),), prefill=(square(2, 4, 512, 64),),
        append=decode_problem(8, 2, 2, 100, 64), accuracy=PLAN.accuracy, rounds=5, batches=(1, 2),
        models=(ModelShape("tiny", 2, 8, 2, 128, 1024, stated_batch=2),),
    )  # fmt: skip
    trials = measure(run, plan, what="memory,decode,prefill,append,accuracy,tokens")
    wrong = [(t.data, t.backend, t.reason) for t in trials if t.status in ("failed", "error")]
    assert wrong == []
    assert all(t.timing.method == "graph_replay" for t in trials if t.timing)
    speed = next(t for t in run.trials(kind="ceiling") if t.data["name"] == NAME)
    assert 1.0 < speed.data["value"] < 10.0, "TB/s"


@pytest.mark.gpu
def test_the_matrix_on_a_gpu(run):
    trials = measure(run, plan_for("quick", True), what="correctness")
    assert [(t.backend, t.reason) for t in trials if t.status in ("failed", "error")] == []


@pytest.mark.gpu
def test_a_selection_can_be_captured_with_the_step_that_uses_it():
    cache = random_cache(2, 512, 2, 64, page_size=64, dtype=torch.float16, device="cuda")
    q = torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.float16)
    selection = TopK(share=0.5).select(q, cache)
    out, _ = backends.get("reference").run_paged(q, cache, checking.paged_problem_of(q, cache), selection)
    assert bool(out.isfinite().all())
