"""Set a part's records aside before it is measured again: moved to ``superseded.jsonl``, never lost.

A gate counts every check of a run, so that an old check beside its repetition would go on deciding. The records do not
name their notebook, but notebooks run one after the other: what lies before a notebook's own `notebook` record, back
to the one of another, is its work. A `verdict` record ends what a run had measured; what was added after it by hand (as
`flashcore survey` does) belongs to no part and stays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from flashcore.errors import RecordsError
from flashcore.records import RunFolder, held, parse_json, write_whole

Line = TypeVar("Line", str, bytes)
REDO = "redo"
"""Key in the data of a `verdict` record: the parts that are measured again after it."""


def superseded_path(run: RunFolder) -> Path:
    """Where a run keeps the records that a repetition took the place of."""
    return run.path / "superseded.jsonl"


def set_aside(run: RunFolder, parts: Sequence[str], *, planned: Sequence[str]) -> int:
    """Move every record that these parts wrote so far; gives how many.

    Parameters
    ----------
    parts
        Names of notebooks.
    planned
        The run's notebooks in their order: says whose work an unfinished stretch of records is.

    Raises
    ------
    RecordsError
        A file cannot be written. The records are then all in their place, or in both.
    """
    try:
        with held(run.records_path):
            lines = run.records_path.read_bytes().removesuffix(b"\n").split(b"\n")
            kept, gone = split(lines, parts, planned=planned)
            if gone:
                with open(superseded_path(run), "a+b") as file:
                    if file.tell():
                        file.seek(-1, os.SEEK_END)
                        file.write(b"" if file.read(1) == b"\n" else b"\n")  # a line that a kill cut off
                    file.writelines(line + b"\n" for line in gone)
                    file.flush()
                    os.fsync(file.fileno())
                write_whole(run.records_path, b"".join(line + b"\n" for line in kept))
    except OSError as error:
        raise RecordsError(
            f"The records of {run.name} cannot be set aside ({error.strerror}); free the disk. None was lost."
        ) from error
    return len(gone)


def split(lines: Sequence[Line], parts: Sequence[str], *, planned: Sequence[str]) -> tuple[list[Line], list[Line]]:
    """Lines of a records file that stay, and those that these parts wrote; both in their order."""
    kept: list[Line] = []
    gone: list[Line] = []
    stretch: list[Line] = []  # since the last record that ended one
    queue = list(planned)  # the parts still to come, so that the first of them wrote an unfinished stretch
    for line in lines:
        kind, data = _kind(line)
        if kind == "notebook":
            name = str(data.get("name")).removesuffix(".ipynb")
            (gone if name in parts else kept).extend([*stretch, line])
            stretch = []
            queue = queue[queue.index(name) + 1 :] if name in queue else queue
        elif kind == "verdict":
            (gone if queue and queue[0] in parts else kept).extend(stretch)
            kept.append(line)
            again = data.get(REDO)
            stretch, queue = [], [str(name) for name in again] if isinstance(again, list) else []
        else:
            stretch.append(line)
    (gone if queue and queue[0] in parts else kept).extend(stretch)
    return kept, gone


def _kind(line: str | bytes) -> tuple[str, dict[str, Any]]:
    try:
        fields = parse_json(line)
        data = fields.get("data")
        return str(fields.get("kind")), data if isinstance(data, dict) else {}
    except (ValueError, AttributeError):  # a line cut off: it stays with its stretch
        return "", {}
