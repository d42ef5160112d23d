"""The command line's comparison of cards: `flashcore fleet`. `add_to` puts it into the program."""

from __future__ import annotations

import json as jsons
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flashcore.cli import spreading
from flashcore.cli.printing import console, errors, say, shown
from flashcore.cli.spreading import ClusterOption, GpusOption, SchedulerOption, WorkersOption

AS_THE_OTHERS, OFF = 0, 3
"""Exit codes: no card is off; one is, or their bits differ. 2 is a usage error."""


def fleet(
    gpus: GpusOption = None,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    cluster: ClusterOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")] = False,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder that gets the run's folder.  [default: reports/fleets]")
    ] = None,
) -> None:
    """Measure every card by one short list and name those that are off. Exit code 0: none is; 3: one is."""
    from flashcore.pipeline import fleet as fleets

    named = {"gpus": gpus, "workers": workers, "scheduler": scheduler, "cluster": cluster}
    if not any(value is not None for value in named.values()):
        named["gpus"] = "all"
    err = errors()
    with spreading.spread(err, **named, mixed=True) as pool:
        run, found, page = fleets.compare_cards(pool, out=out_dir)
    if json:
        whole = {"run": str(run.path), "page": str(page), **found.as_dict()}
        sys.stdout.write(jsons.dumps(whole, indent=1) + "\n")
    else:
        for kind in found.kinds:
            _print(kind)
        for sentence in found.sentences():
            say(escape(sentence))
        say(f"Page: {escape(shown(page))}")
    raise typer.Exit(AS_THE_OTHERS if found.ok else OFF)


def _print(kind) -> None:
    from flashcore.decision import fleet as judging
    from flashcore.decision.compare import number

    off = {one.card for one in kind.off}
    table = Table(title=f"{len(kind.cards)} × {kind.name}{' (CPU workers, no GPU)' if kind.cpu else ''}")
    table.add_column("Card", overflow="fold")
    table.add_column("Node", overflow="fold")
    for one in kind.spreads:
        table.add_column(f"{one.title} ({one.unit})", justify="right", overflow="fold")
    for key in kind.sensors:
        title, unit = judging.SENSORS[key]
        table.add_column(f"{title} ({unit})", justify="right", overflow="fold")
    table.add_column("State")
    for trial in kind.cards:
        name, load = judging.card_name(trial), trial.data.get("load") or {}
        figures = [number(judging.figure(trial, one.name)) for one in kind.spreads]
        sensed = [number(load.get(key), 4) for key in kind.sensors]
        table.add_row(
            escape(name), escape(str(trial.node)), *figures, *sensed, "OFF" if name in off else "as the others"
        )
    table.add_section()
    spread = [f"{one.percent:.1f} %" for one in kind.spreads]
    table.add_row("spread", "", *spread, *("" for _ in kind.sensors), "")
    console().print(table)


def add_to(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(fleet)
