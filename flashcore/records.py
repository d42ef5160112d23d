"""Write and read trials: one JSON line each, appended and flushed, so that a run that dies keeps what it measured."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashcore.errors import InvalidProblem, RecordsDamaged, RecordsError, RecordsTooNew
from flashcore.problem import Problem

SCHEMA_VERSION = 1

Kind = Literal[
    "ceiling", "build", "correctness", "attention_timing", "bisection", "fault", "gemm_candidate", "paging",
    "sanitizer", "claim", "verdict", "notebook",
]  # fmt: skip
Status = Literal["ok", "failed", "error", "unsupported", "unavailable"]


class Timing(BaseModel):
    """How long one call took, and how that was measured."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="strings")

    method: str
    """`graph_replay` (device time inside a CUDA graph), `events`, or `host` (wall clock, CPU backends)."""
    latency_us: float
    """Median time of one call, in microseconds."""
    samples_us: list[float] = Field(default_factory=list)
    """One figure a round, in microseconds; at most 50 are kept."""
    tflops: float | None = None
    """`Problem.flops()` over `latency_us`, in 1e12 operations a second."""
    round: str | None = None
    """Trials that share a round were interleaved, and only those may be compared as ratios."""
    l2: str | None = None
    """`warm` (the same buffers each call) or `rotating` (buffers that together exceed the L2 cache)."""


class Correctness(BaseModel):
    """How far one result lay from the float64 reference."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="strings")

    passed: bool
    checked: int
    """Elements compared; complete coverage is all of `out` and `lse`."""
    num_bad: int
    """Elements beyond the bound, NaN and Inf included."""
    max_abs_error: float
    bound: float
    """The largest absolute error that passes."""
    num_nan: int = 0
    num_inf: int = 0
    lse_max_abs_error: float | None = None
    first_bad: dict[str, Any] | None = None
    """Coordinates, `got` and `expected` of the first bad element in dataflow order."""


class Trial(BaseModel):
    """One measurement. The names here are a file format: more keys may come, these stay."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="strings")

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    backend: str | None = None
    variant: str | None = None
    status: Status = "ok"
    """`ok` measured and right; `failed` measured and wrong; `error` did not finish; `unsupported`, `unavailable`."""
    reason: str | None = None
    """One sentence, whenever the status is not `ok`."""
    problem: Problem | None = None
    correctness: Correctness | None = None
    timing: Timing | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    """What belongs to this kind alone (a ceiling's value and unit, a build's registers, a notebook's name)."""
    source_hash: str | None = None
    """Hash of the kernel source that was measured, without its comments and white space."""
    environment: str | None = None
    """`id` of the environment snapshot in the run's `environment.json`."""
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


class RunFolder:
    """One run on disk: ``records.jsonl``, ``environment.json``, executed notebooks, ``report.html``.

    Parameters
    ----------
    path
        The folder. `create` makes it; the constructor wants it to exist.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            raise RecordsError(
                f"There is no run folder at {self.path}; make one with 'flashcore report', or name an existing one."
            )

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Make the folder and its records file, or say in one sentence why that cannot be done."""
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "records.jsonl").touch()
        except OSError as error:
            raise RecordsError(
                f"The run folder {path} cannot be written ({error.strerror}); choose another with --out."
            ) from error
        return cls(path)

    @property
    def records_path(self) -> Path:
        return self.path / "records.jsonl"

    @property
    def environment_path(self) -> Path:
        return self.path / "environment.json"

    @property
    def name(self) -> str:
        return self.path.name

    def append(self, trial: Trial) -> Trial:
        """Add one trial as one line, flushed to disk before this returns, with the run's environment named in it."""
        if trial.environment is None:
            trial = trial.model_copy(update={"environment": self.environment().get("id")})
        append_trials(self.records_path, [trial])
        return trial

    def environment(self) -> dict[str, Any]:
        """What `environment.json` holds; empty for a run that never recorded its machine."""
        try:
            return json.loads(self.environment_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RecordsError(
                f"{self.environment_path} cannot be read ({error}); make the report again, or restore the file."
            ) from error

    def trials(self, **wanted) -> list[Trial]:
        """All trials of the run, or those whose fields equal `wanted`, in the order written."""
        trials = read_trials(self.records_path)
        return [t for t in trials if all(getattr(t, name) == value for name, value in wanted.items())]


def digits(value: float, n: int = 6) -> float:
    """A figure to `n` significant digits, which is all that a clock or an error model means by it."""
    return float(f"{value:.{n}g}")


def scratch_run() -> RunFolder:
    """A fresh run folder under the system's temporary directory, for a notebook opened by hand."""
    return RunFolder.create(tempfile.mkdtemp(prefix="flashcore-run-"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one piece: beside its place first, then moved there. An interruption leaves nothing half-done."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _line(trial: Trial) -> str:
    """A trial as one line; what is not there at all is left out, which keeps a run of a thousand trials small."""
    absent: dict[str, Any] = {
        name: True
        for name in ("backend", "variant", "reason", "problem", "correctness", "timing", "data", "source_hash")
        if not getattr(trial, name)
    }
    if trial.problem:
        usual = type(trial.problem).model_fields
        absent["problem"] = {n for n in ("softmax_scale", "page_size") if getattr(trial.problem, n) == usual[n].default}
    for name in ("correctness", "timing"):
        if part := getattr(trial, name):
            absent[name] = {n for n in type(part).model_fields if getattr(part, n) in (None, [])}
    return trial.model_dump_json(exclude=absent)


def append_trials(path: Path, trials: Iterable[Trial]) -> None:
    """Append trials to a JSON-lines file. Each line goes out in one write, so processes may share the file.

    A last line that was cut off (the writer was killed in the middle) is closed first, so it spoils no new record.
    """
    path = Path(path)
    try:
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    os.write(file.fileno(), b"\n")
            for trial in trials:
                os.write(file.fileno(), _line(trial).encode() + b"\n")
            os.fsync(file.fileno())
    except OSError as error:
        raise RecordsError(
            f"A record could not be written to {path} ({error.strerror}); free the disk or choose another folder "
            "with --out. Records already there are kept."
        ) from error


def read_trials(path: str | os.PathLike[str], *, on_damage: Literal["warn", "raise"] = "warn") -> list[Trial]:
    """Read a records file.

    A line that is no record is what a killed writer leaves behind. It is left out with a `RecordsDamaged` warning that
    names it, or raised as a `RecordsDamaged` error that carries the readable trials in its `trials`.

    Raises
    ------
    RecordsError
        The file is missing or unreadable.
    RecordsDamaged
        With ``on_damage="raise"``: a line is cut off or is no record.
    RecordsTooNew
        A line has a schema version this FlashCore does not know.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RecordsError(
            f"The records {path} cannot be read ({error.strerror}); name a run folder that holds records.jsonl."
        ) from error
    trials: list[Trial] = []
    damage: tuple[int, str] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            version = fields.get("schema_version") if isinstance(fields, dict) else None
            if isinstance(version, int) and version > SCHEMA_VERSION:
                raise RecordsTooNew(str(path), number, version, SCHEMA_VERSION)
            trials.append(Trial.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            damage = damage or (number, f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}")
        except (ValueError, InvalidProblem) as error:
            damage = damage or (number, str(error))
    if damage:
        problem = RecordsDamaged(str(path), *damage, trials)
        if on_damage == "raise":
            raise problem
        warnings.warn(str(problem), RuntimeWarning, stacklevel=2)
    return trials
