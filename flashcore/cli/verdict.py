"""What a run says of itself: `flashcore verdict`, `verify`, `seal` and `badge`. `add_to` puts them into the program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flashcore.cli import completing, printing
from flashcore.cli.report import OutOption, RunArgument
from flashcore.errors import FlashCoreError, RecordsError, UnknownName

SEAL_BROKEN, NO_SEAL = 3, 4
TEXT = "text"
"""The format for a person at a terminal."""


def verdict(
    run: RunArgument = "latest",
    format_: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="text, json, markdown (ten lines for chat or a pull request), "
                                                        "github (annotations) or junit.  [default: text]",
                     autocompletion=completing.format_),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    link: Annotated[
        str | None, typer.Option("--link", metavar="URL", help="Where the page can be read; named in what is printed.")
    ] = None,
    out_dir: OutOption = None,
) -> None:  # fmt: skip
    """Print a run's verdict. In every format, exit code 0: GO; 3: NO-GO; 4: INCONCLUSIVE."""
    from flashcore.decision import formats
    from flashcore.decision import verdict as verdicts
    from flashcore.pipeline import folders

    chosen = _format(format_, json, [TEXT, *formats.FORMATS])
    link = formats.checked_link(link)
    found = folders.find_run(run, out_dir)
    decision = verdicts.judge(found)
    if chosen == TEXT:
        printing.print_decision(decision)
        if link:
            printing.say(f"Page: {escape(link)}")
    else:
        page = found.path / "report.html"
        lies = printing.shown(page) if page.is_file() else None
        sys.stdout.write(formats.FORMATS[chosen](decision, run=found.name, link=link, page=lies))
    raise typer.Exit(decision.exit_code)


def _format(named: str | None, json: bool, known: list[str]) -> str:
    """The format that is asked for; `UnknownName` for one that does not exist."""
    if named is not None and named not in known:
        raise UnknownName("format", named, known)
    if json and named not in (None, "json"):
        raise FlashCoreError(f"--json and --format {named} ask for two formats at once; give one of them.")
    return "json" if json else named or TEXT


def badge(
    run: RunArgument = "latest",
    to: Annotated[Path, typer.Option("--to", metavar="FILE.svg", help="Where to write it.")] = ...,
    out_dir: OutOption = None,
) -> None:
    """Write an SVG badge that says a run's verdict in words. Exit code 0: written, whatever the verdict."""
    from flashcore.decision import formats
    from flashcore.decision import verdict as verdicts
    from flashcore.paths import absolute
    from flashcore.pipeline import folders
    from flashcore.records import write_whole

    if to.suffix.lower() != ".svg":
        raise FlashCoreError(f"--to {to} is no name for a badge, which is an SVG; let it end in .svg.")
    found = folders.find_run(run, out_dir)
    decision = verdicts.judge(found)
    try:
        write_whole(absolute(to), formats.badge(decision, run=found.name).encode())
    except OSError as error:
        raise RecordsError(f"The badge cannot be written to {to} ({error.strerror}); choose another place.") from error
    printing.say(f"Badge: {escape(printing.shown(to))} ({decision.verdict})")


def verify(run: RunArgument = "latest", out_dir: OutOption = None) -> None:
    """Say whether a run is still what was judged, and name what was changed. Exit code 0: yes; 3: no; 4: no seal."""
    from flashcore.decision import seal
    from flashcore.decision import verdict as verdicts
    from flashcore.pipeline import folders

    found = folders.find_run(run, out_dir)
    decision = verdicts.judge(found)
    state = decision.based_on.seal
    printing.say(escape(state.sentence))
    for change in state.changes:
        printing.say(f"  {escape(change.part)}: {escape(change.sentence)}")
    for entry in seal.earlier(found):
        printing.say(f"  {escape(entry)}")
    if decision.stored:
        printing.say(escape(decision.stored))
    raise typer.Exit(0 if state.holds else SEAL_BROKEN if state.digest or state.changes else NO_SEAL)


def seal(run: RunArgument = "latest", out_dir: OutOption = None) -> None:
    """Judge a run by today's gates and sources and seal it anew; what was changed before stays named in the seal."""
    from flashcore.decision import seal as seals
    from flashcore.pipeline import folders, reporting

    found = reporting.find_run(run, out_dir)
    folders.refuse_recorded(found)
    printing.print_decision(reporting.judge_and_seal(found, earlier=seals.unseal(found)))
    printing.say(f"The page still shows what it showed; 'flashcore render {escape(run)}' draws it again.")


def add_to(app: typer.Typer) -> None:
    """Put the commands into the program."""
    for command in (verdict, verify, seal, badge):
        app.command()(command)
