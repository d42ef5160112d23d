"""A page from records alone: whole or plain, small enough to mail, and a clear error where it cannot be written."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from support.notebook_tools import KILL, write_notebook

from flashcore.errors import RecordsError
from flashcore.pipeline import rendering, reporting


@pytest.mark.parametrize("cell", ["1 / 0", KILL])
def test_without_the_status_notebook_a_plain_page_still_says_the_verdict(tmp_path, toys, cell):
    write_notebook(toys, "06_status_report", cell)
    result = reporting.report(notebooks_dir=toys, out=tmp_path / "runs")
    assert list(result.failed) == ["06_status_report"]
    page = result.html.read_text()
    assert f"Verdict: {result.decision.verdict}" in page and "could not be drawn" in page
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)


def test_rendering_again_adds_no_record_and_replaces_the_page(tmp_path, toys):
    run = reporting.report(notebooks_dir=toys, out=tmp_path / "runs").run
    records, page = run.records_path.read_bytes(), (run.path / "report.html")
    page.write_text("old")
    assert reporting.render(run, notebooks_dir=toys) == page
    assert run.records_path.read_bytes() == records
    assert "old" != page.read_text() and "FlashCore" in page.read_text()
    assert [p.name for p in run.path.iterdir() if "partial" in p.name] == []


def test_a_page_that_would_be_too_large_leaves_out_the_largest_notebooks_and_names_them(tmp_path, toys, monkeypatch):
    run = reporting.report(notebooks_dir=toys, out=tmp_path / "runs", pdf=False).run
    whole = rendering.render(run, notebooks_dir=toys).read_text()
    for name, size in (("01_first", 400_000), ("02_second", 3_000)):
        cell = nbformat.v4.new_code_cell("print()")
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="x" * size)]
        heading = nbformat.v4.new_markdown_cell(f"# Notebook {name}")
        nbformat.write(nbformat.v4.new_notebook(cells=[heading, cell]), run.path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(rendering, "MOST_PAGE_BYTES", len(whole) + 20_000)
    page = rendering.render(run, notebooks_dir=toys).read_text()
    assert len(page) <= rendering.MOST_PAGE_BYTES and "x" * 3_000 in page and "x" * 400_000 not in page
    assert "larger than 3 MB: Notebook 01_first." in page


def test_a_page_that_cannot_be_written_is_one_clear_error(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RecordsError, match="No space left on device.*--out"):
        rendering._write_page(run, "text")
    assert not (run.path / "report.html").exists()


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
