"""The views of a survey of paging: their figures against invented records whose answer is known, and their markup."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import pytest
from support import synthetic_paging as synthetic
from support import synthetic_records

from flashcore.decision import evidence as evidences
from flashcore.decision.evidence import Evidence, Recorded
from flashcore.gpu import device
from flashcore.page.drawing import paging_views
from flashcore.surveys.paging import facts

VIEWS = [paging_views.memory_html, paging_views.decode_html, paging_views.tokens_html, paging_views.accuracy_html,
         paging_views.correctness_html, paging_views.other_times_html]  # fmt: skip
EVERYTHING = synthetic.everything()


def evidence(trials, recorded=None) -> Evidence:
    environment = synthetic_records.environment()
    kept = None if recorded is None else Recorded(tuple(recorded), environment)
    return Evidence(tuple(trials), {} if kept else environment, {}, kept)


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_without_records_says_which_command_measures_them_and_no_number(view):
    html = view([])
    assert html.startswith('<p class="fc-none">Not measured yet: ')
    assert html.endswith(". Run &#39;flashcore paging&#39; on an H100 or H200.</p>") and html.count(":") == 1
    assert not re.search(r"\d", re.sub(r"H\d00|fc-none|&#39;", "", html))


@pytest.mark.slow
def test_the_section_draws_everything_with_its_message_as_text():
    html = paging_views.paging_html(evidence(EVERYTHING))
    assert "fc-none" not in html and "nan" not in html.replace("NaN lies in every slot", "").lower()
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(svgs) == 1 + 1 + 3 + 2 + 1
    for svg in svgs:
        ElementTree.fromstring(svg)
        assert 'role="img"' in svg and len(re.search(r'aria-label="([^"]*)"', svg)[1]) > 80
    assert html.index("Attention alone leaves room for") < html.index("at least as fast as dense cuDNN in 20 of 30")
    assert html.index("at least as fast as dense cuDNN in 20 of 30") < html.index("70.3 % saved"), (
        "what was there follows"
    )
    for said in ("70.3 % saved", "costs 0.8 % more", "98 % of the speed of reading alone", "0.360 of the time with all",
                 "the needle FOUND", "the needle LOST", "LOST by 40 of 128", "0.970 × as fast as hopper"):  # fmt: skip
        assert said in html, said


def test_a_step_over_all_pages_is_said_to_take_longer_or_less_than_dense_attention():
    one = facts.decodes(EVERYTHING)[0]

    def said(ratio) -> str:
        every = one.every.model_copy(update={"data": {**one.every.data, "over_peer": ratio}})
        return paging_views.decode_message(dataclasses.replace(one, every=every))

    assert " µs, beside which all pages take 3.4 % longer; " in said(0.967)
    assert " µs, beside which all pages take 4.0 % less; " in said(1.0417)
    assert "beside which" not in said(None) and "beside which" not in said(float("nan"))


def test_every_rate_of_tokens_is_called_attention_only():
    html = paging_views.tokens_html(EVERYTHING)
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", html, flags=re.S):
        assert caption.lower().count("attention only") >= 2
    assert "Batch 64: " in html and "32 layers, 32 query heads, 8 KV heads, head_dim 128, context 8192" in html
    assert "Batch 16: " in html and "1 layer, 16 query heads" in html


def test_times_of_the_cpu_are_never_drawn():
    slow = [
        t.model_copy(update={"timing": synthetic.timing(9.0, method="host")}) if t.timing else t for t in EVERYTHING
    ]
    assert "Not measured yet" in paging_views.decode_html(slow) and "Not measured yet" in paging_views.tokens_html(slow)
    assert facts.decodes(slow) == []


@pytest.mark.slow
def test_wrong_results_have_no_speed_and_are_said():
    bad = {"status": "failed", "reason": "its result is wrong <b>"}
    ours = [t.data["what"] in ("decode", "tokens") and t.backend == "decode" for t in EVERYTHING]
    wrong = [t.model_copy(update=bad) if mine else t for t, mine in zip(EVERYTHING, ours, strict=True)]
    html = paging_views.paging_html(evidence(wrong))
    assert "All pages:" not in html and "Not measured yet" in paging_views.tokens_html(wrong)
    assert "WRONG" in html and "its result is wrong &lt;b&gt;" in html and "<b>" not in html


def test_a_wrong_kernel_shows_in_the_matrix():
    one = synthetic.correctness()[0]
    bad = one.model_copy(update={"status": "failed", "data": {**one.data, "right": 9, "wrong": 3}})
    found = facts.checks_by_backend([*synthetic.correctness(), bad])
    assert found["decode"]["wrong"] == 3 and found["decode"]["right"] == 33, "the last record of a group counts"
    assert "WRONG in 3" in paging_views.correctness_html([*synthetic.correctness(), bad])


@pytest.mark.slow
def test_without_a_gpu_a_run_shows_its_own_where_any_machine_can_tell():
    own = [*synthetic.memory(), *synthetic.accuracy()]
    html = paging_views.paging_html(evidence(own, recorded=[]))
    assert "70.3 % saved" in html and "Measured live on this machine, which has no GPU" in html
    assert "memory, accuracy" in html
    lacking, folded = re.findall(r'<p class="fc-none">Not measured yet: (.*?)\. Run ', html)
    assert lacking.split("; ") == [
        "tokens a second of public models, beside dense cuDNN and FlashInfer",
        "decode against dense cuDNN at each page size", "decode time against the share of pages",
        "tokens a second, attention only",
    ]  # fmt: skip
    assert folded.split("; ") == ["correctness of attention over pages", "paged prefill and append"]
    assert html.index("70.3 % saved") < html.index(lacking) < html.index("<details"), "what is missing stands last"
    both = paging_views.paging_html(evidence(own, recorded=EVERYTHING))
    assert "Measured live on this machine" not in both and "Not measured yet" not in both


@pytest.mark.slow
def test_a_real_recorded_run_is_shown_or_said_to_lack_paging(run):
    found = evidences.gather(run)
    assert found.recorded is not None
    html = paging_views.paging_html(found)
    if not facts.paging_trials(found.recorded.trials):
        assert "<svg" not in html and html.count("Not measured yet") == 2 and html.count("; ") >= 5


# --- the notebook ----------------------------------------------------------------------------------------------------


@pytest.mark.notebook
@pytest.mark.slow
def test_the_notebook_measures_what_any_machine_can_tell_and_finishes(run):
    from flashcore.pipeline import reporting

    device.record_environment(run, "before", {"notebooks": ["05_sparse_paging"]})
    executed = reporting.execute_notebook("05_sparse_paging", run, {"profile": "quick", "seed": 1})
    assert [t.status for t in run.trials(kind="notebook")] == ["ok"]
    trials = facts.paging_trials(run.trials())
    assert {"correctness", "memory", "accuracy"} <= {t.data["what"] for t in trials}
    assert {t.status for t in trials} <= {"ok", "unsupported", "unavailable"}
    text = executed.read_text(encoding="utf-8")
    assert "70.3 % saved" in text and "the needle LOST" in text
