"""What the records of a survey say: regret, correlation and the smallest shape, on records whose answer is known."""

from __future__ import annotations

import pytest
from support import synthetic_survey as synthetic

from flashcore.problem import PRESETS
from flashcore.records import Timing, Trial
from flashcore.surveys.cublaslt import facts, unfused_model


def candidate(case: str, rank: int, latency_us: float, workspace_bytes: int = 0, offered: int = 3, **data) -> Trial:
    data = {"group": "report", "product": f"64x64x{len(case)} f16>f16", "limit_mb": 256, "rank": rank, "split_k": 1,
            "workspace_bytes": workspace_bytes, "waves_count": 0.5, "of": offered, **data}  # fmt: skip
    data |= {"case": {"offered": offered}} if rank == 0 else {}
    return Trial(kind="gemm_candidate", backend="cublaslt", variant=case, data=data,
                 timing=Timing(method="graph_replay", latency_us=latency_us, tflops=1.0))  # fmt: skip


def test_regret_is_the_choices_time_over_the_best():
    trials = [candidate("a", 0, 3.0), candidate("a", 1, 2.0), candidate("a", 2, 5.0, workspace_bytes=1 << 20)]
    found = {r.policy: r.ratio for r in facts.regrets(trials)}
    assert found == {"first": 1.5, "largest-workspace": 2.5}
    assert {r.policy: r.ratio for r in facts.regrets(trials[::-1])} == found, "in order of rank, however they came"
    smallest = [candidate("a", rank, 3.0 - rank, group="smallest") for rank in range(3)]
    assert facts.regrets(smallest) == [], "nobody chooses there"
    again = [t.model_copy(update={"variant": "b"}) for t in trials]
    assert len(facts.regrets(trials + again)) == 2, "one product counts once"
    assert facts.regrets([candidate("a", 0, 3.0, offered=1)]) == [], "one candidate leaves no choice"
    assert [r.ratio for r in facts.regrets([candidate("a", 0, 3.0, offered=2)])] == [1, 1]
    failed = candidate("a", 0, 3.0).model_copy(update={"status": "error"})
    assert facts.regrets([failed, *trials[1:]]) == [], "without the first there is nothing to compare"


@pytest.mark.parametrize(
    ("times", "value", "words"),
    [
        ((1.0, 2.0, 3.0), 1.0, "a strong relation to time: rank correlation 1.0"),
        (
            (3.0, 2.0, 1.0),
            -1.0,
            "a strong relation to time: rank correlation −1.0 over 9 candidates of 3 products; more",
        ),
        ((2.0, 5.0, 2.0), 0.0, "no relation"),
    ],
)
def test_the_rank_correlation_of_workspace_and_time(times, value, words):
    trials = [candidate("a", rank, us, workspace_bytes=rank * 1024) for rank, us in enumerate(times)]
    found = facts.workspace_correlation(trials)
    assert found == (pytest.approx(value), 3, 1)
    few = "Only 3 candidates of 1 product differ in workspace, too few to tell whether it predicts time."
    assert facts.correlation_words(found) == few, "one product proves nothing"
    assert "of 2 products differ" in facts.correlation_words((found[0], 6, 2))
    assert words in facts.correlation_words((found[0], 9, 3))


def test_no_correlation_is_made_of_equal_workspaces_or_of_a_part_of_the_candidates():
    equal = [candidate("a", rank, 1.0 + rank) for rank in range(3)]
    assert facts.workspace_correlation(equal) is None
    assert "differ in workspace" in facts.correlation_words(None)
    part = [candidate("a", rank, 1.0 + rank, workspace_bytes=rank, offered=9) for rank in range(3)]
    assert facts.workspace_correlation(part) is None, "the few that were kept are no sample"


def test_the_smallest_shape_is_the_one_of_least_work():
    trials = synthetic.survey_trials("full")
    assert facts.smallest_shape(trials) == (16, 16, 16)
    grid = facts.small_grid(trials)
    assert grid[1, 1, 16] == "refused" and grid[8, 128, 16] == "none" and grid[16, 16, 64] == "first"
    assert facts.smallest_shape([]) is None


