"""What several commands print: a line, a path, a decision with its gates and options.

What is printed never decides how a command ends: `settle` makes the standard streams take any letter and any end.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flashcore.decision.verdict import Decision

WIDTH_OF_A_FILE = 120
"""Columns of a table that goes to a file or a pipe, where there is no terminal to measure."""


def settle() -> None:
    """Make standard output and error fit for whatever is printed, so that printing never ends a command.

    A letter that the stream's encoding lacks is written as ``\\u00b5``, which JSON reads back. A reader that is gone, a
    full disk behind a redirection or a closed stream takes nothing more, and the command goes on to its own exit code.
    Of a full disk it tells where errors go, since whoever reads the file later could not know.
    """
    codecs.register_error("flashcore", _escaped)
    sys.stdout, sys.stderr = _steady(sys.stdout), _steady(sys.stderr)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)), error.end


def _steady(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed before the program began
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="flashcore")
    return _Steady(stream)


class _Steady:
    """A text stream whose failures stay in it: from the first one on, everything goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno != errno.EPIPE and self is sys.stdout:
            sys.stderr.write(f"Standard output takes no more ({error.strerror}); what was printed is not whole.\n")
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is still in the buffer finds its way out there
            os.close(nowhere)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream, which may be closed, goes to a terminal."""
    return stream is not None and stream.isatty()


def console(*, soft_wrap: bool = False) -> Console:
    """Where results go; with `soft_wrap` no line is folded."""
    width = None if is_terminal(sys.stdout) else WIDTH_OF_A_FILE
    return Console(highlight=False, emoji=False, soft_wrap=soft_wrap, width=width)  # a path may hold :x: itself


def errors() -> Console:
    """Where progress and errors go."""
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def say(line: str) -> None:
    """One line of output, however long: a wrapped path could not be copied."""
    console().print(line, soft_wrap=True)


def print_decision(decision: Decision) -> None:
    """The gates, the options and the verdict."""
    table = Table(title="Gates")
    table.add_column("Gate")
    table.add_column("Result")
    table.add_column("Evidence")
    table.add_column("Reason", overflow="fold")
    for gate in decision.gates:
        need = "" if gate.required else " (not required)"
        table.add_row(escape(gate.title) + need, gate.state, gate.evidence, escape(gate.reason))
    console().print(table)
    if decision.options:
        _print_options(decision)
    say(f"Verdict: [bold]{decision.verdict}[/bold]. {escape(decision.reason)}")
    for sentence in filter(None, (decision.stored, decision.seal)):
        say(escape(sentence))


def _print_options(decision: Decision) -> None:
    from flashcore.decision import advice

    matrix, conditions = Table(title="Options"), Table(title="Conditions of the options")
    for row in advice.matrix_rows(decision.options):
        if by := row.pop("Judged by", ""):
            row["Option"] += f"\n(effort: {row.pop('Effort')}; risk: {row.pop('Risk')}; as {by} judged them)"
        row["Result"] += f"\n{row.pop('Conditions')}"
        del row["What shipping it means"]
        _add_row(matrix, row)
    for row in advice.condition_rows(decision.options):
        _add_row(conditions, row)
    out = console()
    out.print(matrix)
    out.print(conditions)
    say(escape(decision.recommendation))
    say(f"What would change it: {escape(decision.flip)}")


def _add_row(table: Table, row: dict[str, str]) -> None:
    if not table.columns:
        for column in row:
            table.add_column(column, overflow="fold")
    table.add_row(*map(escape, row.values()))


def shown(path: Path) -> str:
    """The path relative to the current folder when it lies inside."""
    path = path.resolve()
    try:
        here = Path.cwd()
    except OSError:  # the current folder was removed
        return str(path)
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
