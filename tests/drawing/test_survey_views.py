"""The views of a survey: their numbers against invented records whose answer is known, and their markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from support import synthetic_survey as synthetic

from flashcore.drawing import survey_views
from flashcore.records import Timing, Trial
from flashcore.survey import facts

L2 = 60 << 20
VIEWS = [
    survey_views.workspace_html, survey_views.regret_html, survey_views.smallest_html, survey_views.transpose_html,
    survey_views.batch_html, survey_views.report_html, survey_views.cublas_html, survey_views.labels_html,
]  # fmt: skip


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
        ((3.0, 2.0, 1.0), -1.0, "more workspace is faster"),
        ((2.0, 5.0, 2.0), 0.0, "no relation"),
    ],
)
def test_the_rank_correlation_of_workspace_and_time(times, value, words):
    trials = [candidate("a", rank, us, workspace_bytes=rank * 1024) for rank, us in enumerate(times)]
    found = facts.workspace_correlation(trials)
    assert found == (pytest.approx(value), 3, 1)
    assert "too few to tell" in facts.correlation_words(found), "one product proves nothing"
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


def test_the_views_draw_what_there_is():
    trials = synthetic.everything()
    pages = [view(trials) for view in VIEWS[:-1]] + [survey_views.limit_html(trials, l2_bytes=L2)]
    for html in pages:
        assert "fc-none" not in html and "nan" not in html.lower().replace("nanosecond", "")
        for svg in re.findall(r"<svg.*?</svg>", html, flags=re.S):
            ElementTree.fromstring(svg)
            assert 'role="img"' in svg and len(re.search(r'aria-label="([^"]*)"', svg)[1]) > 60
            assert "xlink" not in svg and "<style" not in svg
    heat = pages[2]
    assert ">refused<" in heat and ">yes<" in heat and ">no<" in heat, "words in the cells, not colour alone"


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_without_records_says_which_command_measures_them(view):
    assert "flashcore survey" in view([]) and "fc-none" in view([])


def test_the_reports_case_stands_beside_what_it_printed():
    html = survey_views.report_html(synthetic.everything(), gpu="SYNTHETIC H200")
    for text in ("0.2424", "1024 KB", "0.45 TFLOPS", "all 0 KB", "7.64 TFLOPS", "4 of 4", "SYNTHETIC H200"):
        assert text in html, text


def test_text_of_a_record_is_escaped():
    trial = synthetic.survey_trials("quick")[0]
    hostile = trial.model_copy(update={"data": {**trial.data, "kernel": "<script>alert(1)</script>"}})
    proof = trial.model_copy(update={"data": {**hostile.data, "group": "label-proof", "policy": "<b>"}})
    html = survey_views.report_html([hostile]) + survey_views.labels_html([proof])
    assert "<script>" not in html and "<b>" not in html


def test_a_wrong_label_is_said_in_words():
    proof = Trial(kind="gemm_candidate", backend="cublaslt", status="failed", reason="another ran",
                  data={"group": "label-proof", "policy": "first", "product": "1x1x1 f16>f16"})  # fmt: skip
    assert "IS NOT: another ran" in survey_views.labels_html([proof])


def test_the_limit_needs_the_machines_ceilings():
    trials = synthetic.everything()
    assert "not in these records" in survey_views.limit_html(synthetic.survey_trials("quick"), l2_bytes=L2)
    assert "not in these records" in survey_views.limit_html(trials, l2_bytes=None)
    found = {one.backend: one for one in facts.limits(trials, l2_bytes=L2)}
    assert found["cublaslt"].measured_tflops == pytest.approx(105.7, abs=0.1)
    assert all(one.measured_tflops < one.prediction.tflops for one in found.values())
