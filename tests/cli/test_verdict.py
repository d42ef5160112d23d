"""The verdict on the command line: exit codes, formats, the badge, and the workflow that the documents show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import flashcore
from flashcore.cli.program import app
from flashcore.decision import formats, verdict
from flashcore.records import Trial

runner = CliRunner()
ROOT = Path(flashcore.__file__).parent.parent
RECORDED = str(ROOT / "reports/recorded/h100")


def decision(word: str) -> verdict.Decision:
    return verdict.Decision(verdict=word, reason="Because.", gates=())


@pytest.mark.parametrize(("word", "code"), [("GO", 0), ("NO-GO", 3), ("INCONCLUSIVE", 4)])
def test_verdict_by_exit_code(monkeypatch, run, word, code):
    monkeypatch.setattr(verdict, "judge", lambda found: decision(word) if found.path == run.path else None)
    done = runner.invoke(app, ["verdict", str(run.path)])
    assert done.exit_code == code and f"Verdict: {word}. Because." in done.stdout


def test_the_verdict_of_an_empty_run_is_inconclusive(run):
    assert runner.invoke(app, ["verdict", str(run.path)]).exit_code == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"schema_version": 99, "kind": "ceiling"}', "install a newer FlashCore"),
        ('{"schema_version": 1, "kind": "ceil', None),
    ],
)
def test_damaged_records_and_a_newer_schema(run, line, said):
    run.append(Trial(kind="ceiling"))
    with run.records_path.open("a") as file:
        file.write(line)
    done = runner.invoke(app, ["verdict", str(run.path)])
    assert "Traceback" not in done.output
    if said:
        assert done.exit_code == 2 and said in done.stderr
    else:
        assert done.exit_code == 4 and "line 2" in done.stdout


@pytest.mark.parametrize(("word", "code"), [("GO", 0), ("NO-GO", 3), ("INCONCLUSIVE", 4)])
@pytest.mark.parametrize("asked", ["--json", *(f"--format {name}" for name in ("text", *formats.FORMATS))])
def test_the_exit_code_is_the_verdict_in_every_format(monkeypatch, run, word, code, asked):
    monkeypatch.setattr(verdict, "judge", lambda found: decision(word))
    done = runner.invoke(app, ["verdict", str(run.path), *asked.split()])
    assert done.exit_code == code and word in done.stdout and done.stderr == ""


def test_a_recorded_run_is_told_in_every_format_on_standard_output_alone():
    made = {name: runner.invoke(app, ["verdict", RECORDED, "--format", name]) for name in formats.FORMATS}
    found = json.loads(made["json"].stdout)
    assert {done.exit_code for done in made.values()} == {found["exit_code"]}
    assert found["schema_version"] == formats.SCHEMA_VERSION and found["run"]["id"] == "h100" and found["gates"]
    assert len(made["markdown"].stdout.splitlines()) == 10
    assert all(re.match("::(notice|warning|error) ", line) for line in made["github"].stdout.splitlines())
    assert int(ElementTree.fromstring(made["junit"].stdout).get("tests")) == len(found["gates"]) + 1


def test_warnings_of_damaged_records_stay_out_of_what_is_parsed(run):
    run.append(Trial(kind="ceiling"))
    with run.records_path.open("a") as file:
        file.write('{"schema_version": 1, "kind": "ceil')
    done = runner.invoke(app, ["verdict", str(run.path), "--json"])
    assert done.exit_code == 4 and "line 2" in json.loads(done.stdout)["reason"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--format", "junt"], "There is no format 'junt'"),
        (["--json", "--format", "junit"], "--json and --format junit ask for two formats at once"),
        (["--link", "javascript:alert(1)"], "cannot be used as a link"),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(run, asked, said):
    done = runner.invoke(app, ["verdict", str(run.path), *asked])
    assert done.exit_code == 2 and done.stdout == "" and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_json_twice_is_no_contradiction_and_a_link_is_told_in_words_too(run):
    assert runner.invoke(app, ["verdict", str(run.path), "--json", "--format", "json"]).exit_code == 4
    done = runner.invoke(app, ["verdict", str(run.path), "--link", "https://example.org/r.html"])
    assert done.stdout.endswith("Page: https://example.org/r.html\n")


def test_a_badge_is_written_whatever_the_verdict(run, tmp_path):
    made = tmp_path / "b.svg"
    done = runner.invoke(app, ["badge", str(run.path), "--to", str(made)])
    assert done.exit_code == 0 and "INCONCLUSIVE" in done.stdout
    assert "INCONCLUSIVE" in "".join(ElementTree.parse(made).getroot().itertext())


@pytest.mark.parametrize(("name", "said"), [("b.png", "let it end in .svg"), ("nowhere/b.svg", "cannot be written")])
def test_a_badge_that_cannot_be_written_is_one_sentence(run, tmp_path, name, said):
    done = runner.invoke(app, ["badge", str(run.path), "--to", str(tmp_path / name)])
    assert done.exit_code == 2 and said in done.stderr and list(tmp_path.glob("**/b.*")) == []


def test_verify_gathers_the_evidence_once(run, monkeypatch):
    real, seen = verdict.gather, []
    monkeypatch.setattr(verdict, "gather", lambda *a, **more: seen.append(1) or real(*a, **more))
    assert runner.invoke(app, ["verify", str(run.path)]).exit_code == 4
    assert seen == [1]


# --------------------------------------------------------------------------------------------- the documents

needs_docs = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="FlashCore runs from an install here")


def workflow() -> list[str]:
    """The shell scripts of the workflow's steps, in order."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "docs/ci.md").read_text()
    parsed = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[1])
    (job,) = parsed["jobs"].values()
    assert (ROOT / job["env"]["RUN"] / "records.jsonl").is_file()
    assert parsed["permissions"] == {"contents": "read"}
    return [step["run"] for step in job["steps"] if "run" in step]


@needs_docs
@pytest.mark.slow
def test_the_commands_of_the_workflow_run_on_the_recorded_run(tmp_path):
    scripts = [script for script in workflow() if "pip install" not in script]
    assert len(scripts) == 2
    place = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "RUN": RECORDED,
             "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}  # fmt: skip
    command = f'flashcore() {{ "{sys.executable}" -m flashcore "$@"; }}\n'
    done = [
        subprocess.run(["bash", "-e", "-c", command + script], env=place, cwd=tmp_path, capture_output=True, text=True)
        for script in scripts
    ]
    found = json.loads((tmp_path / "verdict.json").read_text())
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].returncode == found["exit_code"] and done[1].stdout.startswith("::")
    assert found["verdict"] in (tmp_path / "summary.md").read_text()
    for name in ("verdict.xml", "verdict.svg"):
        ElementTree.parse(tmp_path / name)


@needs_docs
def test_the_workflow_lets_no_error_pass_for_a_verdict():
    for line in "\n".join(workflow()).splitlines():
        if line.startswith("flashcore verdict") and ">" in line:
            assert line.endswith("|| test $? -ge 3"), line


@needs_docs
def test_the_document_names_every_key_of_the_json():
    text = (ROOT / "docs/ci.md").read_text().partition("## The JSON")[2]
    found = json.loads(runner.invoke(app, ["verdict", RECORDED, "--json"]).stdout)
    named = set(re.findall(r"`(\w+)`", text))
    for keys in (found, found["run"], found["evidence"], found["seal"], found["recommended"] or {}, found["gates"][0]):
        assert set(keys) <= named, set(keys) - named
