"""Progress in a cell: nothing within the first second, one line that is written over, and nothing left at the end."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from flashcore.bisection.interactive import cells
from flashcore.bisection.interactive.cells import CellProgress


@pytest.fixture
def terminal(monkeypatch):
    """A terminal in place of stderr."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(cells, "sys", SimpleNamespace(stderr=screen, modules=sys.modules))
    monkeypatch.setattr(cells, "in_kernel", lambda: False)
    return screen


def test_a_short_question_shows_nothing(terminal):
    with CellProgress() as progress:
        progress("comparing", 1, 48)
    assert terminal.getvalue() == ""


def test_a_long_one_is_a_line_that_is_gone_in_the_end(terminal):
    with CellProgress(after_s=0, every_s=0) as progress:
        progress("comparing", 1, 48)
        progress("probe", 2, 12)
    assert terminal.getvalue() == "\rcomparing: 1 of 48\r" + "\rprobe: 2 of 12    \r" + "\r" + " " * 14 + "\r"


def test_it_changes_no_more_often_than_it_was_told(terminal):
    with CellProgress(after_s=0, every_s=1000) as progress:
        for n in range(50):
            progress("comparing", n, 50)
    assert terminal.getvalue().count("of 50") == 1


def test_what_is_no_terminal_gets_nothing(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(cells, "sys", SimpleNamespace(stderr=file, modules=sys.modules))
    with CellProgress(after_s=0) as progress:
        progress("comparing", 1, 48)
    assert file.getvalue() == ""


def test_in_a_cell_it_is_one_output_with_a_bar_and_emptied_at_the_end(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda html: shown.append(html.data))
    monkeypatch.setattr(cells, "in_kernel", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda html, display_id: shown.append(html.data) or handle)
    with CellProgress(after_s=0, every_s=0) as progress:
        progress("judging <cpu>", 1, 4)
        progress("judging <cpu>", 2, 4)
    assert shown[0] == '<progress value="1" max="4">1 of 4</progress> judging &lt;cpu&gt;: 1 of 4'
    assert "2 of 4" in shown[1] and shown[2:] == [""]


def test_a_test_runs_in_no_kernel():
    assert not cells.in_kernel()
