"""Printing a page: by whichever Chromium is there, and a plain sentence where none is."""

from __future__ import annotations

import stat

import pytest

from flashcore.errors import PrintError, ToolMissing
from flashcore.page import pdf
from flashcore.pipeline import rendering
from flashcore.records import RunFolder

PAGE = "<!doctype html><html lang='en'><title>A page</title><body><h1>Printed</h1></body></html>"


@pytest.fixture
def written(run) -> RunFolder:
    (run.path / "report.html").write_text(PAGE)
    return run


def program(path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.browser
def test_a_page_becomes_a_pdf_beside_it(written):
    if pdf.browser() is None:
        pytest.skip("Chromium is not installed")
    made, why = rendering.print_page(written)
    assert made == written.path / "report.pdf" and why == ""
    assert made.read_bytes().startswith(b"%PDF-") and str(written.path).encode() not in made.read_bytes()
    assert sorted(p.name for p in written.path.iterdir() if "report" in p.name) == ["report.html", "report.pdf"]


def test_without_a_browser_there_is_a_sentence_and_no_older_pdf(written, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CHROMIUM", "")
    assert pdf.browser() is None
    with pytest.raises(ToolMissing, match="apt-get install chromium"):
        pdf.print_pdf(written.path / "report.html", written.path / "report.pdf")
    (written.path / "report.pdf").write_bytes(b"%PDF- of an older page")
    made, why = rendering.print_page(written)
    assert made is None and why.startswith("No PDF was made: A Chromium") and why.endswith("was removed.")
    assert not (written.path / "report.pdf").exists()


@pytest.mark.parametrize(
    ("does", "said"), [("echo went wrong >&2; exit 7", "exit code 7: went wrong"), ("exit 0", "it said nothing")]
)
def test_a_browser_that_fails_is_a_sentence(written, monkeypatch, tmp_path, does, said):
    monkeypatch.setenv("FLASHCORE_CHROMIUM", program(tmp_path / "browser", does))
    made, why = rendering.print_page(written)
    assert made is None and said in why and (written.path / "report.html").read_text() == PAGE


def test_a_browser_that_hangs_is_ended(written, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHCORE_CHROMIUM", program(tmp_path / "browser", "exec sleep 60"))
    monkeypatch.setattr(pdf, "TIMEOUT_S", 0.3)
    with pytest.raises(PrintError, match="longer than"):
        pdf.print_pdf(written.path / "report.html", written.path / "report.pdf")


@pytest.mark.parametrize("root", [False, True])
def test_the_browser_is_sandboxed_where_it_can_be(monkeypatch, tmp_path, root):
    monkeypatch.setattr(pdf.os, "geteuid", lambda: 0 if root else 1000, raising=False)
    given = []
    monkeypatch.setattr(pdf.os, "chown", lambda path, user, group: given.append(user), raising=False)
    first, *others = pdf._attempts(["chromium", "--headless"], tmp_path)
    assert first["args"] == ["chromium", "--headless"], "the first way is in the sandbox"
    if not root:
        assert others == [] and "user" not in first
        return
    assert first["user"] == first["group"] == pdf.NOBODY and first["extra_groups"] == [] and given == [pdf.NOBODY]
    (last,) = others
    assert last == {"args": ["chromium", "--no-sandbox", "--headless"]}


def test_playwrights_browser_is_found_where_the_system_has_none(monkeypatch, tmp_path):
    monkeypatch.delenv("FLASHCORE_CHROMIUM", raising=False)
    monkeypatch.setattr(pdf.shutil, "which", lambda name: None)
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    assert pdf.browser() is None
    for version in ("1100", "1200"):
        (tmp_path / f"chromium-{version}" / "chrome-linux").mkdir(parents=True)
        (tmp_path / f"chromium-{version}" / "chrome-linux" / "chrome").touch()
    assert "chromium-1200" in pdf.browser()
