"""Print records, tables and lines so that another program can read them: no line of theirs is ever folded in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashcore.cli import printing

if TYPE_CHECKING:
    import pandas

    from flashcore.records import Trial

_WIDTH = 4000
"""Columns of output that goes to a file or a pipe: no line of a table is folded there."""


def _console(*, stderr: bool = False) -> Console:
    terminal = printing.is_terminal(sys.stderr if stderr else sys.stdout)
    width = None if terminal else _WIDTH
    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True, width=width)


def say(line: str) -> None:
    """One line of output, as it is."""
    _console().print(escape(line))


def progress() -> Callable[[str], None]:
    """What tells, where errors go, that something has begun."""
    console = _console(stderr=True)
    return lambda line: console.print(escape(f"{line} ..."))


def print_records(trials: Iterable[Trial]) -> None:
    """Records as JSON lines."""
    for trial in trials:
        sys.stdout.write(trial.model_dump_json() + "\n")


def _cell(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)


def print_frame(frame: pandas.DataFrame, title: str) -> None:
    """A framed table on a terminal; plain columns, two spaces apart, anywhere else."""
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    if printing.is_terminal(sys.stdout):
        table = Table(title=title)
        for name in frame.columns:
            table.add_column(escape(str(name)), overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        _console().print(table)
        return
    lines = [list(map(str, frame.columns)), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(frame.columns))]
    for line in lines:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")
