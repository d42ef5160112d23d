"""The command line's look at runs over time: `flashcore compare` and `flashcore trend`. `add_to` adds them."""

from __future__ import annotations

import json as json_
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flashcore.cli import completing, printing
from flashcore.decision.compare import number
from flashcore.problem import parse_problem

if TYPE_CHECKING:
    from flashcore.page.history import Comparison, Snapshot
    from flashcore.page.history.timings import Row

REGRESSION, NOTHING_COMPARED = 3, 4
MOST_LINES = 20
"""Of what else changed; `--all` prints every line."""

RUN_HELP = "A run's folder, its id, a records.jsonl, or the word 'latest'."
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder that holds the run folders.  [default: reports/runs]")
]


def compare(
    run_a: Annotated[
        str, typer.Argument(metavar="RUN_A", help=f"The run before. {RUN_HELP}", autocompletion=completing.run)
    ],
    run_b: Annotated[
        str, typer.Argument(metavar="RUN_B", help=f"The run now. {RUN_HELP}", autocompletion=completing.run)
    ] = "latest",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 3 on a regression, 4 when nothing of ours could be compared.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="List every timing and every change, and not the notable.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as one JSON object, and no table.")
    ] = False,
    out_dir: OutOption = None,
) -> None:
    """Compare two runs by a test on their samples: faster, slower, same, or too noisy to say.

    Exit code 0: compared, whatever was found. With --strict 3: a timing of ours is slower by more than 3 % with
    separated intervals, or a check that passed now fails or is gone; 4: no timing of ours could be compared. 2: usage.
    """
    from flashcore.page import history

    found = history.compare_runs(_snapshot(run_a, out_dir), _snapshot(run_b, out_dir))
    regressions = found.regressions
    if json:
        _print_json(found.as_dict())
    else:
        _print_comparison(found, every)
        _print_end(found, regressions, strict)
    if strict and regressions:
        raise typer.Exit(REGRESSION)
    if strict and not found.judged:
        raise typer.Exit(NOTHING_COMPARED)


def trend(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Folder that holds run folders.  [default: reports/runs]")
    ] = None,
    problem: Annotated[
        str,
        typer.Option(help="A preset, or a label such as B=1,H=8,S=512,D=64.", autocompletion=completing.problem),
    ] = "report",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a point, and no table.")] = False,
) -> None:
    """Show latency, TFLOPS and ratio of every backend over the runs of a folder, by date, for one problem.

    Exit code 0, also when there is nothing to show; 2: usage.
    """
    from flashcore.page.history import runs_in
    from flashcore.page.history.trend import trend as trend_of
    from flashcore.pipeline import folders

    wanted = parse_problem(problem)
    runs, left_out = runs_in(folder if folder is not None else folders.runs_dir())
    machines = trend_of(runs, wanted)
    if json:
        for point in (p for points in machines.values() for p in points):
            _print_json(point.as_dict(), indent=None)
        for sentence in left_out:
            printing.errors().print(escape(sentence))
        return
    out = printing.console()
    for machine, points in machines.items():
        table = Table(title=f"{escape(machine)}, {escape(wanted.label().replace(',', ', '))}")
        table.add_column("Backend", no_wrap=True)
        for column in ("Day", "Run"):
            table.add_column(column, overflow="fold")
        for column in ("µs", "TFLOPS", "Ratio to best peer"):
            table.add_column(column, justify="right")
        table.add_column("Against the run before", overflow="fold")
        for point in sorted(points, key=lambda p: p.backend):  # stable: by date within a backend
            ratio = f"{number(point.ratio.value)} × {point.ratio.other.backend}" if point.ratio else "no peer"
            moved = f", {_percent(point.percent)}" if point.percent is not None else ""
            how = f" relative to {point.peer}" if point.peer and moved else ""
            kernels = "; other kernel source" if point.other_source else ""
            cells = (point.backend, point.day, point.run, number(point.latency_us), number(point.tflops), ratio,
                     f"{point.word}{moved}{how}{kernels}")  # fmt: skip
            table.add_row(*map(escape, cells))
        out.print(table)
    if not machines:
        out.print(f"No run in this folder timed {escape(wanted.label())}, so there is no trend.")
    for sentence in left_out:
        out.print(escape(sentence))


