"""A page from records alone: whole or plain, small enough to mail, and a clear error where it cannot be written."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from support.notebook_tools import KILL, write_notebook
from support.sampling import first

from flashcore import records
from flashcore.decision import verdict
from flashcore.errors import NotebookFailed, PrintError, RecordsError
from flashcore.paths import partial_path
from flashcore.pipeline import rendering, reporting
from flashcore.records import Trial


@pytest.mark.notebook
@pytest.mark.parametrize("cell", first([KILL, "1 / 0"], 1))
def test_without_the_status_notebook_a_plain_page_still_says_the_verdict(tmp_path, toys, cell):
    write_notebook(toys, "06_status_report", cell)
    result = reporting.report(notebooks_dir=toys, out=tmp_path / "runs")
    assert list(result.failed) == ["06_status_report"]
    page = result.html.read_text()
    assert f"Verdict: {result.decision.verdict}" in page and "could not be drawn" in page
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)


@pytest.mark.notebook
def test_rendering_again_adds_no_record_and_replaces_the_page(reported, toys):
    run = reported
    records, page = run.records_path.read_bytes(), (run.path / "report.html")
    page.write_text("old")
    assert reporting.render(run, notebooks_dir=toys) == page
    assert run.records_path.read_bytes() == records
    assert "old" != page.read_text() and "FlashCore" in page.read_text()
    assert [p.name for p in run.path.iterdir() if "partial" in p.name] == []


@pytest.mark.notebook
def test_a_page_that_would_be_too_large_leaves_out_the_largest_notebooks_and_names_them(reported, toys, monkeypatch):
    run = reported
    whole = (run.path / "report.html").read_text()
    for name, size in (("01_first", 400_000), ("02_second", 3_000)):
        cell = nbformat.v4.new_code_cell("print()")
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="x" * size)]
        heading = nbformat.v4.new_markdown_cell(f"# Notebook {name}")
        nbformat.write(nbformat.v4.new_notebook(cells=[heading, cell]), run.path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(rendering, "MOST_PAGE_BYTES", len(whole) + 20_000)
    page = rendering.render(run, notebooks_dir=toys).read_text()
    assert len(page) <= rendering.MOST_PAGE_BYTES and "x" * 3_000 in page and "x" * 400_000 not in page
    assert "larger than 2 MB: Notebook 01_first." in page


def test_a_page_that_cannot_be_written_is_one_clear_error(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RecordsError, match="No space left on device.*--out"):
        rendering._write_page(run, "text")
    assert not (run.path / "report.html").exists()


@pytest.mark.slow
def test_evidence_shows_what_was_printed_and_no_warning_with_a_path_of_the_machine(tmp_path):
    import nbformat

    cell = nbformat.v4.new_code_cell("print('hello')")
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="hello from the notebook"),
        nbformat.v4.new_output("stream", name="stderr", text="/somewhere/lib/thing.py:1: UserWarning: never mind"),
    ]
    path = tmp_path / "05_noise.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    text = rendering._convert(path, "evidence.html.j2", {})
    assert "hello from the notebook" in text and "/somewhere/lib" not in text


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_plain_page_escapes_what_it_is_told_and_carries_every_gate(run):
    gate = verdict.judge(run).gates[0]
    decision = verdict.Decision("NO-GO", "<b>slow</b>", (replace(gate, title="<i>fast</i>", reason="a & b"),))
    made = rendering.write_plain_page(run, decision, {"04_tflops_sweep": "<script>"})
    text = made.read_text()
    assert made == run.path / "report.html" and "<h1>Verdict: NO-GO</h1>" in text
    assert not re.search("<b>|<i>|<script>", text)
    assert f"<td>&lt;i&gt;fast&lt;/i&gt;</td><td>{gate.state}</td><td>a &amp; b</td>" in text
    assert "<li>04_tflops_sweep: &lt;script&gt;</li>" in text and f"flashcore render {run.name}" in text


def test_the_smallest_notebooks_fit_first_and_keep_their_own_order():
    def item(name: str, size: int) -> dict[str, str]:
        return {"title": name, "html": "x" * size}

    big, small, middle = item("big", 9000), item("small", 100), item("middle", 2000)
    every = [big, small, middle]
    assert rendering._fitting(every, 100_000) == every
    assert rendering._fitting(every, 4000) == [small, middle]
    assert rendering._fitting(every, 700) == [small] and rendering._fitting(every, 500) == []


def test_bytes_are_counted_and_not_letters():
    wide = {"title": "wide", "html": "é" * 1000}
    assert rendering._fitting([wide], 2400) == [] and rendering._fitting([wide], 2500) == [wide]


def test_a_notebook_is_called_by_its_first_heading_or_by_its_name(tmp_path):
    v4 = nbformat.v4
    path = tmp_path / "05_sparse_paging.ipynb"
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("# no heading"), v4.new_markdown_cell("prose")]), path)
    assert rendering._title(path) == "sparse paging"
    cells = [
        v4.new_markdown_cell("prose"),
        v4.new_markdown_cell("## The title \nmore"),
        v4.new_markdown_cell("# Later"),
    ]
    nbformat.write(v4.new_notebook(cells=cells), path)
    assert rendering._title(path) == "The title"


@pytest.mark.notebook
def test_a_template_that_breaks_is_a_notebook_that_failed_and_keeps_its_page(tmp_path, run, monkeypatch):
    write_notebook(tmp_path / "toys", "06_status_report", "print('read')")

    def broken(*_):
        raise ZeroDivisionError("inside a template")

    monkeypatch.setattr(rendering, "_convert", broken)
    (run.path / "report.html").write_text("older")
    with pytest.raises(NotebookFailed, match=r"could not be drawn \(ZeroDivisionError: inside a template\)"):
        rendering.render(run, notebooks_dir=tmp_path / "toys")
    assert (run.path / "report.html").read_text() == "older"


def test_a_new_page_takes_the_pdf_of_an_older_one_away(run):
    """A PDF that says GO beside a page that says NO-GO would be believed; a new one is made only where it is wanted."""
    (run.path / "report.pdf").write_bytes(b"%PDF- of a page that said GO")
    page = rendering.write_plain_page(run, verdict.judge(run), {})
    assert "Verdict: INCONCLUSIVE" in page.read_text() and not (run.path / "report.pdf").exists()


def test_an_older_page_is_removed_with_its_pdf_or_the_error_says_why(run, monkeypatch):
    for name in ("report.html", "report.pdf"):
        (run.path / name).write_text("older")
    rendering.remove_pages(run)
    assert not (run.path / "report.html").exists() and not (run.path / "report.pdf").exists()
    rendering.remove_pages(run)  # nothing there is no error

    def denied(*_, **__):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(RecordsError, match="cannot be removed .Permission denied."):
        rendering.remove_pages(run)


def test_the_page_of_a_run_that_is_being_measured_is_drawn_elsewhere(run, tmp_path, monkeypatch):
    """What is half-written there comes and goes: notebooks, pages, and the last of its records."""
    run.append(Trial(kind="ceiling"))
    whole = run.records_path.read_bytes()
    (run.path / "notebooks").mkdir()
    for path in (run.path / "report.html", run.path / "notebooks" / "01_toy"):
        partial_path(path).mkdir()
    (run.path / "goes.txt").write_text("")
    seen = {}

    def render(copy, *, variant):
        seen["names"] = sorted(str(p.relative_to(copy.path)) for p in copy.path.rglob("*"))
        seen["records"] = copy.records_path.read_bytes()
        return write(copy.path / "report.html")

    def write(path):
        path.write_text("a page")
        return path

    def copy2(source, target, real=shutil.copy2):
        if source.endswith("goes.txt"):
            os.unlink(source)
        return real(source, target)

    def sized(file, real=records._between_writers):
        found = real(file)
        with open(run.records_path, "a") as more:
            more.write('{"kind":')
        return found

    monkeypatch.setattr(rendering, "render", render)
    monkeypatch.setattr(shutil, "copy2", copy2)
    monkeypatch.setattr(records, "_between_writers", sized)
    page, _, _ = rendering.render_to(run, tmp_path / "elsewhere", pdf=False)
    assert page.read_text() == "a page"
    assert seen == {"names": ["notebooks", "records.jsonl"], "records": whole}


def test_a_pdf_that_another_process_removed_first_is_gone_all_the_same(run, monkeypatch):
    def refuse(page, made):
        raise PrintError("no browser today")

    monkeypatch.setattr(rendering.pdf, "print_pdf", refuse)
    monkeypatch.setattr(type(run.path), "exists", lambda path: True)
    assert rendering.print_page(run) == (None, "No PDF was made: no browser today")