def attention(backend: str, latency_us: float, **changes) -> Trial:
    return synthetic.timing(backend, latency_us).model_copy(update=changes)


def test_of_attention_the_last_timing_on_a_gpu_counts():
    trials = [
        attention("cublaslt", 2600.0), attention("cublaslt", 1300.0), attention("sdpa-cudnn", 600.0),
        attention("cpu", 9000.0, timing=Timing(method="host", latency_us=9000.0, tflops=1.0)),
        attention("wmma", 1.0, status="error"), attention("hopper", 1.0, problem=PRESETS["tiny"]),
    ]  # fmt: skip
    found = facts.attention_by_backend(trials)
    assert {name: t.timing.latency_us for name, t in found.items()} == {"cublaslt": 1300.0, "sdpa-cudnn": 600.0}


def test_the_model_stands_beside_the_measurements_where_the_machines_figures_are_known():
    trials = [*synthetic.ceilings(), attention("cublaslt", 2600.0)]
    found = {limit.backend: limit for limit in facts.limits(trials, l2_bytes=60 << 20)}
    assert set(found) == set(unfused_model.VARIANTS)
    expected = PRESETS["report"].flops() / 2600.0 / 1e6
    assert found["cublaslt"].measured_tflops == pytest.approx(expected)
    assert [limit.measured_tflops for name, limit in found.items() if name != "cublaslt"] == [None] * (len(found) - 1)
    assert facts.limits(trials, l2_bytes=None) == facts.limits(trials[-1:], l2_bytes=60 << 20) == []


def test_a_pair_of_transposes_is_both_or_none():
    transposed = [candidate("transpose-page-transposed", rank, us) for rank, us in enumerate((3.0, 2.0))]
    beforehand = candidate("transpose-page-beforehand", 0, 2.5)
    found = facts.transpose_pair([*transposed, beforehand], "page")
    assert [t.timing.latency_us for t in found] == [2.0, 2.5]
    assert facts.transpose_pair(transposed, "page") is None and facts.transpose_pair([], "row") is None


def test_batches_come_in_order_each_with_its_fastest_candidate():
    trials = []
    for batch in (16, 1, 256):
        product = f"2048x128x64 b{batch} T f16>f16"
        for kind, us in (("qk", batch + 2.0), ("pv", 1.0)):
            trials += [candidate(f"batch-{kind}-{batch}", rank, us + rank, product=product) for rank in range(2)]
    found = facts.batch_points(trials, "qk")
    assert list(found) == [1, 16, 256] and [t.timing.latency_us for t in found.values()] == [3.0, 18.0, 258.0]


def test_of_equal_values_the_ranks_are_their_mean():
    assert facts._ranks([5.0, 1.0, 5.0, 9.0]).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert facts.mean([2.0, 8.0]) == pytest.approx(4.0), "the mean of ratios is geometric"


def test_the_last_facts_of_a_case_count_and_none_are_no_error():
    trials = [candidate("a", 0, 1.0, offered=3), candidate("a", 0, 1.0, offered=4), candidate("a", 1, 1.0)]
    assert facts.facts_of(trials, "a") == {"offered": 4} and facts.facts_of(trials, "b") == {}
    assert facts.fastest([]) is None


def test_a_product_whose_kernel_nobody_saw_is_not_said_to_be_without_tensor_cores():
    def word(tensor_core, others=0):
        one = candidate("a", 0, 1.0, group="smallest", product="8x8x16 f16>f16", tensor_core=tensor_core)
        one.data["case"] = {"with_tensor_core": others}
        return facts.small_grid([one])[8, 8, 16]

    assert (word(True), word(False), word(None)) == ("first", "none", "not known")
    assert word(False, 2) == word(None, 2) == "offered"
    paging = candidate("a", 0, 1.0, group="smallest", product="8x8x16 f16>f16", tensor_core=True)
    assert facts.small_grid([paging.model_copy(update={"kind": "paging"})]) == {}
