"""The command line's proof of the batch-invariant mode: `flashcore invariance`. `add_to` puts it into the program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.cli import completing, plain
from flashcore.cli.adding import adding_to
from flashcore.cli.debug import JsonOption

if TYPE_CHECKING:
    from flashcore.records import Trial

KEPT, BROKEN = 0, 1
"""Exit codes: who promises the same bits keeps every case; somebody does not, or did not finish. 2 is a usage error."""
FOUND, MISSED = 0, 1
"""With --prove: every bug that could be planted was found; one was not, or none could be planted."""
BOTH = "both"


def invariance(
    backends: Annotated[
        str | None,
        typer.Option(
            "--backends",
            "--backend",
            metavar="ID,...",
            help="Whom to ask; left out: what promises the same bits, our kernel for prompts, and the peers.",
            autocompletion=completing.backends,
        ),
    ] = None,
    cases: Annotated[
        int | None,
        typer.Option(
            "--cases", metavar="N", help="Cases of each, in each mode; left out: 10000 on a GPU, 1000 without."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    mode: Annotated[
        str, typer.Option(help="invariant, ordinary, or both; peers have the ordinary mode alone.")
    ] = BOTH,
    limit: Annotated[
        float | None,
        typer.Option(
            "--limit", metavar="SECONDS",
            help="Time for each, in each mode; left out: 300 on a GPU, 60 without or for a peer.",
        ),
    ] = None,
    prove: Annotated[
        bool,
        typer.Option(
            "--prove", help="Plant bugs that break the promise instead, in our kernels and in cpu: is each found?"
        ),
    ] = False,
    json: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", "--run", metavar="RUN", help="Also append the records to this run folder.")
    ] = None,
) -> None:  # fmt: skip
    """Compute random sequences alone, among others, in chunks and in pages, and compare every bit.

    Exit code 0: whoever promises the same bits keeps every case; 1: somebody breaks one, or did not finish. What peers
    and the ordinary mode break is a finding. With --prove 0: each planted bug is found; 1: one is not, or none could be
    planted here.
    """
    from flashcore.backends import ids_in
    from flashcore.errors import InvalidProblem, UnknownName
    from flashcore.gpu import device
    from flashcore.surveys.invariance import facts, measuring

    if mode != BOTH and mode not in measuring.MODES:
        raise UnknownName("mode", mode, [BOTH, *measuring.MODES])
    if cases is not None and cases < 1:
        raise InvalidProblem(f"--cases is {cases}; ask at least 1.")
    if limit is not None and not limit > 0:
        raise InvalidProblem(f"--limit is {limit:g}; give a number of seconds above 0.")
    modes = measuring.MODES if mode == BOTH else (mode,)
    chosen = None
    if backends is not None and backends.strip() != "all":
        chosen = ids_in(backends)
        if not chosen:
            raise InvalidProblem("--backends names nobody; leave it out, or give ids separated by commas.")
    if prove:
        for name, given in (("--mode", mode != BOTH), ("--out", out is not None)):
            if given:
                raise InvalidProblem(
                    f"--prove takes no {name}: its bugs break a promise, and its records go to no run."
                )
        _prove(chosen, json, num_cases=cases, seed=seed, limit_s=limit)
    trials: list[Trial] = []
    with adding_to(out) as folder:
        if folder and not folder.environment():
            device.record_environment(folder, "before", {"command": "invariance", "seed": seed})
        measuring.measure_all(
            chosen, modes, num_cases=cases, seed=seed, limit_s=limit, progress=None if json else plain.progress(),
            told=lambda trial: trials.append(folder.append(trial) if folder else trial),
        )  # fmt: skip
    if json:
        plain.print_records(trials)
    else:
        _print(trials, facts)
    broken = [t for t in trials if t.data.get("promised") and t.status in ("failed", "error")]
    raise typer.Exit(BROKEN if broken else KEPT)


def _print(trials: list[Trial], facts) -> None:
    plain.print_frame(facts.table(trials), "The same bits: cases kept")
    for row in facts.breaks_table(trials).to_dict("records"):
        plain.say(f"{row['backend']}, {row['mode']} mode, {row['ways']}: {row['what differs']}.")
        plain.say(f"    {row['to ask it again']}")
    plain.say(f"{facts.sentence(trials)}.")


def _prove(chosen: list[str] | None, json: bool, **options) -> None:
    """Plant bugs, say what became of each, and leave with the exit code."""
    from flashcore.bisection.faults import breaking

    trials = list(breaking.prove_breaks(chosen, **options, progress=None if json else plain.progress()))
    if json:
        plain.print_records(trials)
    else:
        for trial in trials:
            plain.say(_outcome(trial))
    outcomes = {trial.data["outcome"] for trial in trials}
    raise typer.Exit(FOUND if "found" in outcomes <= {"found", "not run"} else MISSED)


def _outcome(trial: Trial) -> str:
    """What became of a planted bug, as a sentence."""
    data = trial.data
    told = f"{data['fault']} in {trial.backend} ({data['title']}): {data['outcome']}"
    if data["outcome"] == "found":
        return f"{told}, {data['broken']:,} of {data['cases']:,} cases are broken."
    return f"{told}, {trial.reason}."


def add_to(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(invariance)
