"""What the recorded runs on other GPUs came to stands on pages that show one of them."""

from __future__ import annotations

import itertools
import re

import pytest
from support import synthetic_records as synthetic

from flashcore import page
from flashcore.decision import verdict
from flashcore.paths import data_dir
from flashcore.records import RunFolder

FAST = synthetic.gpu_trials(synthetic.FAST)


@pytest.fixture
def recorded(tmp_path):
    """Two recorded runs, the newer of them on an H100."""
    for name, day in (("h200", "03"), ("h100", "05")):
        environment = synthetic.environment(f"SYNTHETIC {name.upper()}", date=f"2001-02-{day}T04:05:06+00:00")
        synthetic.write_run(tmp_path / "recorded" / name, FAST, environment)
    return tmp_path / "recorded"


def said(run: RunFolder, recorded, **changes) -> str:
    evidence = verdict.gather(run, recorded_dir=recorded)
    hashes = {**synthetic.HASHES, **changes.pop("hashes", {})}
    evidence = verdict.Evidence(evidence.trials, evidence.environment, hashes, evidence.recorded)
    return page.elsewhere_html(run, evidence, recorded_dir=recorded)


def test_a_page_without_a_gpu_tells_of_the_recorded_run_that_it_does_not_show(recorded, tmp_path):
    run = synthetic.write_run(tmp_path / "run", synthetic.cpu_trials(), synthetic.environment(None))
    html = said(run, recorded)
    assert html.startswith(
        '<p class="fc-note">The same kernels on SYNTHETIC H200, recorded 2001-02-03: GO, 512 TFLOPS at'
    )
    assert "1.10 × sdpa-cudnn, 4.40 µs for the small call." in html and "H100" not in html


def test_a_page_of_one_recorded_run_tells_of_the_other_and_one_of_a_run_that_is_not_recorded_of_none(
    recorded, tmp_path
):
    html = said(RunFolder(recorded / "h200"), recorded)
    assert "SYNTHETIC H100, recorded 2001-02-05: GO" in html and "H200" not in html
    own = synthetic.write_run(tmp_path / "own", FAST, synthetic.environment())
    assert said(own, recorded) == "" == said(own, tmp_path / "nowhere")


def test_figures_of_other_sources_are_not_shown(recorded):
    html = said(RunFolder(recorded / "h100"), recorded, hashes={"attention_wmma": "f" * 16})
    assert "A run on SYNTHETIC H200, recorded 2001-02-03, measured other sources: attention_wmma." in html
    assert "TFLOPS" not in html
    synthetic.write_run(recorded / "old", FAST, synthetic.environment("OLD <GPU>", kernels=None))
    assert "on OLD &lt;GPU&gt;, recorded 2001-02-03, does not say which" in said(RunFolder(recorded / "h100"), recorded)


def test_what_the_shipped_runs_say_of_each_other_is_what_their_own_pages_say():
    runs = [RunFolder(path.parent) for path in sorted((data_dir("reports") / "recorded").glob("*/report.html"))]
    assert len(runs) > 1
    for one, other in itertools.permutations(runs, 2):
        decision = verdict.judge(other)
        html = page.elsewhere_html(one, verdict.gather(one))
        gpu = re.escape(decision.based_on.environment["gpu"])
        found = re.search(rf">The same kernels on {gpu}, recorded [\d-]*: ([A-Z-]+), ([\d.,]+) TFLOPS", html)
        if found is None:
            assert re.search(rf">A run on {gpu}, recorded [\d-]*, (measured other sources|does not say)", html)
            continue
        assert found[1] == decision.verdict
        assert f">{found[2]} <" in page.headline_html(decision, decision.based_on), "as its own first card has it"
