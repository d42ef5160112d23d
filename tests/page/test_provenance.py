"""Where the figures come from, and the commands that make them again."""

from __future__ import annotations

import re
from html import unescape

import pytest
from support import synthetic_records as synthetic
from support.decisions import decide
from support.html_tools import row
from typer.testing import CliRunner

from flashcore.cli import app
from flashcore.decision import verdict
from flashcore.page import banner_html
from flashcore.page.provenance import command, provenance_html
from flashcore.paths import data_dir
from flashcore.pipeline.folders import find_run
from flashcore.records import RunFolder


def test_the_command_names_what_is_not_the_default():
    given = {"profile": "quick", "backends": "all", "problems": "tiny;report", "seed": 0}
    assert command({"parameters": given}) == "make report PROFILE=quick PROBLEM='tiny;report'"
    assert command({}) == command({"parameters": "odd"}) == "make report"


def test_the_command_of_a_run_of_several_workers_asks_for_as_many():
    given, two = {"profile": "full", "problems": "tiny;report"}, [{"card": "GPU-1", "node": "a"}, {"card": "GPU-2"}]
    said = command({"parameters": given, "cards": [two[0], two[0] | {"card": "GPU-2"}]})
    assert said == "flashcore report --gpus 2 --profile full --problem 'tiny;report'"
    assert command({"cards": two}) == "flashcore report --scheduler tcp://ADDRESS"
    assert command({"cards": [{"node": "a"}]}) == "flashcore report --workers 1"
    assert command({"cards": 3}) == command({"cards": []}) == "make report"


def provenance(trials=(), recorded=None, **environment) -> str:
    found = verdict.Evidence(tuple(trials), synthetic.environment(**environment), synthetic.HASHES, recorded=recorded)
    return provenance_html("the-run", decide(trials, environment=found.environment, recorded=recorded), found)


def test_the_steps_begin_with_the_sources_and_name_the_run():
    steps = re.findall(r"<li><code>(.*?)</code>", provenance())
    assert steps[0] == f"git archive --format=tar.gz --output=flashcore.tar.gz {'0' * 40}"
    assert steps[1] == "make report PROFILE=full" and "names no repository" in provenance()
    assert {"flashcore verify the-run", "flashcore verdict the-run", "flashcore render the-run"} <= set(steps)
    assert "git a" not in provenance(git=None)
    named = provenance(git={"commit": "abc", "url": "https://example.invalid/flashcore"})
    steps = [unescape(step) for step in re.findall(r"<li><code>(.*?)</code>", named)]
    assert steps[:2] == ["git clone https://example.invalid/flashcore flashcore && cd flashcore", "git checkout abc"]


@pytest.mark.parametrize("folder", sorted(p.parent for p in (data_dir("reports") / "recorded").glob("*/report.html")))
def test_the_commands_on_the_page_of_a_recorded_run_take_its_name(folder, tmp_path):
    """Whoever has the package finds the run by the name that the page prints, and no command would write into it."""
    run = RunFolder(folder)
    shown = provenance_html(run.name, verdict.judge(run), verdict.gather(run)) + banner_html(
        verdict.judge(run), run=run.name
    )
    lines = [unescape(line) for line in re.findall(r"<code>(flashcore (?:verify|verdict|render) .*?)</code>", shown)]
    assert len(lines) == (4 if (folder / "seal.json").is_file() else 3)
    for line in lines:
        _, command, name, *more = line.split()
        assert find_run(name).path.resolve() == folder.resolve(), line
        assert (command == "render") == bool(more)
    said = CliRunner().invoke(app, lines[0].split()[1:])
    assert said.exit_code == 0, said.output


def test_what_a_shell_would_read_otherwise_is_quoted():
    given = {"profile": "full", "backends": "a b", "problems": "B=1;$(x)"}
    assert command({"parameters": given}) == "make report PROFILE=full BACKEND='a b' PROBLEM='B=1;$(x)'"


def test_the_facts_say_what_was_run_and_what_is_not_known():
    html = provenance(parameters={"seed": 3, "notebooks": ["01_a", "02_b"]}, git={"commit": "abc", "dirty": True})
    assert row(html, "Parameter seed")["Value"] == "3" and row(html, "Parameter notebooks")["Value"] == "01_a, 02_b"
    assert row(html, "Git commit")["Value"] == "abc, with changes not committed"
    assert row(html, "Machine of this run")["Value"] == "SYNTHETIC H200, SYNTHETIC CPU"
    bare = provenance(gpu=None, git="odd", id=None, parameters=3, before=None, flashcore=None)
    assert row(bare, "Git commit")["Value"] == "not known" and row(bare, "Machine of this run")["Value"] == "no GPU"
    assert row(bare, "Environment")["Value"] == "not recorded" and "Parameter" not in bare


def test_parts_that_were_measured_again_are_listed_with_their_time():
    html = provenance(redone=[{"parts": ["04_tflops_sweep"], "date": "2001-02-04T05:06:07+00:00"}, {"parts": None}])
    assert row(html, "Measured again")["Value"] == "04_tflops_sweep, 2001-02-04 05:06 UTC"


def test_a_recorded_run_is_named_by_its_own_commit():
    other = verdict.Recorded((), synthetic.environment(git={"commit": "def"}), "synthetic")
    assert row(provenance(recorded=other), "Git commit of the recorded run")["Value"] == "def"


def test_every_kernels_hash_is_folded_and_text_is_escaped():
    html = provenance(kernels={"<attention>": "<b>"}, flashcore="<script>")
    assert "Hash of every kernel's source" in unescape(html) and "&lt;attention&gt;" in html
    assert "<script>" not in html and "<b>" not in html
    assert "Hash of every kernel" not in unescape(provenance(kernels={}))
