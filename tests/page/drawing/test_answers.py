"""The seven answers: worked out from records, so other records give other answers, and missing ones name a command."""

from __future__ import annotations

import pytest
from support import synthetic_survey as synthetic

from flashcore.decision import compare
from flashcore.page.drawing.answers import answers, answers_html
from flashcore.records import Trial


def of(trials, environment=synthetic.ENVIRONMENT) -> list[str]:
    return [" ".join(a.sentences) for a in answers(trials, environment=environment)]


@pytest.mark.slow
def test_the_seven_questions_are_answered_in_two_sentences_with_a_figure():
    found = answers(synthetic.everything(), environment=synthetic.ENVIRONMENT)
    assert len(found) == 7 and not any(a.missing for a in found)
    for answer in found:
        assert answer.question.endswith("?") and len(answer.sentences) == 2
        assert all(s.endswith(".") and "None" not in s and "nan" not in s for s in answer.sentences)
        assert answer.figures and all("fc-none" not in f for f in answer.figures)
        assert answer.trials
    html = answers_html(found)
    assert html.count("<li>") == 7 and "<svg" in html and "<svg" not in answers_html(found, figures=False)


@pytest.mark.slow
def test_the_figures_in_the_sentences_are_those_of_the_records():
    said = of(synthetic.everything())
    assert "cuBLASLt 13.1.0 offers 4 candidates for it, 0 of which ask for workspace, and 4 of 4 run" in said[0]
    assert "M=16, N=16, K=16 is the smallest of 72 shapes" in said[1] and "2 are refused" in said[1]
    assert "no slower and no faster" in said[2] and "does not matter" in said[2]
    assert "for 6 of 6 products" in said[3] and "takes 3.17 µs" in said[3]
    assert "36.0 ms (7.64 TFLOPS)" in said[4] and "13.8 times as fast" in said[4]
    assert "From nowhere: 2 checks" in said[5] and "2,000,000 values" in said[5]
    assert "sdpa-cudnn, reached 458" in said[6]


def test_missing_records_name_the_command_that_measures_them():
    found = answers([])
    assert all(a.missing and len(a.sentences) == 1 and "'flashcore " in a.sentences[0] for a in found)
    assert "fc-none" in answers_html(found)
    only_survey = answers(synthetic.survey_trials("quick"))
    assert [a.missing for a in only_survey] == [False, False, False, False, False, True, True]
    assert "flashcore report" in only_survey[4].sentences[1]


def change(trials, test, **data) -> list[Trial]:
    return [t.model_copy(update={"data": {**t.data, **data}}) if test(t) else t for t in trials]


@pytest.mark.slow
def test_without_tensor_cores_the_answer_says_so():
    trials = change(synthetic.everything(), lambda t: t.kind == "gemm_candidate", tensor_core=False)
    trials = [
        t.model_copy(update={"data": {**t.data, "case": {**t.data["case"], "with_tensor_core": 0}}})
        if "case" in t.data else t
        for t in trials
    ]  # fmt: skip
    said = of(trials)
    assert "0 of 4 run on Tensor Cores" in said[0] and "None of the 72 shapes" in said[1]


@pytest.mark.slow
def test_workspace_that_buys_nothing_but_splitting_is_not_claimed_when_it_is_otherwise():
    trials = synthetic.everything()
    unsplit = change(trials, lambda t: t.data.get("split_k", 0) > 1, split_k=1)
    assert "do not split the sum over K either" in of(unsplit)[0]
    none = change(trials, lambda t: "workspace_bytes" in t.data, workspace_bytes=0)
    assert "no product of the survey was offered a kilobyte" in of(none)[0]


@pytest.mark.slow
def test_a_transpose_that_costs_is_said_to_matter():
    slow = []
    for trial in synthetic.everything():
        if trial.variant == "transpose-page-transposed":
            trial = trial.model_copy(update={"timing": trial.timing.model_copy(update={"latency_us": 8.0})})
        slow.append(trial)
    said = of(slow)[2]
    assert "times as slow as the latter" in said and "the transpose matters there" in said
    in_its_own = min(t.timing.latency_us for t in slow if t.variant == "report-qk")
    assert f"the very product takes {compare.number(in_its_own)} µs; only times of one part are compared" in said
    assert "the very product" not in of([t for t in slow if t.variant != "report-qk"])[2]


@pytest.mark.slow
def test_nan_in_a_check_is_reported_where_it_is():
    trials = [*synthetic.everything(), synthetic.check("cublaslt", passed=False, num_bad=7, num_nan=5, num_inf=2)]
    assert "1 of 3 checks hold NaN or Inf, most in cublaslt" in of(trials)[5] and "5 NaN and 2 Inf" in of(trials)[5]


@pytest.mark.slow
@pytest.mark.parametrize(("outcome", "count"), [("found", 1), ("missed", 0)])
def test_planted_bugs_back_the_answer_on_nan(outcome, count):
    data = {"fault": "F2", "expected_stage": "probs", "outcome": outcome}
    said = of([*synthetic.everything(), Trial(kind="fault", backend="cublaslt", data=data)])[5]
    assert f"planted 1 times and found at their own stage {count} times" in said
    assert ("F2 at probs" in said) == bool(count)


@pytest.mark.slow
def test_a_failed_timing_answers_nothing():
    trials = [t.model_copy(update={"status": "failed"}) if t.kind == "attention_timing" else t
              for t in synthetic.everything()]  # fmt: skip
    assert "No cuBLASLt variant was timed" in of(trials)[6]


@pytest.mark.slow
def test_a_questions_text_cannot_leave_its_place():
    trials = change(synthetic.everything(), lambda t: t.backend == "cublas", kernel="<script>")
    assert "<script>" not in answers_html(answers(trials, environment=synthetic.ENVIRONMENT))
