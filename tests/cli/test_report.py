"""`flashcore report` and `flashcore render`: what they ask for, what they print, and their exit codes."""

from __future__ import annotations

import json

import pytest
from support import synthetic_records as synthetic
from typer.testing import CliRunner

from flashcore.cli.program import app
from flashcore.decision import verdict
from flashcore.gpu import device
from flashcore.pipeline import reporting
from flashcore.records import RunFolder

runner = CliRunner()


def decision(word: str) -> verdict.Decision:
    return verdict.Decision(verdict=word, reason="Because.", gates=())


def result(run, word: str = "GO", failed: dict | None = None) -> reporting.ReportResult:
    return reporting.ReportResult(run, run.path / "report.html", decision(word), failed or {})


@pytest.fixture
def made(tmp_path) -> RunFolder:
    """A SYNTHETIC run that was made before."""
    return synthetic.write_run(tmp_path / "made", synthetic.cpu_trials(), synthetic.environment(None))


def test_the_profile_follows_the_machine_unless_it_is_named(monkeypatch, run):
    asked = []
    monkeypatch.setattr(reporting, "report", lambda **given: asked.append(given) or result(run))
    for gpu in (False, True):
        monkeypatch.setattr(device, "has_gpu", lambda gpu=gpu: gpu)
        assert runner.invoke(app, ["report"]).exit_code == 0
    runner.invoke(app, ["report", "--profile", "quick", "--backend", "cpu", "--problem", "tiny", "--problem", "report"])
    assert [a["profile"] for a in asked] == ["quick", "full", "quick"]
    assert asked[0]["problems"] == "default" and asked[0]["backends"] == "all" and asked[0]["out"] is None
    assert asked[2]["problems"] == "tiny;report" and asked[2]["backends"] == "cpu"


@pytest.mark.parametrize("word", verdict.EXIT_CODES)
def test_report_is_exit_code_0_whatever_the_verdict_and_1_when_a_notebook_failed(monkeypatch, run, word):
    monkeypatch.setattr(reporting, "report", lambda **given: result(run, word))
    done = runner.invoke(app, ["report"])
    assert done.exit_code == 0 and f"Verdict: {word}. Because." in done.stdout
    assert done.stdout.rstrip().splitlines()[-1] == f"Report: {run.path / 'report.html'}"
    monkeypatch.setattr(reporting, "report", lambda **given: result(run, word, {"04_tflops_sweep": "its kernel died"}))
    done = runner.invoke(app, ["report"])
    assert done.exit_code == 1 and "Notebook 04_tflops_sweep did not finish: its kernel died" in done.stdout


def test_a_render_that_fails_is_exit_code_1(monkeypatch, run):
    from flashcore.errors import NotebookFailed

    def fail(found, *, variant):
        raise NotebookFailed("06_status_report", "its kernel died")

    monkeypatch.setattr(reporting, "render", fail)
    done = runner.invoke(app, ["render", str(run.path)])
    assert done.exit_code == 1 and "06_status_report" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sections", "speed,sped"], "no section 'sped'; choose one of: decision, since"),
        (["--logo", "nowhere.png"], "cannot be read"),
        (["--title", " "], "title is empty"),
    ],
)
def test_a_page_that_cannot_be_made_as_asked_is_one_sentence(run, words, said):
    for command in (["render", str(run.path)], ["report"]):
        done = runner.invoke(app, [*command, *words])
        assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.output


def test_render_says_where_page_and_pdf_are_or_why_there_is_none(monkeypatch, run):
    asked = []
    monkeypatch.setattr(
        reporting, "render", lambda found, *, variant: asked.append(variant) or run.path / "report.html"
    )
    monkeypatch.setattr(reporting, "print_page", lambda found: (run.path / "report.pdf", ""))
    line = ["render", str(run.path), "--audience", "leadership", "--organisation", "Us", "--sections", "speed"]
    done = runner.invoke(app, line)
    assert done.exit_code == 0 and f"PDF: {run.path / 'report.pdf'}" in done.stdout
    assert (asked[0].audience, asked[0].organisation, asked[0].sections) == ("leadership", "Us", ("speed",))
    monkeypatch.setattr(reporting, "print_page", lambda found: (None, "No PDF was made: no browser."))
    done = runner.invoke(app, ["render", str(run.path)])
    assert done.exit_code == 0 and "No PDF was made: no browser." in done.stdout
    assert "PDF" not in runner.invoke(app, ["render", str(run.path), "--no-pdf"]).stdout


