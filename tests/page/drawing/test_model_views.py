"""Figures and tables of models, on SYNTHETIC records; silence where none was measured."""

from __future__ import annotations

import dataclasses
import re

import pytest
from support import synthetic_models as synthetic
from support import synthetic_records

from flashcore.decision.evidence import Evidence, Recorded
from flashcore.page.drawing import model_views
from flashcore.surveys.models import facts

GPU = Evidence(tuple(synthetic.survey()), synthetic_records.environment(), {})
CPU = dataclasses.replace(GPU, trials=(), environment={}, recorded=Recorded(GPU.trials, GPU.environment))


def smoke() -> list:
    return [t.model_copy(update={"data": t.data | {"smoke": True}}) for t in synthetic.steps()]


def test_a_run_that_measured_no_model_says_nothing():
    old = [t for t in synthetic_records.gpu_trials(synthetic_records.FAST)]
    assert model_views.model_html(dataclasses.replace(GPU, trials=tuple(old))) == ""
    assert model_views.model_html(dataclasses.replace(CPU, recorded=Recorded(tuple(old), {}))) == ""
    assert model_views.steps_table(old) == model_views.generated_table(old) == model_views.troubles_html(old) == ""


def test_a_figure_says_how_much_faster_and_what_attention_takes():
    html = model_views.model_html(GPU)
    assert html.count("<svg") == 2 and html.startswith("<h3>In a model</h3>")
    message = model_views.steps_message(facts.steps(GPU.trials)[0])
    assert message.startswith("3,276,800 tokens/s in torch.compile in a CUDA graph; 1.40 (")
    assert ") times as fast as with torch SDPA, cuDNN" in message
    assert "attention is 20 % of the step, and 43 % there" in message and message in html.replace("&#39;", "'")
    assert "840 of 840 greedy tokens are the same" in html
    assert "FlashAttention-3 is not installed" in html and "unavailable" in html


def test_every_step_and_what_was_compared_stand_in_tables():
    table = model_views.steps_table(GPU.trials)
    assert table.count("<tr") == 1 + 12 and "80 of 80 decided, of 100" in table and "1.60 × (" in table
    tokens = model_views.generated_table(GPU.trials)
    assert "16 tokens after prompts of 1536, 4 sequences" in tokens and "60 of 60 decided, of 64" in tokens


def test_a_machine_without_a_gpu_shows_the_recorded_run_and_its_own_smoke_test():
    html = model_views.model_html(dataclasses.replace(CPU, trials=tuple(smoke())))
    assert html.count("<svg") == 2 and "A smoke test on this machine" in html
    assert "the same tokens in 240 of 240 places" in html and "says nothing about speed" in html
    alone = model_views.model_html(Evidence(tuple(smoke()), {}, {}))
    assert (
        "<svg" not in alone
        and "ms" not in re.sub("<[^>]*>", "", alone).split()
        and "Not measured yet: times of whole models." in alone
    )
    wrong = [t.model_copy(update={"status": "failed", "reason": "other tokens"}) for t in smoke()]
    assert "WRONG in 3 of 3 comparisons" in model_views.model_html(Evidence(tuple(wrong), {}, {}))


def test_what_is_wrong_is_named():
    wrong = synthetic.generated("flashcore", status="failed", reason="1 of 60 decided tokens are others")
    html = model_views.model_html(dataclasses.replace(GPU, trials=(*GPU.trials, wrong)))
    assert "WRONG" in html and "1 of 60 decided tokens are others" in html


@pytest.mark.notebook
@pytest.mark.slow
def test_the_notebook_takes_a_smoke_test_and_finishes(run):
    from flashcore.gpu import device
    from flashcore.pipeline import reporting

    device.record_environment(run, "before", {"notebooks": ["07_in_a_model"]})
    executed = reporting.execute_notebook("07_in_a_model", run, {"profile": "quick", "seed": 1})
    assert [t.status for t in run.trials(kind="notebook")] == ["ok"]
    trials = facts.model_trials(run.trials())
    assert {t.data["what"] for t in trials} == {"tokens", "prefill", "decode"} and {t.status for t in trials} <= {"ok"}
    assert device.has_gpu() or "It says nothing about speed" in executed.read_text(encoding="utf-8")
