"""Some processes of this machine that take calls, whichever is free: what a crew is made of."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from flashcore.gpu.isolation import Outcome, Worker
from flashcore.measure.cluster.tasks import carry_out

WARM = "flashcore.measure.check"
"""What each imports as soon as it starts: torch comes with it."""


def num_threads(number: int) -> dict[str, str]:
    """Environment variables that give a process so many threads for its work on the CPU."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(number))


ONE_THREAD = num_threads(1)
"""For work on the CPU: as many threads in each as there are cores would only wait for each other."""
HOST_THREADS = num_threads(2)
"""For work of the host alone, of which there are few processes and large problems."""


class Hands:
    """Processes that do calls for this one, each one at a time; as many callers at once as there are processes.

    One that dies, hangs or loses its CUDA context is replaced. They end with this process.

    Parameters
    ----------
    size
        Processes. Each starts with its first call, or all of them by `start`.
    warm
        What each imports as soon as it starts; None for `WARM`.
    environment, instead
        As of `flashcore.gpu.isolation.Worker`.
    """

    def __init__(
        self, size: int, *, warm: str | None = None, environment: Mapping[str, str] | None = None,
        instead: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self._all = [Worker(warm=warm or WARM, environment=environment, instead=instead) for _ in range(size)]
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()  # one that is warm comes first
        for hand in self._all:
            self._free.put(hand)

    @property
    def size(self) -> int:
        """Processes."""
        return len(self._all)

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that there are now."""
        return [hand.pid for hand in self._all if hand.pid is not None]

    def start(self) -> None:
        """Start all processes, which import torch while this process goes on."""
        for hand in self._all:
            hand.start()

    def call(self, content: bytes, limit_s: float) -> Outcome:
        """Do what `tasks.packed` holds, once a process is free; never raises for what it does."""
        hand = self._free.get()
        try:
            return hand.call(carry_out, content, timeout_s=limit_s)
        finally:
            self._free.put(hand)

    def close(self) -> None:
        """End the processes, all at once: each has memory of the card to give back. One called again starts anew."""
        there = [hand for hand in self._all if hand.pid is not None]
        with ThreadPoolExecutor(max(1, len(there))) as threads:
            for done in [threads.submit(hand.close) for hand in there]:
                done.result()
