"""Several processes of this machine that share one card, for work that times nothing: they check, plant and ask."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashcore.errors import ClusterError
from flashcore.gpu import device
from flashcore.gpu.isolation import Outcome, Worker
from flashcore.measure.cluster.tasks import Task, Work, carry_out, packed

if TYPE_CHECKING:
    from flashcore.measure.cluster.places import Place
    from flashcore.measure.cluster.pools import Pool
    from flashcore.records import Trial

MOST = 14
"""Processes at the most: beyond that they wait for the card, and each takes seconds to start."""
SPARE_CORES = 2
"""Cores that are left to the notebook and to the compiler."""
CARD_BYTES = 6 << 30
"""Memory of the card that one process may need: a float64 reference of a large problem has some arrays of 512 MiB."""
HOST_BYTES = 3 << 30
"""Memory of the host for torch and its libraries in one process."""
WARM = "flashcore.measure.check"
"""What each imports as soon as it starts: torch comes with it."""
MANY = "FLASHCORE_CREW"
"""Environment variable with the number of processes, in place of what this machine has room for."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For work on the CPU: as many threads in each as there are cores would only wait for each other."""


@dataclass
class _Job:
    """One task on its way."""

    task: Task
    work: int
    slot: int
    content: bytes
    """The call, for another process."""


class Crew:
    """Processes that do what times nothing, a task each at a time; what is timed is done here, once they rest.

    A process that dies, hangs or loses its CUDA context is replaced, and what its task owed is recorded with the
    reason. They end with this process.

    Parameters
    ----------
    size
        Processes. They start at once, and import torch while this process goes on.
    """

    places: tuple[Place, ...] = ()

    def __init__(self, size: int):
        self._hands = [Worker(warm=WARM, environment=ONE_THREAD) for _ in range(size)]
        for hand in self._hands:
            hand.start()

    @property
    def size(self) -> int:
        """Processes."""
        return len(self._hands)

    def close(self) -> None:
        """End the processes, all at once: each has memory of the card to give back. One asked again starts anew."""
        with ThreadPoolExecutor(self.size) as threads:
            for done in [threads.submit(hand.close) for hand in self._hands]:
                done.result()

    def perform(
        self, works: Sequence[Work], record: Callable[[Trial], Trial], progress: Callable[[str], None] | None = None
    ) -> list[list[Trial]]:
        """See `flashcore.measure.cluster.Pool`.

        Raises
        ------
        ClusterError
            A task that owes no record could not be done.
        """
        found: list[list[list[Trial]]] = [[[] for _ in work.tasks] for work in works]
        waiting: list[_Job] = []
        here: list[tuple[Task, int, int]] = []
        for number, work in enumerate(works):
            for slot, task in enumerate(work.tasks):
                if not isinstance(task, Task):
                    found[number][slot].append(record(task))
                    continue
                content = None if task.timing else _content(task)
                if content is None:
                    here.append((task, number, slot))
                else:
                    waiting.append(_Job(task, number, slot, content))
        waiting.sort(key=lambda job: -job.task.cost_s)  # stable: what takes longest begins first

        def settle(job: _Job, outcome: Outcome) -> None:
            found[job.work][job.slot] += [record(trial) for trial in _trials_of(job.task, outcome)]

        try:
            with ThreadPoolExecutor(len(works) + self.size) as threads:
                # What comes before the tasks of one work, such as compiling, keeps no other work waiting.
                preparing = {n: threads.submit(work.prepare, False) for n, work in enumerate(works) if work.prepare}
                self._share(waiting, preparing, threads, settle, progress)
            for task, number, slot in here:
                if progress:
                    progress(task.name)
                found[number][slot] += [record(trial) for trial in task.trials()]
        finally:
            for work in works:
                if work.finish:
                    work.finish()
        return [[trial for trials in work for trial in trials] for work in found]

    def _share(
        self,
        waiting: list[_Job],
        preparing: dict[int, Future],
        threads: ThreadPoolExecutor,
        settle: Callable[[_Job, Outcome], None],
        progress: Callable[[str], None] | None,
    ) -> None:
        """Give each process that is free the first task that may begin, until all are done."""
        free = list(self._hands)
        busy: dict[Future, tuple[Worker, _Job]] = {}
        try:
            while waiting or busy or preparing:
                for number in [n for n, done in preparing.items() if done.done()]:
                    preparing.pop(number).result()  # what it raises ends it all
                for job in [job for job in waiting if job.work not in preparing][: len(free)]:
                    waiting.remove(job)
                    hand = free.pop()
                    if progress:
                        progress(job.task.name)
                    call = threads.submit(hand.call, carry_out, job.content, timeout_s=job.task.limit_s)
                    busy[call] = (hand, job)
                done, _ = wait([*busy, *preparing.values()], return_when=FIRST_COMPLETED)
                for call in done & busy.keys():
                    hand, job = busy.pop(call)
                    free.append(hand)
                    settle(job, call.result())
        except BaseException:
            for hand, _ in busy.values():  # so that no thread waits for an answer that nobody wants
                hand.close()
            raise


def _content(task: Task) -> bytes | None:
    """A task's call for another process; None for one that cannot travel there."""
    try:
        return packed(task.function, task.arguments, task.keywords)
    except Exception:  # a function inside another one, or a backend that this process alone knows
        return None


def _trials_of(task: Task, outcome: Outcome) -> list[Trial]:
    """The records of a task, or what it owed with the reason why they never came."""
    if outcome.ok:
        return outcome.value
    trials = task.failed(outcome.reason, ended=outcome.how, crashed=outcome.crashed)
    if not trials:
        raise ClusterError(f"'{task.name}' could not be done: {outcome.reason}")
    return trials


def crew(workers: Pool, *, least: int = 2, most: int = MOST) -> Pool:
    """The pool for work that times nothing: several processes that share this process's card, or `workers` itself.

    It is `workers` itself where that has processes of its own, where there is no GPU or one that takes one process
    alone, and where the machine has too few cores or too little memory for `least` processes.

    Raises
    ------
    ClusterError
        FLASHCORE_CREW is no number of processes.
    """
    if workers.places or not device.has_gpu() or not device.is_shared():
        return workers
    asked = os.environ.get(MANY, "")
    if asked and not (asked.isdecimal() and int(asked)):
        raise ClusterError(f"{MANY} is '{asked}'; give it a number of processes from 1 on, or leave it out.")
    size = min(most, int(asked or crew_size(os.cpu_count() or 1, device.memory_bytes(), _host_bytes())))
    return Crew(size) if size >= least else workers


def crew_size(cores: int, card_bytes: int, host_bytes: int) -> int:
    """Processes that a machine with so many cores, and so much memory on its card and beside it, has room for."""
    return max(1, min(MOST, cores - SPARE_CORES, card_bytes // CARD_BYTES, host_bytes // HOST_BYTES))


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