def _snapshot(run: str, out_dir: Path | None) -> Snapshot:
    """A run by folder, id or `latest`, as for the other commands, or by its file of records."""
    from flashcore.page import history
    from flashcore.pipeline import folders

    path = Path(run)
    return history.read(path if path.is_file() and path.name != "latest" else folders.find_run(run, out_dir))


# ------------------------------------------------------------------------------------------------ printing


def _print_json(data: dict, *, indent: int | None = 1) -> None:
    """JSON proper: what is no number is null, since NaN is none of JSON's."""
    sys.stdout.write(json_.dumps(_finite(data), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value):
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value


def _print_comparison(found: Comparison, every: bool) -> None:
    out = printing.console()
    out.print(f"Before: {escape(found.before.title)}\nNow:    {escape(found.now.title)}")
    if found.rows:
        out.print(_overview(found))
    notable = [r for r in found.rows if every or (r.role == "ours" and r.word in ("faster", "slower"))]
    notable += [r for r in found.rows if r.word == "not compared" and r not in notable]
    if notable:
        out.print(_details(notable, "Every timing" if every else "Faster, slower, or not compared"))
    for title, lines in (
        ("What else changed:", [d.sentence for d in found.differences]),
        ("How far this comparison goes:", list(found.limits)),
    ):
        if lines:
            out.print(f"\n{title}")
            shown = lines if every else lines[:MOST_LINES]
            for line in shown:
                out.print(f"  {escape(line)}", soft_wrap=True)
            if len(shown) < len(lines):
                out.print(f"  and {len(lines) - len(shown)} more; --all lists them")


def _overview(found: Comparison) -> Table:
    from flashcore.page.history.interval import WORDS

    table = Table(title="Timings in both runs, by backend")
    table.add_column("Backend", no_wrap=True)
    for word in WORDS:
        table.add_column(word[0].upper() + word[1:], justify="right")
    for backend in dict.fromkeys(row.backend for row in found.rows):
        group = [row for row in found.rows if row.backend == backend]
        counts = Counter(row.word for row in group)
        peer = " (peer)" if group[0].role == "peer" else ""
        table.add_row(escape(f"{backend}{peer}"), *(str(counts[word]) for word in WORDS))
    return table


def _details(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    table.add_column("Backend", no_wrap=True)
    for column in ("Problem", "In words"):
        table.add_column(column, overflow="fold")
    for column in ("Speed", "99 % interval", "µs then, now (absolute)"):
        table.add_column(column, justify="right")
    table.add_column("Compared", overflow="fold")
    for row in rows:
        bounds = " to ".join(map(_percent, row.interval_percent)) if row.interval_percent else "none"
        kernels = "; other kernel source" if row.other_source else ""
        how = f"relative to {row.peer}" if row.basis == "relative" else row.basis.replace("none", "")
        cells = (
            row.backend, row.problem.replace(",", ", "), f"{row.word}{kernels}",
            _percent(row.percent) if row.percent is not None else "none", bounds,
            f"{number(row.before_us)}, {number(row.now_us)}", "; ".join(filter(None, (how, row.note))),
        )  # fmt: skip
        table.add_row(*map(escape, cells))
    return table


def _percent(value: float | None) -> str:
    from flashcore.page.history.comparing import signed

    return f"{signed(value)} %"


def _print_end(found: Comparison, regressions: list[str], strict: bool) -> None:
    out = printing.console()
    drift = ", ".join(f"{value:.1f} % ({basis})" for basis, value in found.drift_percent.items())
    if drift:
        out.print(f"\nIntervals are widened by how far unchanged code moved between the runs: {drift}.", soft_wrap=True)
    out.print(f"{'' if drift else chr(10)}{escape(found.summary)}", soft_wrap=True)
    for sentence in regressions:
        out.print(f"Regression: {escape(sentence)}", soft_wrap=True)
    if not regressions:
        out.print(
            "No regression: nothing of ours is slower beyond 3 % with separated intervals, and no check fails anew."
        )
    if strict and not regressions and not found.judged:
        out.print("But no timing of ours could be compared on one kind of machine, which settles nothing: exit code 4.")


def add_to(app: typer.Typer) -> None:
    """Put the commands into the program."""
    app.command()(compare)
    app.command()(trend)
