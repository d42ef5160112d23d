"""The command line's debugging part: `flashcore bisect`, `faults`, `sanitize`. `add_to` puts them into the program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.cli import completing, plain
from flashcore.cli.adding import adding_to
from flashcore.errors import InvalidProblem, UnknownName, Unsupported
from flashcore.problem import parse_problem, square
from flashcore.records import Trial

if TYPE_CHECKING:
    pass

CLEAN, UNFINISHED, FOUND, NOT_AVAILABLE = 0, 1, 3, 4
"""Exit codes: nothing wrong, no answer, a fault found, the tool or the GPU is not here. 2 is a usage error."""
SMALL = square(1, 2, 256, 64, page_size=64)
"""What is bisected when no problem is named: several pages, and an answer within seconds."""

BackendOption = Annotated[
    str,
    typer.Option("--backend", help="Id of the backend, such as cpu or wmma.", autocompletion=completing.backend),
]
BackendsOption = Annotated[
    str,
    typer.Option(
        "--backend", "--backends", help="Ids separated by commas, or 'all'.", autocompletion=completing.backends
    ),
]
FaultOption = Annotated[
    str | None, typer.Option(help="Plant this bug first, such as F8.", autocompletion=completing.fault)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the records as JSON lines, and nothing else.")]
RunOption = Annotated[Path | None, typer.Option("--run", help="Also append the records to this run folder.")]


def bisect(
    backend: BackendOption,
    fault: FaultOption = None,
    problem: Annotated[
        str | None,
        typer.Option(help="A preset or a label such as B=1,H=8,S=512,D=64,causal.", autocompletion=completing.problem),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="What the inputs look like: normal, large, rising ...", autocompletion=completing.pattern),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    repeat: Annotated[int, typer.Option(help="Also compare the bits of this many repeats.", min=0)] = 0,
    json: JsonOption = False,
    run: RunOption = None,
) -> None:
    """Find the stage and the element where a backend goes wrong. Exit code 0: nowhere; 3: found; 1: unfinished."""
    from flashcore import backends
    from flashcore.bisection import bisect_trial
    from flashcore.bisection.faults import catalogue, proving
    from flashcore.measure.determinism import check_determinism
    from flashcore.numerics.inputs import PATTERNS, refuse_seed

    if pattern is not None and pattern not in PATTERNS:
        raise UnknownName("input pattern", pattern, list(PATTERNS))
    refuse_seed(seed)
    planned = catalogue.get(fault) if fault is not None else None
    if planned and planned.why_not(backend):
        backends.get(backend)  # a backend that does not exist is the better message
        raise InvalidProblem(f"{planned.id} cannot be planted in {backend}: {planned.why_not(backend)}.")
    chosen = planned.plant(backend) if planned else backends.get(backend)
    usual = planned.problem_in(backend) if planned else chosen.suits(SMALL)
    wanted = usual if problem is None else parse_problem(problem)
    looks = pattern or (planned.pattern if planned else "normal")
    chosen.require(wanted)
    if not chosen.traceable:
        raise Unsupported(chosen.id, "it does not expose its stages, so it cannot be bisected")
    options = {"seed": seed, "pattern": looks}
    with adding_to(run) as folder:  # before anything is computed: a folder that cannot be written costs nothing then
        if planned:
            trials = proving.bisect_planted(planned, backend, wanted, repeat=repeat, **options)
        else:
            trials = [bisect_trial(chosen, wanted, **options)]
            if repeat:
                trials.append(check_determinism(chosen, wanted, runs=max(2, repeat), **options))
        if json:
            plain.print_records(trials)
        else:
            _print_bisection(trials, planned)
        for trial in trials if folder else ():
            folder.append(trial)
    wrong = any(t.status == "failed" or t.data.get("crashed") for t in trials)
    raise typer.Exit(FOUND if wrong else CLEAN if all(t.status == "ok" for t in trials) else UNFINISHED)


def faults(
    backends: BackendsOption = "all",
    json: JsonOption = False,
    run: RunOption = None,
) -> None:
    """Plant every known bug and see whether it is found at its stage. Exit code 0: all were; 3: one was not."""
    from flashcore import backends as registry
    from flashcore import tables
    from flashcore.bisection.faults import proving

    chosen = _provable(registry.select(backends), backends)
    with adding_to(run) as folder:
        trials = proving.run_faults(folder, chosen, progress=None if json else plain.progress())
    judged = [t for t in trials if t.data.get("outcome") not in ("not applicable", "not run")]
    if not judged:
        for one in chosen:
            one.require()
        raise Unsupported(backends, "no bug of the catalogue can be planted in it")
    if json:
        plain.print_records(trials)
    else:
        plain.print_frame(tables.fault_matrix(trials), "Planted bugs")
        for trial in trials:
            if trial.status in ("failed", "error"):
                plain.say(f"{trial.data.get('fault')} in {trial.backend}: {trial.reason}")
        plain.say(f"{tables.faults_sentence(trials)}.")
    raise typer.Exit(CLEAN if all(t.status == "ok" for t in judged) else FOUND)


def _provable(selected: list, names: str) -> list:
    from flashcore.bisection.faults import proving

    found = proving.provable(selected)
    if not found:
        raise Unsupported(names, "it does not expose its stages, so no bug can be found in it")
    return found


def sanitize(
    backend: BackendsOption = "all",
    tool: Annotated[str, typer.Option(help="memcheck, racecheck, initcheck, synccheck, or all.")] = "all",
    fault: FaultOption = None,
    json: JsonOption = False,
    run: RunOption = None,
) -> None:
    """Watch kernels with compute-sanitizer. Exit code 0: clean; 3: findings; 4: not available; 1: unfinished."""
    from flashcore import backends as registry
    from flashcore import tables
    from flashcore.bisection.faults import catalogue
    from flashcore.bisection.faults.sanitizer import sanitizing

    chosen = [b for b in registry.select(backend) if b.kernel]
    if not chosen:
        raise Unsupported(backend, "it has no kernel of ours, so there is nothing to watch")
    sanitizing.tools_of(tool)
    if fault is not None:
        for one in chosen:
            catalogue.get(fault).plant(one.id)
    with adding_to(run) as folder:
        told = None if json else plain.progress()
        trials = sanitizing.sanitize(folder, chosen, tools=tool, fault=fault, progress=told)
    if json:
        plain.print_records(trials)
    else:
        plain.print_frame(tables.sanitizer_table(trials), "compute-sanitizer")
    states = {trial.status for trial in trials}
    raise typer.Exit(FOUND if "failed" in states else UNFINISHED if "error" in states else
                     NOT_AVAILABLE if "unavailable" in states else CLEAN)  # fmt: skip


def add_to(app: typer.Typer) -> None:
    """Put the commands into a program."""
    for command in (bisect, faults, sanitize):
        app.command()(command)


# ------------------------------------------------------------------------------------------------ printing


def _print_bisection(trials: list[Trial], planned) -> None:
    from flashcore import tables

    for trial in trials:
        of = f"{trial.backend} with {planned.id} planted ({planned.title})" if planned else trial.backend
        where = f"{of} on {trial.problem.label()}"
        if (trial.variant or "").endswith("determinism"):
            same = f"{trial.data.get('runs')} runs gave the same bits"
            plain.say(f"Repeats: {trial.reason or same}.")
            continue
        if trial.data.get("stages"):
            plain.print_frame(tables.stage_table(trial), where)
            coverage = trial.data["coverage"]
            plain.say(f"Judged: {coverage['elements']} values, "
                 f"{'all there are' if coverage['complete'] else 'NOT all there are'}.")  # fmt: skip
        plain.say(f"{tables.WORDS[trial.status]}: {where}: {(trial.reason or trial.data['finding']).rstrip('.')}.")