def test_a_page_is_written_into_no_run_and_no_file(made, tmp_path, monkeypatch):
    monkeypatch.setattr("flashcore.pipeline.rendering.render", lambda *_, **__: pytest.fail("it was drawn first"))
    (tmp_path / "file").write_text("")
    own, nowhere = "is a run, and this page would take the place of its own", "The page cannot be written to"
    for place, said in ((made.path, own), (tmp_path / "file", nowhere), (tmp_path / "file" / "in", nowhere)):
        done = runner.invoke(app, ["render", str(made.path), "--to", str(place)])
        assert done.exit_code == 2 and said in " ".join(done.stderr.split())
    assert sorted(p.name for p in made.path.iterdir()) == sorted(["records.jsonl", "environment.json"])


def test_the_command_line_names_part_and_run(monkeypatch, made):
    asked = []

    def fake(run, only, **given):
        asked.append((run.path, only, given["changes"], given["variant"].audience, given["pdf"]))
        return reporting.ReportResult(run, run.path / "report.html", reporting.verdict.judge(run), {})

    monkeypatch.setattr("flashcore.pipeline.redo.redo", fake)
    line = ["report", "--only", "sweep", "--run", str(made.path), "--seed", "3", "--audience", "leadership", "--no-pdf"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert asked == [(made.path, "sweep", {"seed": 3}, "leadership", False)]
    done = CliRunner().invoke(app, ["report", "--only", "sweep", "--run", ""])
    assert done.exit_code == 2 and "No run is named" in done.stderr and len(asked) == 1
    assert CliRunner().invoke(app, ["report", "--run", str(made.path)]).exit_code == 2


def test_a_run_without_a_part_is_refused_since_a_report_makes_a_new_one(made, monkeypatch):
    monkeypatch.setattr(reporting, "report", lambda **given: pytest.fail("it was made all the same"))
    done = runner.invoke(app, ["report", "--run", str(made.path)])
    assert done.exit_code == 2 and "--run names the run that --only PART does again" in done.stderr


def test_what_says_nothing_is_refused_before_a_run_is_made(tmp_path):
    for more, said in ((["--later", ""], "--later names no part"), (["--backend", ","], "There is no backend ','"),
                       (["--seed", str(-(10**23))], "is too large")):  # fmt: skip
        done = runner.invoke(app, ["report", *more, "--out", str(tmp_path / "runs")])
        assert done.exit_code == 2 and said in done.stderr and not (tmp_path / "runs").exists(), more


@pytest.mark.slow
def test_a_run_is_resumed_by_its_name_or_as_the_one_begun_last(monkeypatch, made, tmp_path):
    asked = []

    def fake(run, **given):
        asked.append((run.path, given["within_s"]))
        return result(run)

    monkeypatch.setattr("flashcore.pipeline.redo.resume", fake)
    newer = tmp_path / "more" / "2999-01-01T00-00-00-cpu-ffff"
    for folder in (newer, newer.with_name("2998-01-01T00-00-00-cpu-0000")):
        folder.mkdir(parents=True)
        (folder / "environment.json").write_text("{}")
    assert runner.invoke(app, ["report", "--resume", "--run", str(made.path), "--within", "500"]).exit_code == 0
    assert runner.invoke(app, ["report", "--resume", "--out", str(tmp_path / "more")]).exit_code == 0
    assert asked == [(made.path, 500.0), (newer, None)]
    wrong = [(["--only", "sweep"], "--only out"), (["--seed", "3"], "--seed out"),
             (["--later", "model"], "--resume out"),
             (["--kernel", "x.py:f", "--run", str(made.path)], "There is no file"),
             (["--out", str(tmp_path / "none")], "no run")]  # fmt: skip
    for more, said in wrong:
        done = runner.invoke(app, ["report", "--resume", *more])
        assert done.exit_code == 2 and said in done.stderr, more


@pytest.mark.slow
def test_a_run_with_a_function_of_yours_goes_on_with_it_alone(monkeypatch, tmp_path):
    asked = []
    for name in ("resume", "redo"):
        monkeypatch.setattr(f"flashcore.pipeline.redo.{name}", lambda run, *_, **given: asked.append(given["kernel"]))
    (tmp_path / "mine.py").write_text("def fn(q, k, v):\n    return v\n")
    place = f"{tmp_path / 'mine.py'}:fn"
    kernel = {"backend": "fn", "place": place, "layout": "bshd", "lse": "log2"}
    begun, other = RunFolder.create(tmp_path / "begun"), RunFolder.create(tmp_path / "other")
    begun.environment_path.write_text(json.dumps({"parameters": {"kernel": reporting.as_told(kernel)}}))
    other.environment_path.write_text(json.dumps({"parameters": {}}))
    for part in (["--resume"], ["--only", "sweep"]):
        runner.invoke(app, ["report", *part, "--run", str(begun.path), "--kernel", place])
        assert asked.pop() == kernel, "how it is called is taken from the run"
        for run_, more, said in (
            (begun, [], "measures mine.py:fn, a function of yours, beside the others; name it again by --kernel"),
            (other, ["--kernel", place], "begun without --kernel"),
            (begun, ["--kernel", place, "--lse", "natural"], "its lse is natural, and was log2"),
        ):
            done = runner.invoke(app, ["report", *part, "--run", str(run_.path), *more])
            assert done.exit_code == 2 and said in " ".join(done.stderr.split()) and not asked, done.output
    (tmp_path / "mine.py").write_text("def fn(q, k, v):\n    return v + 1\n")
    done = runner.invoke(app, ["report", "--resume", "--run", str(begun.path), "--kernel", place])
    assert done.exit_code == 2 and "its file's hash is" in done.stderr and not asked


def test_what_is_given_overrides_the_defaults_and_nothing_else(monkeypatch, run, tmp_path):
    asked = []
    monkeypatch.setattr(reporting, "report", lambda **given: asked.append(given) or result(run))
    line = ["report", "--seed", "7", "--out", str(tmp_path), "--no-pdf", "--title", "Ours", "--profile", "quick"]
    assert runner.invoke(app, line).exit_code == 0
    (given,) = asked
    assert (given["seed"], given["profile"], given["backends"], given["problems"]) == (7, "quick", "all", "default")
    assert given["out"] == tmp_path and given["pdf"] is False and given["variant"].title == "Ours"


def test_report_says_where_the_pdf_is_or_why_there_is_none(monkeypatch, run):
    page = run.path / "report.html"
    for printed, why, said in ((run.path / "report.pdf", "", "PDF: "), (None, "No PDF: [none].", "No PDF: [none].")):
        found = reporting.ReportResult(run, page, decision("GO"), {}, printed, why)
        monkeypatch.setattr(reporting, "report", lambda found=found, **given: found)
        assert said in runner.invoke(app, ["report"]).stdout
    found = reporting.ReportResult(run, page, decision("GO"), {})
    monkeypatch.setattr(reporting, "report", lambda **given: found)
    assert "PDF" not in runner.invoke(app, ["report"]).stdout


@pytest.mark.parametrize("arguments", [["--audience", "everybody"], ["--audience", "leadership", "--sections", ""]])
def test_render_refuses_a_page_that_there_is_not(run, arguments, monkeypatch):
    monkeypatch.setattr(reporting, "render", lambda *_, **__: pytest.fail("it was drawn all the same"))
    done = runner.invoke(app, ["render", str(run.path), *arguments])
    assert done.exit_code == 2 and "Traceback" not in done.output
