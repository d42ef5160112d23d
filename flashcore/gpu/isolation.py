"""Run a measurement in a process of its own: a crash or a hang there is one record here, and the run goes on.

An out-of-bounds access, an illegal instruction or a hang leaves a CUDA context that no later launch in the same process
survives. So a trial that might do that runs in a worker process; what comes back is its result, or one sentence on how
it died. One warm worker serves many calls (starting Python and torch takes seconds) and is replaced when it dies.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from flashcore.records import Trial

START_S = 180.0
"""Seconds a worker may take to start Python and import what a call needs; torch alone takes several."""
END_S = 30.0
"""Seconds the kernel of the operating system may take to end a killed process (it first tears down its GPU context)."""
TIME_LIMIT_S = 60.0
_WATCH_S = 1.0
_START = "import sys; sys.path[:0] = sys.argv[2:]; from flashcore.gpu.isolation import _serve; _serve(int(sys.argv[1]))"


@dataclass(frozen=True)
class Outcome:
    """What came of one isolated call."""

    ok: bool
    value: Any = None
    how: Literal["returned", "raised", "signal", "exit", "timeout"] = "returned"
    reason: str = ""
    """One sentence, whenever it is not ok."""
    context_lost: bool = False
    """The call ended with an error after which its CUDA context could not be used any more."""
    seconds: float = 0.0

    @property
    def crashed(self) -> bool:
        """Whether the process died, hung, or lost its CUDA context: what would have taken the caller with it."""
        return self.context_lost or self.how in ("signal", "exit", "timeout")


class Worker:
    """One process that runs functions for its owner, one after another, and is replaced when one of them kills it.

    Parameters
    ----------
    warm
        Name of a module to import as soon as the process starts, while the owner does other things.
    environment
        Environment variables that it gets, where this process has none of that name.
    instead
        Environment variables that it gets in place of this process's.
    """

    def __init__(
        self, warm: str | None = None, *, environment: Mapping[str, str] | None = None,
        instead: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self._warm = warm
        self._instead = dict(instead or {})
        self._environment = dict(environment or {})
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._errors = None
        self._turn = threading.Lock()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The worker's process id; None while there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process, unless it runs already; returns at once."""
        if self._process is not None:
            return
        mine, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), *(p for p in sys.path if p)],
                stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors, pass_fds=(theirs.fileno(),),
                start_new_session=True, env={**self._environment, **os.environ, **self._instead},
            )  # fmt: skip
        self._connection = Connection(mine.detach())
        if self._warm:
            self._connection.send(("warm", self._warm))

    def call(self, function: Callable, *arguments: Any, timeout_s: float = TIME_LIMIT_S, **keywords: Any) -> Outcome:
        """Run ``function(*arguments, **keywords)`` there; never raises for what it does.

        Threads that share a worker wait for each other.

        Parameters
        ----------
        function
            Importable by name (a function of a module, no lambda); arguments and result have to be picklable.
        timeout_s
            Seconds the call may take; the start of the process and its imports are not counted.
        """
        with self._turn:
            return self._called(pickle.dumps((function, arguments, keywords)), timeout_s)

    def _called(self, content: bytes, timeout_s: float) -> Outcome:
        self.start()
        started = time.perf_counter()
        with contextlib.suppress(OSError):  # a worker that is dead already shows below, by its exit code
            self._connection.send(("call", content))
        loaded = self._receive(START_S)
        if loaded is not None and loaded[0] == "loaded":
            started = time.perf_counter()
            answer = self._receive(timeout_s)
        else:
            answer, timeout_s = loaded, START_S
        seconds = time.perf_counter() - started
        if answer is None:
            return self._dead(timeout_s, seconds)
        kind, content, context_lost = answer
        if context_lost:
            self._kill()
        if kind == "returned":
            return Outcome(True, content, seconds=seconds)
        return Outcome(False, None, "raised", content, context_lost, seconds)

    def _receive(self, timeout_s: float) -> tuple | None:
        """The next message; None when none came in time or the worker died."""
        try:
            return self._connection.recv() if self._connection.poll(timeout_s) else None
        except (EOFError, OSError, pickle.UnpicklingError):
            return None

    def _dead(self, timeout_s: float, seconds: float) -> Outcome:
        """Say how the worker ended: by itself, or now, because it took too long."""
        process = self._process
        if process is None:
            return Outcome(False, None, "exit", "Its process was ended by its owner.", seconds=seconds)
        # Its end of the connection closes a moment before the process is gone; one that hangs keeps it open.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5 if seconds >= timeout_s else END_S)
        code, said = process.returncode, self._last_words()
        self._kill()
        if code is None:
            return Outcome(False, None, "timeout", f"It exceeded {timeout_s:g} s and was ended.", seconds=seconds)
        if code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
                return Outcome(False, None, "signal", f"Its process was ended by {name}{said}.", seconds=seconds)
        return Outcome(False, None, "exit", f"Its process ended with exit code {code}{said}.", seconds=seconds)

    def _last_words(self) -> str:
        """The last line that the worker printed, as a clause."""
        try:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").split("\n")
        except ValueError:  # another thread has closed it just now
            return ""
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f", after it said: {last[:200].rstrip('.')}" if last else ""

    def _kill(self) -> None:
        """End the process and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        self._errors.close()

    close = _kill


def run(function: Callable, *arguments: Any, timeout_s: float = TIME_LIMIT_S, **keywords: Any) -> Outcome:
    """`Worker.call` in a process of its own, which ends with the call."""
    with Worker() as worker:
        return worker.call(function, *arguments, timeout_s=timeout_s, **keywords)


def isolated_trial(
    function: Callable[..., Trial],
    *arguments: Any,
    worker: Worker | None = None,
    timeout_s: float = TIME_LIMIT_S,
    fields: dict[str, Any],
    **keywords: Any,
) -> Trial:
    """The trial that `function` returns, or one with status `error` that says how its process ended.

    Parameters
    ----------
    worker
        A warm worker to use; without one the call gets a process of its own.
    fields
        Of the trial to make when there is none: `kind`, `backend`, `problem`, `data`, `source_hash`. Its data get
        `ended`, in what way, and `seconds`.
    """
    call = worker.call if worker is not None else run
    outcome = call(function, *arguments, timeout_s=timeout_s, **keywords)
    if outcome.ok:
        return outcome.value
    data = {**fields.get("data", {}), "ended": outcome.how, "crashed": outcome.crashed,
            "seconds": round(outcome.seconds, 3)}  # fmt: skip
    return Trial(**{**fields, "data": data, "status": "error", "reason": outcome.reason})


# ------------------------------------------------------------------------------------------------- in the worker


def _serve(handle: int) -> None:
    """Answer calls until the owner closes the connection or ends."""
    connection = Connection(handle)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            kind, content = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # at once: ending an interpreter whose CUDA context is broken may abort
        if kind == "warm":
            with contextlib.suppress(Exception):  # the call that needs the module will say what is wrong
                __import__(content)
            continue
        try:
            function, arguments, keywords = pickle.loads(content)
            connection.send(("loaded",))
            answer = ("returned", function(*arguments, **keywords), _context_lost())
            if answer[2]:
                answer = ("raised", answer[2], True)
        except BaseException as error:  # whatever it is, the owner has to hear of it
            answer = ("raised", _sentence(error), bool(_context_lost()))
        try:
            message = pickle.dumps(answer)
        except Exception as error:
            message = pickle.dumps(("raised", f"Its result cannot be sent back: {_sentence(error)}", answer[2]))
        connection.send_bytes(message)


def _end_with(owner: int) -> None:
    """End this process when its owner is gone, so that no hang is left behind on the GPU."""
    while os.getppid() == owner:
        time.sleep(_WATCH_S)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _context_lost() -> str:
    """What CUDA says once everything launched has ended; empty when all is well, or CUDA was never used."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        elif cupy is not None:
            cupy.cuda.runtime.deviceSynchronize()
        return ""
    except Exception as error:  # the kinds of error differ between libraries and their versions
        return _sentence(error)


def _sentence(error: BaseException) -> str:
    """An error in one line: torch's CUDA errors carry a paragraph of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
