"""The command line's audit of published figures: `flashcore claims`. `add_to` puts it into the program."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flashcore.cli import completing, plain, printing
from flashcore.errors import RecordsError
from flashcore.records import RunFolder

if TYPE_CHECKING:
    from flashcore.decision.claims import Audit
    from flashcore.decision.evidence import Evidence

LATEST = "latest"


def claims(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Claims as TOML; left out, those that FlashCore ships.")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="The run to compare with; left out, the latest, or the recorded one.",
            autocompletion=completing.run,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the audit as JSON lines, and nothing else.")] = False,
) -> None:
    """Audit published figures: physics, arithmetic, each other, and what a run measured.

    Exit code 0: the audit ran, whatever it found; 2: it could not, as with a bad claims file.
    """
    from flashcore.decision import claims as library

    wanted = library.load_claims(file)
    evidence = _evidence(run)
    audits = library.audit(
        wanted, evidence.gpu_trials, environment=evidence.gpu_environment, current_hashes=evidence.current_hashes
    )
    if json:
        plain.print_records(one.to_trial() for one in audits)
        for problem in evidence.problems:
            printing.errors().print(escape(problem))
        return
    _print_table(audits)
    _print_findings(audits)
    _print_summary(audits, evidence)


def _evidence(run: str | None) -> Evidence:
    """The evidence of the run named, else of the latest; the recorded run stands in where there is none."""
    from flashcore.decision import evidence
    from flashcore.pipeline import folders

    try:
        found = folders.find_run(LATEST if run is None else run)
    except RecordsError:
        if run is not None:
            raise
        with tempfile.TemporaryDirectory(prefix="flashcore-claims-") as folder:
            return evidence.gather(RunFolder.create(folder))  # a run that measured nothing borrows the recorded one
    return evidence.gather(found)


# ------------------------------------------------------------------------------------------------ printing


def _print_table(audits: list[Audit]) -> None:
    table = Table(title="Claims, audited", show_lines=True, expand=True)
    for column, ratio in (("Claim", 4), ("Figure", 2), ("Verdict", None), ("Why", 8)):
        table.add_column(column, overflow="fold", ratio=ratio)
    for one in audits:
        note = f"\nNote: {one.claim.note}" if one.claim.note else ""
        table.add_row(*map(escape, (one.claim.text, one.claim.figure, one.verdict, one.reason + note)))
    printing.console().print(table)


def _print_findings(audits: list[Audit]) -> None:
    out = printing.console(soft_wrap=True)
    out.print("What each check found:")
    for one in audits:
        out.print(f"\n{escape(one.claim.id)}: {escape(one.claim.figure)}, {one.verdict}")
        out.print(f"  source: {escape(one.claim.source)}")
        for found in one.findings:
            out.print(f"  {found.check}, {found.outcome}: {escape(found.sentence)}")
        if one.claim.note:
            out.print(f"  note: {escape(one.claim.note)}")


def _print_summary(audits: list[Audit], evidence: Evidence) -> None:
    from flashcore.decision.claims import VERDICTS

    out, counts = printing.console(soft_wrap=True), Counter(one.verdict for one in audits)
    out.print(f"\n{len(audits)} claims:")
    for verdict, meaning in VERDICTS.items():
        if counts[verdict]:
            out.print(f"  {counts[verdict]} {verdict}: {meaning}")
    out.print(f"Measurements: {escape(evidence.label)}")
    for problem in evidence.problems:
        out.print(escape(problem))


def add_to(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(claims)
