"""The views of a survey: their numbers against invented records whose answer is known, and their markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from support import synthetic_survey as synthetic

from flashcore.page.drawing import survey_views
from flashcore.records import Trial
from flashcore.surveys.cublaslt import facts

L2 = 60 << 20
VIEWS = [
    survey_views.workspace_html, survey_views.regret_html, survey_views.smallest_html, survey_views.transpose_html,
    survey_views.batch_html, survey_views.report_html, survey_views.cublas_html, survey_views.labels_html,
]  # fmt: skip


@pytest.mark.slow
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
