"""Add records to a run from the command line: what a command appends to a sealed run comes under its seal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape

from flashcore.cli.printing import errors
from flashcore.decision import seal, verdict
from flashcore.records import RunFolder


@contextmanager
def adding_to(path: Path | None) -> Iterator[RunFolder | None]:
    """The run folder at `path`, made where there is none; records appended inside the context are sealed with the rest.

    None for no path: the command then keeps no records.

    Raises
    ------
    RecordsError
        The folder cannot be made or written, or somebody is measuring into it; or adds to it, where it has a seal.
    """
    if path is None:
        yield None
        return
    from flashcore.pipeline.folders import measuring, refuse_recorded

    run = RunFolder.create(path)
    refuse_recorded(run)
    before = run.records_path.stat().st_size
    try:
        with measuring(run, alone=(run.path / seal.FILE).exists()), seal.additions(run, verdict.load_gates()):
            yield run
    finally:
        if run.records_path.stat().st_size != before and any((run.path / name).exists() for name in seal.PAGES):
            from flashcore.pipeline import rendering  # loads what draws, which most commands do without

            rendering.remove_pages(run)
            errors().print(
                f"The page of {escape(run.name)} showed it without these records and was removed; "
                f"'flashcore render {escape(str(path))}' draws it anew."
            )
