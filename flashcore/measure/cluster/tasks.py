"""What a worker is asked for: a function and its arguments, the trials that it owes, and the time that it may take."""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashcore import backends
from flashcore.backends import Backend
from flashcore.errors import ClusterError
from flashcore.records import Trial

KEPT_BYTES = 1 << 30
"""Memory of a card that a process keeps from one task to the next."""
LIMIT_S = 300.0
"""Seconds that a task may take on a worker; the longest of a full report takes some ten."""


@dataclass(frozen=True)
class Task:
    """Trials that belong together: they are computed by one worker, one after the other."""

    name: str
    """Its address in words, such as ``check B=1,H=2,S=256,D=64``: for progress, and the record of a worker's death."""
    function: Callable[..., Iterable[Trial]]
    """A function of a module, called with what follows; each trial that it yields is one record."""
    arguments: tuple = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    owed: tuple[Mapping[str, Any], ...] = ()
    """Fields of the records to write where no worker gets through it: kind, backend, problem and the like."""
    timing: bool = False
    """Whether it times anything: then nothing else runs on its card, or on the cores of its node."""
    limit_s: float = LIMIT_S
    only: str | None = None
    """Key of the one place that may do it (`Place.key`); None for any. This process does it whatever it says."""
    cost_s: float = 0.1
    """About how long it takes, in seconds; what takes longest begins first."""
    host: bool = False
    """Whether it computes on the host alone, so that it takes no process's place on a card and runs beside those."""

    def trials(self) -> Iterator[Trial]:
        """Compute them here, one by one."""
        yield from self.function(*self.arguments, **self.keywords)

    def failed(self, reason: str, **data: Any) -> list[Trial]:
        """The records of what was owed and never came."""
        found = []
        for fields in self.owed:
            more = {**fields.get("data", {}), **data}
            found.append(Trial(**{**fields, "status": "error", "reason": reason, "data": more}))
        return found


@dataclass(frozen=True)
class Work:
    """A list of tasks, with what has to happen in this process before the first and after the last."""

    tasks: Sequence[Task | Trial]
    """A trial among them needs no worker: it is written as it is, in its place."""
    prepare: Callable[[bool], object] | None = None
    """Told whether this process computes the tasks itself."""
    finish: Callable[[], object] | None = None


# ----------------------------------------------------------------------------------------- from process to process


class _Packer(pickle.Pickler):
    """A backend travels as its id: the worker has its own, with the caches and handles of its own card."""

    def persistent_id(self, thing: Any) -> str | None:
        if not isinstance(thing, Backend):
            return None
        if next((one for one in backends.all_backends() if one.id == thing.id), None) is not thing:
            raise ClusterError(
                f"The backend '{thing.id}' is no registered one, so no other process can find it; measure it without "
                "--gpus."
            )
        return thing.id


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, id_: str) -> Backend:
        return backends.get(id_)


def packed(function: Callable, arguments: tuple = (), keywords: Mapping[str, Any] | None = None) -> bytes:
    """A call as bytes, so that whatever carries it need not know what it is."""
    buffer = io.BytesIO()
    _Packer(buffer, pickle.HIGHEST_PROTOCOL).dump((function, arguments, dict(keywords or {})))
    return buffer.getvalue()


def carry_out(content: bytes) -> Any:
    """Do what `packed` holds, in the process that measures; trials come back as a list."""
    function, arguments, keywords = _Unpacker(io.BytesIO(content)).load()
    try:
        found = function(*arguments, **keywords)
        return list(found) if isinstance(found, Iterable) and not isinstance(found, Mapping) else found
    finally:
        _give_back()


def _give_back() -> None:
    """Return the card's memory that torch keeps for later: the next task may need it in other pieces, or be larger.

    In a report of one process each notebook begins with an empty card.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or torch.cuda.memory_reserved() < KEPT_BYTES:
        return
    with contextlib.suppress(RuntimeError):  # the context is lost, which whoever waits for the answer is told
        torch.cuda.empty_cache()
