"""The limit of the unfused design: against sums done by hand, against its own properties, and against the backends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import synthetic_survey as synthetic

from flashcore.problem import PRESETS, square
from flashcore.surveys.cublaslt import unfused_model
from flashcore.surveys.cublaslt.unfused_model import (
    VARIANTS,
    Ceilings,
    Variant,
    best,
    ceilings_of,
    in_words,
    predict,
    through_memory,
)

REPORT = PRESETS["report"]
L2 = 60 << 20
RATES = Ceilings(copy_tbs=4.28, tflops=758.0, l2_tbs=6.5, node_us=0.7)


def test_one_page_by_hand():
    """One head, one page, everything through memory: each kernel's bytes over the bandwidth."""
    problem = square(1, 1, 2048, 64)
    found = predict(problem, Variant(2048, None, 2, True), Ceilings(1.0, 1e9), l2_bytes=0)
    s, qkv, accum = 2 * 2048 * 2048, 2 * 2048 * 64, 4 * 2048 * 64
    by_hand = (2 * qkv + s) + 2 * s + (s + qkv + accum) + (accum + qkv)
    assert found.memory_bytes == by_hand and found.time_us == pytest.approx(by_hand / 1e6)
    assert found.launches == 4 and found.l2_bytes == 0 and found.binds == "memory"


