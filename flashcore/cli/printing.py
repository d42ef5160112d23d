"""What several commands print: a line, a path, a decision with its gates and options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flashcore.decision.verdict import Decision

WIDTH_OF_A_FILE = 120
"""Columns of a table that goes to a file or a pipe, where there is no terminal to measure."""


def console() -> Console:
    """Where results go."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def errors() -> Console:
    """Where progress and errors go."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


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
        row["Option"] += f"\n(effort: {row.pop('Effort')}; risk: {row.pop('Risk')})"
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
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
