"""Read runs for a comparison, and find the one that came before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashcore.decision.verdict import unfinished
from flashcore.errors import RecordsError
from flashcore.paths import absolute
from flashcore.records import RunFolder, Trial, readable_trials


@dataclass(frozen=True)
class Snapshot:
    """A run as it was read: its records and its machine."""

    name: str
    trials: tuple[Trial, ...]
    environment: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    """What is wrong with its records, as sentences."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """The machine and its software before the run."""
        found = self.environment.get("before")
        return found if isinstance(found, Mapping) else {}

    @property
    def gpu(self) -> str | None:
        return str(self.environment["gpu"]) if self.environment.get("gpu") else None

    @property
    def machine(self) -> str | None:
        """The GPU's name, without one the CPU's; None when the run does not say."""
        cpu = self.facts.get("cpu")
        return self.gpu or (str(cpu) if cpu else None)

    @property
    def date(self) -> str:
        """When the run began, in ISO form and UTC; of a run without an environment the time of its first record."""
        first = self.environment.get("date") or next((t.time for t in self.trials), "")
        return _utc(str(first))

    @property
    def day(self) -> str:
        return self.date[:10] or "date not known"

    @property
    def finished(self) -> bool:
        """Whether every notebook that was planned has a record that it finished."""
        return not unfinished(self.trials, self.environment, self.name)

    @property
    def title(self) -> str:
        return f"{self.name} ({self.machine or 'machine not known'}, {self.day})"


def read(run: RunFolder | str | os.PathLike[str]) -> Snapshot:
    """Read a run folder, or a file of records; of a file not called ``records.jsonl`` the machine is not known.

    Raises
    ------
    RecordsError
        It cannot be read, or a newer FlashCore wrote it.
    """
    path = run.path if isinstance(run, RunFolder) else absolute(run)
    if path.is_file() and path.name != "records.jsonl":
        trials, problems = readable_trials(path)
        return Snapshot(path.stem, trials, {}, problems)
    folder = RunFolder(path.parent if path.is_file() else path)
    trials, problems = readable_trials(folder.records_path)
    return Snapshot(folder.path.resolve().name, trials, folder.environment(), problems)


def runs_in(folder: str | os.PathLike[str]) -> tuple[list[Snapshot], list[str]]:
    """Every run in a folder from the oldest to the newest, and a sentence on each that could not be read.

    Raises
    ------
    RecordsError
        There is no such folder.
    """
    folder = absolute(folder)
    if not folder.is_dir():
        raise RecordsError(f"There is no folder {folder}; name one that holds run folders, such as reports/runs.")
    found, left_out = [], []
    for path in _run_paths(folder):
        try:
            found.append(read(path))
        except RecordsError as error:
            left_out.append(f"The run {path.name} was left out: {error}")
    return sorted(found, key=lambda s: (s.date, s.name)), left_out


def newest(folder: Path, most: int) -> list[Snapshot]:
    """The newest runs of a folder, the oldest of them first, read whole; those that cannot be read are left out."""
    dated: list[tuple[str, Path]] = []
    for path in _run_paths(folder):
        try:
            dated.append((Snapshot(path.name, (), RunFolder(path).environment()).date, path))
        except RecordsError:
            continue
    found = []
    for _, path in sorted(dated)[-most:]:
        try:
            found.append(read(path))
        except RecordsError:
            continue
    return found


def previous(run: RunFolder) -> Snapshot | None:
    """The run before this one: the newest older run of the same folder, on a GPU of the same name, that finished.

    Of a run without a GPU it is the newest one without a GPU on a CPU of the same name. None when there is none, as for
    a recorded run alone in its folder. Runs that cannot be read are passed over.
    """
    own = Snapshot(run.name, (), run.environment())
    if own.machine is None or not own.date:
        return None
    older: list[tuple[str, Path]] = []
    for path in _run_paths(run.path.resolve().parent):
        try:
            other = Snapshot(path.name, (), RunFolder(path).environment())
            if (other.gpu, other.machine) == (own.gpu, own.machine) and "" < other.date < own.date:
                older.append((other.date, path))
        except RecordsError:
            continue
    for _, path in sorted(older, reverse=True):
        try:
            found = read(path)
        except RecordsError:
            continue
        if found.finished:
            return found
    return None


def _run_paths(folder: Path) -> list[Path]:
    """Run folders, each once: `latest` is a link to one of them, or a file. What may not be looked into is none."""
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    return [path for path in inside if os.path.isfile(path / "records.jsonl") and not path.is_symlink()]


def _utc(text: str) -> str:
    """An ISO time in UTC, so that text sorts as time; empty when it is none."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return ""
    try:
        when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    except OverflowError:
        return ""
    return when.isoformat(timespec="seconds")