@pytest.mark.parametrize("page", [128, 1000, 2048])
def test_a_page_that_the_keys_do_not_fill_is_as_long_as_they_are(page):
    """Whatever the pages are, all of them do the products of the problem, and write and read its scores."""
    problem = square(1, 4, 2048, 64).with_(num_heads_kv=2, seqlen_k=2000)
    kernels = list(unfused_model._kernels(problem, page, 4, 2, 2, 2))
    assert sum(flops for _, _, flops in kernels) == problem.flops() and len(kernels) == 3 * -(-2000 // page) + 1
    scores = 4 * 2048 * 2000
    accum = 4 * 2048 * 64 * 4
    again = len(kernels) // 3 - 1  # pages that find Q, and what is added up so far, in the cache
    kept = 4 * scores * 2 + accum * (1 + 4 * again) + again * 4 * 2048 * 64 * 2 + accum
    assert sum(near for _, near, _ in kernels) == kept


def test_heads_at_once_are_whole_groups_of_those_that_share_keys():
    def heads(variant: Variant, l2_bytes: int = L2) -> int:
        return unfused_model._heads(variant, REPORT, 2048, 2, l2_bytes, 32, 4)

    assert [heads(Variant(2048, n, 2, True)) for n in (None, 1, 6, 9, 100)] == [32, 4, 4, 8, 32]
    fitting = int(unfused_model.RESIDENT_SHARE * L2 / (2048 * 2048 * 2))
    assert heads(Variant(2048, 0, 2, True)) == max(4, fitting // 4 * 4)


def test_scores_through_memory_bound_the_reports_workload_near_137_tflops():
    """Four passes of two bytes a score at 4.28 TB/s are 137 TFLOPS; Q, K, V, accum and out cost a little more."""
    found = through_memory(REPORT, Ceilings(4.28, 758.0))
    passes = 4 * 2 * 256 * 2048 * 2048 / 4.28 / 1e6
    assert 137.0 == pytest.approx(REPORT.flops() / passes / 1e6, rel=0.01)
    assert 0.9 * 137 < found.tflops < 137


def test_one_launch_a_head_and_page_is_bound_by_launches():
    found = predict(REPORT, VARIANTS["cublaslt-loop"], RATES, l2_bytes=L2)
    assert found.launches == 256 * (16 * 3 + 1) and found.binds == "launches"
    assert found.time_us >= 0.999 * found.launches * RATES.node_us
    assert "launches" in in_words(found) and "%" in in_words(found)


def test_the_terms_sum_to_the_time_and_rates_only_help():
    for variant in VARIANTS.values():
        found = predict(REPORT, variant, RATES, l2_bytes=L2)
        assert sum(found.terms_us.values()) == pytest.approx(found.time_us)
        assert set(found.terms_us) == set(unfused_model.TERMS)
        faster = Ceilings(2 * RATES.copy_tbs, 2 * RATES.tflops, 2 * RATES.l2_tbs, RATES.node_us / 2)
        assert predict(REPORT, variant, faster, l2_bytes=L2).time_us == pytest.approx(found.time_us / 2)
        free = Ceilings(RATES.copy_tbs, RATES.tflops, None, RATES.node_us)
        assert predict(REPORT, variant, free, l2_bytes=L2).time_us <= found.time_us, "an unknown L2 keeps it a bound"
        assert found.tflops < RATES.tflops


def test_causal_pages_that_nobody_sees_cost_nothing():
    variant = Variant(128, None, 2, True)
    dense, causal = (predict(PRESETS[n], variant, RATES, l2_bytes=0) for n in ("report", "report-causal"))
    assert 0.45 < causal.time_us / dense.time_us < 0.62


def test_grouped_heads_read_k_and_v_once():
    variant = Variant(2048, None, 2, True)
    grouped = predict(square(1, 8, 2048, 64).with_(num_heads_kv=2), variant, RATES, l2_bytes=0)
    assert grouped.memory_bytes == predict(square(1, 8, 2048, 64), variant, RATES, l2_bytes=0).memory_bytes - (
        2 * 6 * 2048 * 64 * 2
    )


def test_the_best_cut_is_no_worse_than_any_variant_and_prefers_the_cache():
    cut, found = best(REPORT, RATES, l2_bytes=L2)
    assert found.l2_bytes > found.memory_bytes and found.tflops > through_memory(REPORT, RATES).tflops
    for variant in VARIANTS.values():
        assert found.time_us <= predict(REPORT, variant, RATES, l2_bytes=L2).time_us
    assert cut.page_size in unfused_model.PAGES


def test_the_rates_come_from_the_ceilings_of_the_records():
    assert ceilings_of(synthetic.ceilings()) == Ceilings(4.0, 700.0, 6.0, 0.8)
    assert ceilings_of(synthetic.ceilings(), "bfloat16") is None
    cpu = [t.model_copy(update={"data": {**t.data, "unit": "GB/s"}}) for t in synthetic.ceilings()]
    assert ceilings_of(cpu) is None, "a CPU's ceilings say nothing of this design"
    huge = [t.model_copy(update={"data": {**t.data, "value": 10**400}}) for t in synthetic.ceilings()]
    assert ceilings_of(huge) is None, "beyond what a float holds"
    assert ceilings_of([t for t in synthetic.ceilings() if "l2" not in t.data["name"]]).l2_tbs is None


def test_the_variants_are_those_of_the_backends():
    """The model cannot import the backends (torch); what it says of them is held here."""
    from flashcore import backends

    known = {b.id: b for b in backends.all_backends() if b.id.startswith("cublaslt")}
    assert set(VARIANTS) <= set(known)
    for name, variant in VARIANTS.items():
        backend = known[name]
        assert (variant.page_size, variant.heads) == (backend.pages_of, backend.heads_at_once), name
        assert variant.score_bytes == (4 if backend.wide_scores else 2), name
        assert variant.in_place is not backend.wide_scores, name
        assert variant.lanes == backend.lanes, name
    from flashcore.backends import cublaslt

    assert (unfused_model.RESIDENT_SHARE, unfused_model.LARGEST_PAGE) == (
        cublaslt.RESIDENT_SHARE, cublaslt.LARGEST_PAGE
    )  # fmt: skip


def test_lanes_hide_launches_but_share_the_bandwidth():
    loop = VARIANTS["cublaslt-loop"]
    one, two = (predict(REPORT, replace(loop, lanes=n), RATES, l2_bytes=L2) for n in (1, 2))
    assert two.time_us == pytest.approx(one.time_us / 2) and two.launches == one.launches
    resident = Variant(2048, 2, 2, True)
    many = predict(REPORT, replace(resident, lanes=3), RATES, l2_bytes=L2)
    assert many.time_us == pytest.approx(many.l2_bytes / RATES.l2_tbs / 1e6) and many.binds == "L2"
    crowded = predict(REPORT, replace(resident, lanes=8), RATES, l2_bytes=L2)
    assert crowded.l2_bytes == 0, "eight groups at once do not fit the cache"
