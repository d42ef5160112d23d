"""The command line's survey of models: `flashcore model`. `add_to` puts it into the program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flashcore.cli import plain, printing
from flashcore.cli.adding import adding_to
from flashcore.records import Trial, scratch_run

DONE, WRONG = 0, 3
"""Exit codes: measured; something measured is wrong, or did not finish. 2 is a usage error."""


def model(
    profile: Annotated[str, typer.Option(help="How much to measure: quick or full.")] = "full",
    run: Annotated[Path | None, typer.Option("--run", help="Run folder to append to; left out, a scratch one.")] = None,
    shape: Annotated[
        str, typer.Option(help="Models: llama-64, llama-128, alternating-64; several with commas, or all.")
    ] = "all",
    seed: Annotated[int, typer.Option(help="Seed of weights and tokens.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the records as JSON lines, and nothing else.")] = False,
) -> None:
    """Measure attention inside of whole models: tokens, time, attention's share. Exit code 3: something is wrong."""
    from flashcore.gpu import device
    from flashcore.numerics.inputs import refuse_seed
    from flashcore.surveys.models.measuring import measure
    from flashcore.surveys.models.plan import plan_for

    plan = plan_for(profile, device.has_gpu()).of_shapes(shape)
    refuse_seed(seed)
    err = printing.errors()
    with adding_to(run or scratch_run().path) as folder:
        if not folder.environment():
            device.record_environment(folder, "before", {"command": "model", "profile": profile, "seed": seed})
        if plan.smoke:
            err.print("No GPU: a smoke test of tiny models. It compares tokens, and its times say nothing about speed.")
        trials = measure(folder, plan, seed=seed, progress=lambda line: err.print(escape(line)))
        path = folder.records_path
    if json:
        plain.print_records(trials)
    else:
        _print(trials)
        printing.console().print(f"Records: {escape(str(path))}", soft_wrap=True)
    raise typer.Exit(WRONG if any(t.status in ("failed", "error") for t in trials) else DONE)


def _print(trials: list[Trial]) -> None:
    """A table of every step, or of what was compared, as the records have it."""
    table = Table(title="Attention in a model")
    for column in ("Model", "Step", "Mode", "Attention", "ms", "Tokens/s", "Share", "Same tokens", "State"):
        table.add_column(column, overflow="fold")
    for trial in trials:
        data = trial.data
        share, rate = data.get("attention_share"), data.get("tokens_per_s")
        table.add_row(
            escape(str(data.get("shape"))), str(data.get("what")), str(data.get("mode")), escape(str(trial.backend)),
            f"{trial.timing.latency_us / 1e3:.4g}" if trial.timing else "", f"{rate:,.0f}" if rate else "",
            f"{100 * share:.0f} %" if share is not None else "",
            f"{data['agreed']} of {data['decided']}" if "decided" in data else "",
            escape(trial.status + (f": {trial.reason}" if trial.reason else "")),
        )  # fmt: skip
    printing.console().print(table)


def add_to(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(model)
