"""The command line's diagnosis of any function: `flashcore diagnose`. `add_to` puts it into the program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flashcore.cli import adding, completing, plain
from flashcore.cli.debug import CLEAN, FOUND, JsonOption, RunOption
from flashcore.cli.printing import errors
from flashcore.errors import InvalidProblem
from flashcore.paths import absolute_place


def diagnose(
    function: Annotated[
        str | None, typer.Argument(help="FILE.py:function, MODULE:function, or the id of a backend.")
    ] = None,
    problem: Annotated[
        str | None, typer.Option(help="Ask about this problem alone, such as B=1,H=8,S=512,D=64,causal.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="How the function wants its tensors: bhsd or bshd.  [default: bhsd]")
    ] = None,
    lse: Annotated[str | None, typer.Option(help="What it returns beside its output: none, natural or log2.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: the GPU where there is one]")] = None,
    pattern: Annotated[str | None, typer.Option(help="Inputs of this pattern alone, together with --problem.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the inputs.  [default: 0]")] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", help="Seconds that one call may take.  [default: 20]")
    ] = None,
    probes: Annotated[bool, typer.Option("--probes", help="Also print what each probe showed, and its cost.")] = False,
    keep: Annotated[
        Path | None, typer.Option("--write-test", help="Write the smallest failing case as a pytest file.")
    ] = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Plant every known bug instead, and see what outputs alone tell of it.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", "--backends", help="With --prove: ids separated by commas, or 'all'.  [default: all]",
            autocompletion=completing.backends,
        ),
    ] = None,
    json: JsonOption = False,
    run: RunOption = None,
) -> None:  # fmt: skip
    """Say where any attention function goes wrong, and why. Exit code 0: nowhere; 3: found; 2: not understood."""
    if prove:
        _refuse({"FUNCTION": function, "--problem": problem, "--pattern": pattern, "--write-test": keep,
                 "--layout": layout, "--lse": lse, "--device": device, "--seed": seed, "--time-limit": time_limit,
                 "--probes": probes or None})  # fmt: skip
        _prove("all" if backend is None else backend, json, run)
        return
    if backend is not None:
        raise InvalidProblem("--backend goes with --prove; name the backend itself to diagnose it.")
    if function is None:
        raise InvalidProblem("Name a function: flashcore diagnose FILE.py:function, or a backend's id.")
    from flashcore.bisection.diagnosis import diagnose_apart, write_test

    place = absolute_place(function)
    with adding.adding_to(run) as folder:
        limit = {} if time_limit is None else {"time_limit_s": time_limit}
        found = diagnose_apart(place, problem, layout=layout or "bhsd", lse=lse, device=device, pattern=pattern,
                               seed=seed or 0, **limit)  # fmt: skip
        trial = found.to_trial(probes=probes)
        if json:
            plain.print_records([trial])
        else:
            for line in found.sentences():
                plain.say(line)
            if probes and found.peeled:
                plain.print_frame(found.table(), "Probes")
        if folder:
            folder.append(trial)
    if keep is not None:
        if found.smallest is None:
            errors().print("There is no failing case, so no test was written.")
        else:
            errors().print(escape(f"Wrote {write_test(found, str(keep), place)}."))
    raise typer.Exit(CLEAN if found.right else FOUND)


def _refuse(options: dict) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InvalidProblem(f"--prove asks about planted bugs alone; leave {', '.join(given)} out.")


def _prove(names: str, json: bool, run: Path | None) -> None:
    from flashcore import backends as registry
    from flashcore.bisection.faults import diagnosing

    chosen = [b for b in registry.select(names) if b.availability().ok]
    with adding.adding_to(run) as folder:
        told = None if json else plain.progress()
        trials = diagnosing.prove_all(folder, chosen, told)
    if json:
        plain.print_records(trials)
    else:
        from flashcore import tables

        plain.print_frame(tables.diagnosis_table(trials), "Planted bugs, diagnosed from outputs alone")
        for stage, others in diagnosing.CLASSES.items():
            plain.say(f"{stage} may show as {', '.join(others)}: {diagnosing.REASONS[stage]}.")
        plain.say(f"{diagnosing.sentence(trials)}.")
    raise typer.Exit(CLEAN if all(t.status in ("ok", "unsupported", "unavailable") for t in trials) else FOUND)


def add_to(app: typer.Typer) -> None:
    """Put the command into a program."""
    app.command()(diagnose)
