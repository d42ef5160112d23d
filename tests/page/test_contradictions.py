"""No sentence of a page is contradicted by its own figures, and whoever reads it for that finds what is planted."""

from __future__ import annotations

import re

import pytest
from support import synthetic_records as synthetic
from support.contradictions import contradictions
from support.decisions import decide
from support.sampling import first

from flashcore import page
from flashcore.decision import verdict
from flashcore.page.drawing import (
    answers,
    html_tables,
    invariance_views,
    masked_views,
    paging_views,
    plots,
    survey_views,
)
from flashcore.paths import data_dir
from flashcore.records import RunFolder

RECORDED = data_dir("reports") / "recorded"


def drawn(evidence: verdict.Evidence, decision: verdict.Decision) -> str:
    """Every part of the page that the status report shows, without its notebook and its template."""
    trials, machine = evidence.gpu_trials, evidence.gpu_environment
    parts = [
        page.banner_html(decision), page.headline_html(decision, evidence), page.options_html(decision),
        page.gates_html(decision), page.blockers_html(decision), plots.tflops_html(trials),
        html_tables.times_table(trials), plots.latency_html(trials),
        html_tables.latency_table(plots.small_trials(trials)),
        page.correctness_html(evidence), page.proof_html(evidence), page.machine_html(evidence),
        answers.answers_html(answers.answers(trials, environment=machine), figures=True),
        survey_views.limit_html(trials, l2_bytes=(machine.get("before") or {}).get("l2_bytes")),
        masked_views.masked_html(evidence), invariance_views.cost_html(evidence), paging_views.paging_html(evidence),
        page.claims_html(evidence),
    ]  # fmt: skip
    return "".join(map(str, parts))


@pytest.fixture(scope="module")
def recorded():
    run = RunFolder(RECORDED / "h100")
    return run, verdict.gather(run), verdict.judge(run)


@pytest.mark.slow
def test_nothing_on_the_page_of_the_recorded_run_is_contradicted(recorded):
    _, evidence, decision = recorded
    assert contradictions(drawn(evidence, decision), evidence.trials) == []


@pytest.mark.slow
def test_nothing_on_a_page_of_a_run_that_fails_is_contradicted():
    trials = synthetic.gpu_trials()
    evidence = verdict.Evidence(tuple(trials), synthetic.environment(), synthetic.HASHES)
    assert contradictions(drawn(evidence, decide(trials)), trials) == []


PLANTED = {
    "absolute": lambda html: html + "<p>No kernel can be faster than the ceilings below.</p>",
    "limit": lambda html: html + "<p>The limit of this machine is 742 TFLOPS.</p>",
    "share": lambda html: html + "<table><thead><tr><th>Cut</th><th>Share of the model</th></tr></thead>"
                                 "<tbody><tr><th>x</th><td>104 %</td></tr></tbody></table>",
    "error": lambda html: html.replace('data-label="Largest error">', 'data-label="Largest error">0.0'),
    "error in words": lambda html: html.replace("and the largest is 0.", "and the largest is 0.00"),
    "error nearest its bound in words": lambda html: re.sub(r"bound is \d+ % of it", "bound is 3 % of it", html),
    "fastest": lambda html: html.replace("is fastest with ", "is fastest with 9"),
    "variant": lambda html: html.replace('<p class="fc-where">', '<p class="fc-where">hopper-unsplit, ', 1),
    "best": lambda html: html.replace('<p class="fc-value">', '<p class="fc-value">0.', 1),
    "workload": lambda html: html.replace("Speed at the workload that decides", "Best speed of ours"),
    "workload that is not named": lambda html: re.sub('fc-where">hopper, .*?, in a', 'fc-where">hopper, in a', html),
    "workload without the others": lambda html: re.sub("<p>Up to [^<]* TFLOPS at other problems[^<]*</p>", "", html),
}  # fmt: skip


@pytest.mark.parametrize("what", first(list(PLANTED), 6))
@pytest.mark.slow
def test_what_is_planted_is_found(recorded, what):
    _, evidence, decision = recorded
    html = page.headline_html(decision, evidence) + page.correctness_html(evidence)
    html += plots.latency_html(evidence.trials)
    assert contradictions(html, evidence.trials) == []
    planted = PLANTED[what](html)
    assert planted != html
    found = contradictions(planted, evidence.trials)
    assert found and all(sentence.startswith(what.split()[0]) for sentence in found)
