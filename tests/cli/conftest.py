"""Shared by the tests of the command line: a program that prints where the runner of the tests looks."""

from __future__ import annotations

import pytest

from flashcore.cli import program


@pytest.fixture(autouse=True)
def _printed_where_the_runner_looks(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(program, "out", Console(highlight=False, width=program.WIDTH_OF_A_FILE))
    monkeypatch.setattr(program, "err", Console(stderr=True, highlight=False, soft_wrap=True))
    monkeypatch.setenv("FLASHCORE_DEBUG", "")  # so that it is put back, whatever a command sets
    monkeypatch.delenv("FLASHCORE_DEBUG")
