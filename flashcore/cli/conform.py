"""The command line's table of promises kept and broken: `flashcore conform`. `add_to` puts it into the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.cli import completing, plain
from flashcore.cli.adding import adding_to
from flashcore.cli.debug import CLEAN, FOUND, JsonOption, RunOption
from flashcore.paths import absolute_place

if TYPE_CHECKING:
    from flashcore.bisection.diagnosis import Conformance
    from flashcore.records import Trial


def conform(
    function: Annotated[
        list[str] | None,
        typer.Argument(
            help="FILE.py:function, MODULE:function, or ids of backends; none for all that run here.",
            autocompletion=completing.backend,
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="ID,...", help="Promises to ask for, such as P1,P6; all when it is left out."),
    ] = None,
    problem: Annotated[
        str | None, typer.Option(help="An ordinary problem that the function takes; left out, one is looked for.")
    ] = None,
    layout: Annotated[str, typer.Option(help="How the function wants its tensors: bhsd or bshd.")] = "bhsd",
    lse: Annotated[str | None, typer.Option(help="What it returns beside its output: none, natural or log2.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the GPU where there is one when it is left out.")
    ] = None,
    time_limit: Annotated[float, typer.Option("--time-limit", help="Seconds that one call may take.")] = 20.0,
    json: JsonOption = False,
    run: RunOption = None,
) -> None:
    """Ask for the promises of attention: kept, broken or refused. Exit code 0: none is broken; 3: one is."""
    from flashcore import tables
    from flashcore.bisection import diagnosis

    places = [absolute_place(one) for one in function] if function else None
    trials: list[Trial] = []
    with adding_to(run) as folder:

        def keep(one: Conformance) -> None:
            for trial in one.to_trials():
                trials.append(folder.append(trial) if folder else trial)

        found = diagnosis.conform_all(
            places, problem, only=only, progress=None if json else plain.progress(), told=keep, layout=layout, lse=lse,
            device=device, time_limit_s=time_limit,
        )  # fmt: skip
    if json:
        plain.print_records(trials)
    else:
        plain.print_frame(tables.conform_table(trials), "Promises of attention")
        for row in tables.conform_breaks_table(trials).to_dict("records"):
            at = f" on {row['smallest case']}" if row["smallest case"] else ""
            plain.say(f"{row['implementation']}, {row['promise']}: {row['result']}{at}: {row['what happened']}.")
        plain.say(f"{tables.conform_sentence(trials)}.")
    raise typer.Exit(CLEAN if all(one.keeps for one in found) else FOUND)


def add_to(app: typer.Typer) -> None:
    """Put the command into a program."""
    app.command()(conform)
