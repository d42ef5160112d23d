"""The command line's survey of paging: `flashcore paging`. `add_to` puts it into the program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flashcore.cli import plain, printing
from flashcore.cli.adding import adding_to
from flashcore.errors import InvalidProblem
from flashcore.records import RunFolder, Trial, scratch_run

if TYPE_CHECKING:
    from flashcore.records import Trial

DONE, WRONG = 0, 3
"""Exit codes: measured; something measured is wrong, or did not finish. 2 is a usage error."""


def paging(
    profile: Annotated[str, typer.Option(help="How much to measure: quick or full.")] = "full",
    run: Annotated[Path | None, typer.Option("--run", help="Run folder to append to; left out, a scratch one.")] = None,
    what: Annotated[
        str,
        typer.Option(
            help="correctness, memory, decode, prefill, append, accuracy, tokens, serving, shapes; several with "
            "commas. 'all' leaves out what says nothing without a GPU."
        ),
    ] = "all",
    report_layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Layers of the original report's shape, which names none, for tokens a second.  [default: 1]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random input.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the records as JSON lines, and nothing else.")] = False,
) -> None:
    """Measure paging: memory, time, accuracy, tokens a second. Exit code 0: done; 3: something is wrong."""
    from flashcore.gpu import device
    from flashcore.numerics.inputs import refuse_seed
    from flashcore.surveys.paging.measuring import chosen, measure
    from flashcore.surveys.paging.plan import decoder, plan_for

    plan = plan_for(profile, device.has_gpu(), report_layers=report_layers or 1, decode_backend=decoder())
    names = chosen(what, plan.gpu)
    if report_layers is not None and not (plan.gpu and "tokens" in names):
        why = "add tokens to --what" if plan.gpu else "run it where there is a GPU, or leave it out"
        raise InvalidProblem(f"--report-layers is about tokens a second on a GPU; {why}.")
    refuse_seed(seed)
    err = printing.errors()
    with adding_to(run or scratch_run().path) as folder:
        if not folder.environment():
            device.record_environment(folder, "before", {"command": "paging", "profile": profile, "seed": seed})
        if not plan.gpu and what == "all":
            err.print("No GPU: measured is what any machine can tell; times and tokens a second need an H100 or H200.")
        trials = measure(folder, plan, what=what, seed=seed, progress=lambda line: err.print(escape(line)))
    if json:
        plain.print_records(trials)
    else:
        _print(trials, folder)
    wrong = [t for t in trials if t.status in ("failed", "error")]
    for trial in wrong:
        err.print(escape(f"{trial.data.get('what')}, {trial.backend or 'no backend'}: {trial.reason}"))
    raise typer.Exit(WRONG if wrong else DONE)


def _print(trials: list[Trial], folder: RunFolder) -> None:
    """A table for each thing measured, with the figures that its records hold."""
    out = printing.console()
    for what in dict.fromkeys(str(t.data.get("what")) for t in trials):
        rows = [(t, row) for t in trials if t.data.get("what") == what for row in [_row(t)]]
        table = Table(title=f"Paging: {what}")
        for column in dict.fromkeys(name for _, row in rows for name in row):
            table.add_column(column, overflow="fold")
        for _, row in rows:
            table.add_row(*(escape(row.get(c.header, "")) for c in table.columns))
        out.print(table)
    out.print(f"Records: {escape(str(folder.records_path))}", soft_wrap=True)


SHOWN = (
    "group", "case", "pattern", "policy", "shape", "batch", "share", "pages_share", "right", "wrong", "unsupported",
    "saved_percent", "mass_mean", "mass_least", "error_mean", "lost", "floor_us", "of_floor", "of_dense", "over_peer",
    "over_dense", "over_flashinfer", "over_ordinary", "over_one", "over_apart", "tbs", "tokens_per_s",
    "sparse_tokens_per_s",
)  # fmt: skip
"""Keys of `data` that become columns, where records have them."""


def _row(trial: Trial) -> dict[str, str]:
    row = {"by": trial.backend} if trial.backend else {}
    row |= {"how": trial.variant} if trial.data.get("what") in ("serving", "shapes") and trial.variant else {}
    row |= {"problem": trial.problem.label().replace(",", ", ")} if trial.problem else {}
    for key in SHOWN:
        if key in trial.data:
            value = trial.data[key]
            row[key.replace("_", " ")] = f"{value:.4g}" if isinstance(value, float) else str(value)
    if trial.timing:
        row["µs"] = f"{trial.timing.latency_us:.4g}"
    return row | {"state": trial.status}


def add_to(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(paging)
