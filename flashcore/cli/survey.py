"""The command line's survey of cuBLASLt: `flashcore survey`. `add_to` puts it into the program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flashcore.cli import plain, printing
from flashcore.cli.adding import adding_to
from flashcore.errors import BackendUnavailable
from flashcore.records import scratch_run

DONE, LABEL_WRONG = 0, 3
"""Exit codes: surveyed; an algorithm that was labelled is not the one that ran. 2 is a usage error."""


def survey(
    profile: Annotated[str, typer.Option(help="How much to measure: quick or full.")] = "full",
    run: Annotated[
        Path | None, typer.Option("--run", help="Run folder to append to; an interrupted one goes on.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the records as JSON lines, and nothing else.")] = False,
) -> None:
    """Time what cuBLASLt offers for attention's products. Exit code 0: done; 3: a label is not what ran."""
    from flashcore.decision import evidence
    from flashcore.gpu import device
    from flashcore.page.drawing import answers
    from flashcore.surveys.cublaslt import labels
    from flashcore.surveys.cublaslt import measuring as surveying
    from flashcore.surveys.cublaslt.grid import survey_grid

    cases = survey_grid(profile)
    if not device.has_gpu():
        raise BackendUnavailable("cublaslt", "no CUDA GPU is visible to torch", "run on an H100 or H200; "
                                 "'flashcore render' shows the recorded survey")  # fmt: skip
    out = printing.console(soft_wrap=True)
    err = printing.errors()
    with adding_to(run or scratch_run().path) as folder:
        if not folder.environment():
            device.record_environment(folder, "before", {"command": "survey", "profile": profile})
        trials = surveying.survey(folder, cases, progress=lambda line: err.print(escape(line)))
        trials += labels.prove_labels(folder, [c for c in cases if c.group in ("report", "row")])
    if json:
        plain.print_records(trials)
    else:
        gathered = evidence.gather(folder)
        for number, answer in enumerate(answers.answers(gathered.trials, environment=gathered.environment), start=1):
            out.print(f"{number}. {escape(answer.question)}\n   {escape(' '.join(answer.sentences))}")
        out.print(f"Records: {escape(str(folder.records_path))}")
    wrong = [t for t in trials if t.data.get("group") == labels.PROOF and t.status == "failed"]
    for trial in wrong:
        err.print(escape(f"{trial.data.get('product')}, {trial.data.get('policy')}: {trial.reason}"))
    raise typer.Exit(LABEL_WRONG if wrong else DONE)


def add_to(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(survey)
