"""What runs inside a Dask worker: it hands each call to a clean process of its own, and says how that went.

The processes that measure hold the card's CUDA context and nothing of Dask. When a call crashes or hangs in one, that
process is replaced and the worker lives on to tell. One of them is for what is timed. What times nothing goes to a crew
of them, where the worker has one, and what computes on the host alone to a few more.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Literal

from flashcore.gpu.isolation import Worker
from flashcore.measure.cluster.hands import HOST_THREADS, ONE_THREAD, Hands
from flashcore.measure.cluster.tasks import carry_out

By = Literal["one", "crew", "host"]
"""Whose processes do a call: the one that also times, the crew of the card, or those of the host."""
_one_at_a_time = threading.Lock()
_worker = Worker(warm=carry_out.__module__)
_several: dict[tuple[By, int], Hands] = {}
_made = threading.Lock()
"""Held while `_several` is read or written: Dask asks from several threads."""


@dataclass(frozen=True)
class Answer:
    """What came of a call."""

    ok: bool
    value: Any = None
    how: str = "returned"
    """``returned``, ``raised``, ``signal``, ``exit`` or ``timeout``."""
    reason: str = ""
    crashed: bool = False
    """The process died, hung or lost its CUDA context."""
    seconds: float = 0.0


def answer(content: bytes, limit_s: float, by: By = "one", size: int = 1, alone: bool = False) -> Answer:
    """Do what `tasks.packed` holds in a process that measures; never raises for what it does.

    Parameters
    ----------
    by, size
        Whose processes do it, and how many they are.
    alone
        End the other processes first, as for a timing: they have to be at rest, or to work for nobody any more.
    """
    if by == "one":
        with _one_at_a_time:
            if alone:
                rest()
            outcome = _worker.call(carry_out, content, timeout_s=limit_s)
    else:
        outcome = _hands(by, size).call(content, limit_s)
    return Answer(outcome.ok, outcome.value, outcome.how, outcome.reason, outcome.crashed, outcome.seconds)


def rest() -> None:
    """End the crew and the processes of the host, so that none has memory of the card; they start again when asked."""
    with _made:
        found = list(_several.values())
    for hands in found:
        hands.close()


def _hands(by: By, size: int) -> Hands:
    """The processes of the crew or of the host, so many."""
    with _made:
        if (by, size) not in _several:
            # This process has threads for a timing in its environment, which would be too many for each of several.
            instead = ONE_THREAD if by == "crew" else HOST_THREADS
            _several[by, size] = Hands(size, warm=carry_out.__module__, instead=instead)
        return _several[by, size]
