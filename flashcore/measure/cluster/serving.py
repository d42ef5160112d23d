"""What runs inside a Dask worker: it hands each call to a clean process of its own, and says how that went.

The process that measures holds the card's CUDA context and nothing of Dask. When a call crashes or hangs there, that
process is replaced and the worker lives on to tell.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from flashcore.gpu.isolation import Worker
from flashcore.measure.cluster.tasks import carry_out

_one_at_a_time = threading.Lock()
_worker = Worker(warm="flashcore.measure.cluster.tasks")


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


def answer(content: bytes, limit_s: float) -> Answer:
    """Do what `tasks.packed` holds in the process that measures; never raises for what it does."""
    with _one_at_a_time:
        outcome = _worker.call(carry_out, content, timeout_s=limit_s)
    return Answer(outcome.ok, outcome.value, outcome.how, outcome.reason, outcome.crashed, outcome.seconds)
