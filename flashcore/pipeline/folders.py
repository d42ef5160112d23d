"""Where runs lie: the folder that holds them, a new one in it, and the one that a user names."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from flashcore.errors import RecordsError
from flashcore.gpu import device
from flashcore.paths import HOME, absolute, data_dir
from flashcore.records import RunFolder

LATEST = "latest"
"""The word for the newest run: a link beside the runs, or a file with the run's id where links are impossible."""


def runs_dir(out: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds run folders: `out`, else ``reports/runs`` of the checkout, else of the current folder."""
    if out is not None:
        return absolute(out)
    home = HOME if (HOME / "pyproject.toml").is_file() else absolute("")
    return home / "reports" / "runs"


def new_run(out: str | os.PathLike[str] | None = None) -> RunFolder:
    """A fresh run folder, as in ``2026-11-22T18-40-03-h200-3f9a``."""
    machine = re.sub(r"[^a-z0-9]+", "-", (device.gpu_name() or "cpu").lower().replace("nvidia", "")).strip("-")
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    while True:
        path = runs_dir(out) / f"{stamp}-{machine}-{secrets.token_hex(2)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if path.parent.is_dir():
                continue  # of another report, which began in this very second
        except OSError:
            pass  # the next line says it in a sentence
        return RunFolder.create(path)


def find_run(name: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> RunFolder:
    """A run by its path, by its id, by the word ``latest``, or a recorded one by its name.

    Parameters
    ----------
    out
        The folder that holds the runs. With one, an id and ``latest`` mean the runs in it, whatever lies in the current
        folder; a path (absolute, or with a slash in it) means itself.

    Raises
    ------
    RecordsError
        There is no such run.
    """
    text = os.fspath(name)
    if not text:
        raise RecordsError("No run is named; give a run's folder, its id, or the word 'latest'.")
    bare = os.sep not in text and text not in (os.curdir, os.pardir)
    places = [runs_dir(out) / text] if bare and out is not None else [absolute(text), runs_dir(out) / text]
    if bare and out is None:
        places.append(data_dir("reports") / "recorded" / text)  # so that the commands on a recorded run's page work
    for place in places:
        if place.is_dir():
            return RunFolder(place.resolve())
        if place.name == LATEST and place.is_file():
            id_ = place.read_text(encoding="utf-8-sig", errors="replace").strip()
            if not id_:
                raise RecordsError(f"{place} names no run; 'flashcore report' makes one, and writes it there.")
            return RunFolder(place.parent / id_)
    return RunFolder(places[0])


def newest_run(out: str | os.PathLike[str] | None = None) -> RunFolder:
    """The run that was begun last, whether it came to an end or not; `latest` is the last that did.

    Raises
    ------
    RecordsError
        There is no run.
    """
    folder = runs_dir(out)
    begun = [path.parent for path in folder.glob("*/environment.json") if not path.parent.is_symlink()]
    if not begun:
        raise RecordsError(f"There is no run in {folder}; 'flashcore report' makes one.")
    return RunFolder(max(begun, key=_when_begun))


def _when_begun(path: Path) -> tuple[bool, str, str]:
    """What a folder is sorted by: whether a report was begun in it, when, and its name, which begins with the date.

    Other commands keep their records where a user says, and a user may give a run another name.
    """
    try:
        environment = RunFolder(path).environment()
    except RecordsError:
        return False, "", path.name
    parameters = environment.get("parameters")
    planned = isinstance(parameters, Mapping) and bool(parameters.get("notebooks"))
    return planned, str(environment.get("date") or ""), path.name


@contextlib.contextmanager
def measuring(run: RunFolder, *, alone: bool = True) -> Iterator[None]:
    """Inside, nobody else measures into a run or measures parts of it again; whose a record is hangs on their order.

    Parameters
    ----------
    alone
        False for records that are nobody's part: several may add such at once, while nobody measures into the run.

    Raises
    ------
    RecordsError
        Somebody else does.
    """
    folder = os.open(run.path, os.O_RDONLY)  # a lock on the folder itself, which ends with whoever has it
    try:
        fcntl.flock(folder, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise RecordsError(
            f"The run {run.name} is being measured by another process or thread, or added to; wait until that has "
            "ended."
        ) from None
    except OSError:  # a file system that knows no such lock
        pass
    try:
        yield
    finally:
        os.close(folder)


def refuse_recorded(run: RunFolder) -> None:
    """Raise `RecordsError` for a run under ``reports/recorded``: it is what was measured, and is never written to."""
    if absolute(run.path).resolve().is_relative_to((data_dir("reports") / "recorded").resolve()):
        raise RecordsError(
            f"{run.name} is a recorded run, and those are never written to; 'flashcore render {run.path} --to FOLDER' "
            "draws its page elsewhere."
        )
