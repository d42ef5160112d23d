"""Write and read trials: one JSON line each, appended and flushed, so that a run that dies keeps what it measured.

A line ends at a line feed and nowhere else. A record that stands in a file twice is one record.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import secrets
import stat
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError, from_json

from flashcore.errors import InvalidProblem, RecordsDamaged, RecordsError, RecordsTooNew
from flashcore.paths import absolute, partial_path
from flashcore.problem import SELDOM, Problem

SCHEMA_VERSION = 1
MOST_FLOPS = 10**30
"""Of a problem that was measured: the fastest machine would take a hundred thousand years."""
MARK = b"\xef\xbb\xbf"
"""A byte-order mark, which some editors put before a text, and `cat` between two."""

Kind = Literal[
    "ceiling", "build", "correctness", "attention_timing", "bisection", "fault", "gemm_candidate", "paging",
    "sanitizer", "claim", "verdict", "notebook", "exploit", "diagnosis", "model", "fleet", "worker", "invariance",
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
    """One figure a round, in microseconds; at most 100 are kept, and 50 in older records."""
    tflops: float | None = None
    """`Problem.flops()` over `latency_us`, in 1e12 operations a second."""
    round: str | None = None
    """Trials that share a round were interleaved, and only those may be compared as ratios."""
    l2: str | None = None
    """`warm` (the same buffers each call) or `rotating` (buffers that together exceed the L2 cache)."""

    def more(self, name: str) -> Any:
        """What the timing says beside these fields, such as `launch_us`; None where it does not say it."""
        return (self.model_extra or {}).get(name)


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

    schema_version: int = Field(default=SCHEMA_VERSION, strict=True, ge=1)
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
    card: str | None = None
    """uuid of the card that measured it, in a run that several workers share; ``cpu-0`` of a worker without one."""
    node: str | None = None
    """Host name of the node that measured it, in such a run."""
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    id: str | None = Field(default_factory=lambda: secrets.token_hex(6))
    """Tells two measurements that came out alike from one record that was appended twice; None in older records."""


class RunFolder:
    """One run on disk: ``records.jsonl``, ``environment.json``, executed notebooks, ``report.html``.

    Parameters
    ----------
    path
        The folder. `create` makes it; the constructor wants it to exist.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = absolute(path)
        if not self.path.is_dir():
            raise RecordsError(
                f"There is no run folder at {self.path}; make one with 'flashcore report', or name an existing one."
            )

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Make the folder and its records file, or say in one sentence why that cannot be done."""
        path = absolute(path)
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
        """What `environment.json` holds; empty for a run that never recorded its machine.

        Raises
        ------
        RecordsError
            The file cannot be read, is no JSON object, or one of its own keys holds something else than it should.
        RecordsTooNew
            A newer FlashCore wrote it.
        """
        try:
            found = parse_json(self.environment_path.read_bytes())
            _check_environment(found, self.environment_path)
            return found
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RecordsError(
                f"{self.environment_path} cannot be read ({error}); make the report again, or restore the file."
            ) from error

    def trials(self, **wanted) -> list[Trial]:
        """All trials of the run, or those whose fields equal `wanted`, in the order written."""
        trials = read_trials(self.records_path)
        if not wanted:
            return trials
        return [t for t in trials if all(getattr(t, name) == value for name, value in wanted.items())]


@dataclass
class Ledger:
    """Records in memory, of a process that has no run: those that it was told of, and those that it makes."""

    known: Sequence[Trial] = ()
    made: list[Trial] = field(default_factory=list)

    def append(self, trial: Trial) -> Trial:
        """As `RunFolder.append`."""
        self.made.append(trial)
        return trial

    def trials(self, **wanted: Any) -> list[Trial]:
        """As `RunFolder.trials`."""
        return [t for t in (*self.known, *self.made) if all(getattr(t, name) == v for name, v in wanted.items())]


def digits(value: float, n: int = 6) -> float:
    """A figure to `n` significant digits, which is all that a clock or an error model means by it."""
    return float(f"{value:.{n}g}")


def scratch_run() -> RunFolder:
    """A fresh run folder under the system's temporary directory, for a notebook opened by hand."""
    return RunFolder.create(tempfile.mkdtemp(prefix="flashcore-run-"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one piece: beside its place first, then moved there. An interruption leaves nothing half-done."""
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def parse_json(content: str | bytes) -> Any:
    """A JSON text as plain values; a byte-order mark before it is no part of it.

    Raises
    ------
    ValueError
        It is no JSON, or nothing that anybody means: nested deeper than 200 levels, a number of thousands of digits.
    """
    if isinstance(content, str):
        content = content.encode(errors="replace")
    if content.startswith(MARK):
        content = content[len(MARK) :]
    try:
        return from_json(content, cache_strings="all")
    except ValueError:
        return from_json(content.decode(errors="replace"))  # a damaged letter inside a text spoils that text alone


_ENVIRONMENT = {"objects": ("before", "after", "git", "kernels", "parameters"), "texts": ("id", "gpu", "date")}


def _check_environment(found: Any, path: Path) -> None:
    """Refuse what is no environment, as a ValueError; what nobody here reads may be anything."""
    if not isinstance(found, dict):
        raise ValueError(f"it holds {_called(found)} and no JSON object")
    version = found.get("schema_version", SCHEMA_VERSION)
    if _is_newer(version):
        raise RecordsTooNew(str(path), 1, version, SCHEMA_VERSION)
    if type(version) is not int or version < 1:
        raise ValueError(f"its schema_version is {version!r:.40} and should be {SCHEMA_VERSION}")
    for kind, wanted, names in (("an object", dict, "objects"), ("a text", str, "texts")):
        for name in _ENVIRONMENT[names]:
            if not isinstance(found.get(name), wanted | None):
                raise ValueError(f"its '{name}' is {_called(found[name])} and should be {kind}")


def _called(value: Any) -> str:
    """A JSON value in words."""
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null", dict: "an object"}
    return kinds.get(type(value), "a number")


def _is_newer(version: Any) -> bool:
    """Whether a schema version is beyond ours, also when it is written as a text or with a point."""
    if version is SCHEMA_VERSION:  # what nearly every line says
        return False
    if isinstance(version, str) and len(version) < 20:
        try:
            version = float(version)
        except ValueError:
            return False
    return isinstance(version, int | float) and not isinstance(version, bool) and version > SCHEMA_VERSION


# ------------------------------------------------------------------------------------------------------- writing


_OPTIONAL = (
    "backend", "variant", "reason", "problem", "correctness", "timing", "data", "source_hash", "card", "node", "id",
)  # fmt: skip
"""Fields of a trial that a line leaves out where they hold nothing."""


def _line(trial: Trial) -> bytes:
    """A trial as one line; what is not there at all is left out, which keeps a run of a thousand trials small."""
    absent: dict[str, Any] = {name: True for name in _OPTIONAL if not getattr(trial, name)}
    if trial.problem:
        usual = type(trial.problem).model_fields
        absent["problem"] = {n for n in SELDOM if getattr(trial.problem, n) == usual[n].default}
    for name in ("correctness", "timing"):
        if part := getattr(trial, name):
            absent[name] = {n for n in type(part).model_fields if getattr(part, n) in (None, [])}
    try:
        return trial.model_dump_json(exclude=absent).encode() + b"\n"
    except (PydanticSerializationError, UnicodeEncodeError) as error:
        raise RecordsError(
            f"A record of kind '{trial.kind}' cannot be written as JSON ({error}); give it numbers, texts, lists and "
            "dicts alone."
        ) from error


def append_trials(path: Path, trials: Iterable[Trial]) -> None:
    """Append trials to a JSON-lines file: whole lines or an error, also where several processes share the file.

    A last line that was cut off (the writer was killed in the middle) is closed first, so it spoils no new record. A
    line for which the disk has no room is taken back.
    """
    path = absolute(path)
    content = [_line(trial) for trial in trials]
    try:
        with _to_append(path) as (file, alone):
            if file.seek(0, os.SEEK_END):  # of now: it may have grown since it was opened
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    _write(file, b"\n", alone)
            for line in content:
                _write(file, line, alone)
            os.fsync(file.fileno())
    except OSError as error:
        raise RecordsError(
            f"A record could not be written to {path} ({error.strerror}); free the disk or choose another folder "
            "with --out. Records already there are kept."
        ) from error


REPLACED_TIMES = 100
"""How often a file may be replaced while somebody waits for it: more on a file system that tells no files apart."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside, nobody else appends to a records file, so that another one can be put in its place without a loss."""
    with _to_append(path):
        yield


@contextlib.contextmanager
def _to_append(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """A file to append to, and whether it could be held against other writers."""
    for left in reversed(range(REPLACED_TIMES)):
        with open(path, "a+b", buffering=0) as file, _alone(file) as alone:
            if left and alone and not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                continue  # another one has come into its place meanwhile, and nobody would read what goes here
            yield file, alone
            return


@contextlib.contextmanager
def _alone(file: BinaryIO) -> Iterator[bool]:
    """Hold the file against other writers of ours; False on a file system that knows no such lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        yield False
        return
    yield True  # closing the file lets go of it


def _write(file: BinaryIO, content: bytes, alone: bool) -> None:
    """Write all of it, however little the system takes at once; nothing of it stays when that fails."""
    start, rest = os.fstat(file.fileno()).st_size, content
    try:
        while rest:
            rest = rest[os.write(file.fileno(), rest) :]
    except OSError:
        if alone:
            with contextlib.suppress(OSError):  # a device cannot be cut; the next writer closes the line then
                os.ftruncate(file.fileno(), start)
        raise


# ------------------------------------------------------------------------------------------------------- reading


def read_trials(path: str | os.PathLike[str], *, on_damage: Literal["warn", "raise"] = "warn") -> list[Trial]:
    """Read a records file.

    A line that is no record is what a killed writer leaves behind. It is left out with a `RecordsDamaged` warning that
    names it, or raised as a `RecordsDamaged` error that carries the readable trials in its `trials`. A record that was
    appended twice, to the last letter or with its keys in another order, counts once. Trials are shared between
    readers of a process and must not be changed.

    Raises
    ------
    RecordsError
        The file is missing or unreadable.
    RecordsDamaged
        With ``on_damage="raise"``: a line is cut off or is no record.
    RecordsTooNew
        A line has a schema version this FlashCore does not know.
    """
    path = absolute(path)
    try:
        found = _read_once(path)
    except OSError as error:
        raise RecordsError(
            f"The records {path} cannot be read ({error.strerror}); name a run folder that holds records.jsonl."
        ) from error
    if found.damage:
        problem = RecordsDamaged(str(path), *found.damage, list(found.trials))
        if on_damage == "raise":
            raise problem
        warnings.warn(str(problem), RuntimeWarning, stacklevel=2)
    return list(found.trials)


def readable_trials(path: str | os.PathLike[str]) -> tuple[tuple[Trial, ...], tuple[str, ...]]:
    """The trials of a records file that can be read, and a sentence on what cannot, if anything.

    Raises
    ------
    RecordsError, RecordsTooNew
        As `read_trials`.
    """
    try:
        return tuple(read_trials(path, on_damage="raise")), ()
    except RecordsDamaged as error:
        return tuple(error.trials), (str(error),)


@dataclass
class _Found:
    """What a records file holds."""

    trials: list[Trial] = field(default_factory=list)
    damage: tuple[int, str] | None = None
    """The first line that is no record, and why."""


_kept: OrderedDict[tuple, _Found] = OrderedDict()
"""Files as they were read: page, verdict and history ask for the same two. By path, inode, size and time of change."""
MOST_KEPT = 3
MANY = 10_000
"""Trials of one file beyond which the garbage collector is told of them."""
SETTLED_NS = 100_000_000
"""A file that was changed less than this before it was read might change again without a new time: it is not kept."""
_one_at_a_time = threading.Lock()
"""Held while a file is read: whoever wants the same one meanwhile finds it kept."""
os.register_at_fork(after_in_child=_one_at_a_time._at_fork_reinit)  # the thread that holds it is not in a child


WRITER_S = 1.0
"""Seconds that a reader waits for somebody who appends: a writer needs milliseconds, unless somebody stopped it."""


def _between_writers(file: BinaryIO) -> os.stat_result:
    """The state of a file that nobody is appending to at that moment, so that it ends with a whole line."""
    until = time.monotonic() + WRITER_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            state = os.fstat(file.fileno())
            fcntl.flock(file, fcntl.LOCK_UN)
            return state
        except BlockingIOError:
            if time.monotonic() > until:
                break
            time.sleep(0.002)
        except OSError:  # a file system that knows no such lock
            break
    return os.fstat(file.fileno())


def _lines_of(file: BinaryIO, state: os.stat_result) -> Iterable[bytes]:
    """Its lines up to the size that it had then; those that came since may be half there."""
    if not stat.S_ISREG(state.st_mode):
        yield from file
        return
    left = state.st_size
    for line in file:
        if left <= 0:
            return
        left -= len(line)
        yield line


def copy_records(source: Path, target: Path) -> None:
    """Copy a records file that somebody may be appending to, up to the end of a whole line."""
    with open(source, "rb") as file, open(target, "wb") as copy:
        copy.writelines(_lines_of(file, _between_writers(file)))


def _read_once(path: Path) -> _Found:
    with _one_at_a_time, open(path, "rb") as file:
        state = _between_writers(file)
        key = (str(path), state.st_ino, state.st_dev, state.st_size, state.st_mtime_ns)
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
        settled = time.time_ns() - state.st_mtime_ns > SETTLED_NS
        collects = gc.isenabled()
        gc.disable()  # nothing here is garbage, and looking for it takes longer than reading
        try:
            found = _read(_lines_of(file, state), str(path))
        finally:
            if collects:
                gc.enable()
        if len(found.trials) > MANY:
            gc.freeze()  # they hold no circles, and each later search for some would walk through all of them
        for old in [old for old in _kept if old[0] == key[0]]:
            del _kept[old]
        if settled:
            _kept[key] = found
            while len(_kept) > MOST_KEPT:
                _kept.popitem(last=False)
        return found


def _read(file: Iterable[bytes], name: str) -> _Found:
    found, parts, seen = _Found(), _Parts(), _Seen()
    trial_of, is_new, keep = parts.trial, seen.is_new, found.trials.append
    for number, line in enumerate(file, start=1):
        try:
            fields = parse_json(line)
            if type(fields) is not dict:
                raise ValueError(f"it holds {_called(fields)} and no JSON object")
            if _is_newer(version := fields.get("schema_version", SCHEMA_VERSION)):
                raise RecordsTooNew(name, number, version, SCHEMA_VERSION)
            trial = trial_of(fields)
            if is_new(trial):
                keep(trial)
        except ValidationError as error:
            first = error.errors()[0]
            found.damage = found.damage or (
                number,
                f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}",
            )
        except (ValueError, InvalidProblem) as error:
            if line.strip():
                found.damage = found.damage or (number, str(error))
    return found


class _Seen:
    """Tells a record that stands in the file already: all of it is the same, its time of measurement included."""

    def __init__(self):
        self._first: dict[str | None, Trial] = {}
        self._others: dict[tuple[str | None, str | None], Trial] = {}  # of the time of a first one, by time and id
        self._more: dict[tuple[str | None, str | None], set[str]] = {}  # where several records share time and id

    def is_new(self, trial: Trial) -> bool:
        when = trial.time
        first = self._first.setdefault(when, trial)
        if first is not trial and first.id != trial.id:
            first = self._others.setdefault((when, trial.id), trial)
        if first is trial:
            return True
        known = self._more.setdefault((when, trial.id), {self._content(first)})
        content = self._content(trial)
        if content in known:
            return False
        known.add(content)
        return True

    @staticmethod
    def _content(trial: Trial) -> str:
        return json.dumps(trial.model_dump(mode="json"), sort_keys=True)


class _Plan:
    """How a model's plain fields look, so that a record that holds what it should is made without being validated.

    Derived from the model itself: a value of the very type that a field has passes validation as it is. Whatever is of
    another type, is missing or is bound to more than a type is left to pydantic, which mends it or says what is wrong.
    """

    def __init__(self, model: type[BaseModel]):
        fields = model.model_fields
        self.model, self.fields = model, fields
        self.types = {name: _types(field.annotation) for name, field in fields.items()}
        self.words = {n: frozenset(get_args(f.annotation)) for n, f in fields.items() if _is_literal(f)}
        self.bound = {name: field.default for name, field in fields.items() if field.metadata}
        self.floats = [name for name, field in fields.items() if field.annotation == list[float]]
        self._shapes: dict[tuple[str, ...], _Shape] = {}

    def shape(self, names: tuple[str, ...]) -> _Shape:
        """What to do with a record of these keys; one object for all of them."""
        if names not in self._shapes:
            self._shapes[names] = _Shape(self, names)
        return self._shapes[names]

    def make(self, given: dict[str, Any]) -> BaseModel | None:
        """The model, or None for what has to be validated."""
        shape = self.shape(tuple(given))
        if shape.lacks:
            return None
        made, put = object.__new__(self.model), object.__setattr__
        for name, types, usual in shape.rows:
            if types:
                value = given[name]
                if type(value) not in types:
                    return None
            else:
                value = usual() if types is _ANEW else usual
            put(made, name, value)
        for name, words in shape.words:  # after the types, since a list or a dict is in no set
            if given[name] not in words:
                return None
        for name, usual in shape.bound:
            if given[name] != usual:
                return None
        for name in shape.floats:
            if not {float}.issuperset(map(type, given[name])):
                return None
        self._finish(made, given, shape)
        return made

    def pack(self, model: BaseModel, given: dict[str, Any]) -> BaseModel:
        """A validated model, as small as `make` makes it."""
        made, put = object.__new__(self.model), object.__setattr__
        for name, value in model.__dict__.items():
            put(made, name, value)
        self._finish(made, given, self.shape(tuple(given)))
        return made

    def _finish(self, made: BaseModel, given: dict[str, Any], shape: _Shape) -> None:
        put = object.__setattr__
        put(made, "__pydantic_fields_set__", shape.names)
        put(made, "__pydantic_extra__", {name: given[name] for name in shape.extra} if shape.extra else _NO_EXTRA)
        put(made, "__pydantic_private__", None)


class _Shape:
    """What all records of the same keys have in common: fields given and left out, and keys that are no field."""

    def __init__(self, plan: _Plan, names: tuple[str, ...]):
        fields, self.names = plan.fields, set(names)
        self.extra = [name for name in names if name not in fields]
        self.lacks = any(name not in self.names and field.is_required() for name, field in fields.items())
        self.rows = [_row(n, field, plan.types[n] if n in self.names else None) for n, field in fields.items()]
        """Of each field its name, the types of a value given (`_ANEW` or None where none is), and the usual value."""
        self.words = [(name, words) for name, words in plan.words.items() if name in self.names]
        self.bound = [(name, usual) for name, usual in plan.bound.items() if name in self.names]
        self.floats = [name for name in plan.floats if name in self.names]


_ANEW: frozenset[type] = frozenset()
"""Marks a field that is left out and whose default is made anew for each record."""


def _row(name: str, field: Any, types: frozenset[type] | None) -> tuple[str, frozenset[type] | None, Any]:
    if types is None and field.default_factory:
        return name, _ANEW, field.default_factory
    return name, types, field.default


_NO_EXTRA: dict[str, Any] = {}
"""Shared by all trials without keys of their own; frozen models, so nobody adds to it."""


def _is_literal(field: Any) -> bool:
    return get_origin(field.annotation) is Literal


def _types(annotation: Any) -> frozenset[type]:
    """The types of which a value is taken as it is."""
    origin = get_origin(annotation)
    if origin is Literal:
        return frozenset(map(type, get_args(annotation)))
    if origin in (Union, UnionType):
        return frozenset().union(*map(_types, get_args(annotation)))
    return frozenset({origin or annotation})


class _Parts:
    """Makes trials out of parsed lines; what many of them have alike is there once.

    A run of 200,000 records is read by a laptop. So a problem is made once for all its trials, and a model's fields lie
    in the object itself instead of in a dictionary and a set of its own, which takes a third of the memory.
    """

    def __init__(self):
        self._problems: dict[tuple, Problem] = {}
        self._trial, self._correctness, self._timing = _Plan(Trial), _Plan(Correctness), _Plan(Timing)
        self._now = datetime.now(UTC).isoformat(timespec="milliseconds")

    def trial(self, fields: dict[str, Any]) -> Trial:
        """Raises `ValidationError` or `InvalidProblem` for what is no record."""
        if type(problem := fields.get("problem")) is dict:
            fields["problem"] = self._problem(problem)
        if type(part := fields.get("correctness")) is dict:
            fields["correctness"] = self._correctness.make(part) or part
        if type(part := fields.get("timing")) is dict:
            fields["timing"] = self._timing.make(part) or part
        fields.setdefault("id", None)  # a record without one gets none, or it would read differently each time
        fields.setdefault("time", self._now)
        return self._trial.make(fields) or self._validated(fields)

    def _validated(self, fields: dict[str, Any]) -> Trial:
        trial = Trial.model_validate(fields)
        for name, plan in (("correctness", self._correctness), ("timing", self._timing)):
            if type(fields.get(name)) is dict:
                trial.__dict__[name] = plan.pack(getattr(trial, name), fields[name])
        return self._trial.pack(trial, fields)

    def _problem(self, fields: dict[str, Any]) -> Problem:
        key = tuple(fields.items())
        try:
            return self._problems[key]
        except KeyError:
            return self._problems.setdefault(key, _measurable(Problem(**fields)))
        except TypeError:  # a value that is a list or a dict: no problem has one
            return Problem(**fields)


def _measurable(problem: Problem) -> Problem:
    """The problem, if anybody can have measured it; others would overflow whatever reckons with their work."""
    if problem.flops() > MOST_FLOPS:
        raise InvalidProblem("The problem is larger than anything that a machine computes.")
    return problem
