"""Several processes of this machine that share one card, for work that times nothing: they check, plant and ask."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashcore.errors import ClusterError
from flashcore.gpu import device
from flashcore.gpu.isolation import Outcome
from flashcore.measure.cluster.hands import HOST_THREADS, ONE_THREAD, Hands
from flashcore.measure.cluster.tasks import Task, Work, packed

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
MANY = "FLASHCORE_CREW"
"""Environment variable with the number of processes, in place of what this machine has room for."""
HOST_SHARE = 4
"""Cores of the machine for each process of the host, which computes on the CPU beside what the card does."""


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
        Processes that share the card. They start at once, and import torch while this process goes on.
    hosts
        Further processes, for tasks of the host (`Task.host`); they start with these. Without any, those of the card
        do them too.
    """

    places: tuple[Place, ...] = ()

    def __init__(self, size: int, hosts: int = 0):
        self._hands = Hands(size, environment=ONE_THREAD)
        self._hosts = Hands(hosts, environment=HOST_THREADS)
        self._hands.start()

    @property
    def size(self) -> int:
        """Processes that share the card."""
        return self._hands.size

    def close(self) -> None:
        """End the processes. A crew that is asked again starts them anew."""
        self._hands.close()
        self._hosts.close()

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
            with ThreadPoolExecutor(len(works) + self.size + self._hosts.size) as threads:
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
        """Give each process that is free the first task that may begin there, until all are done."""
        busy: dict[Future, tuple[Hands, _Job]] = {}
        try:
            while waiting or busy or preparing:
                for number in [n for n, done in preparing.items() if done.done()]:
                    preparing.pop(number).result()  # what it raises ends it all
                free = {some: some.size for some in (self._hands, self._hosts)}
                for hands, _ in busy.values():
                    free[hands] -= 1
                ready = [job for job in waiting if job.work not in preparing]
                # Once nothing is left for the card, its processes do what is the host's.
                for job in sorted(ready, key=lambda job: job.task.host):
                    hands = self._hosts if job.task.host and free[self._hosts] else self._hands
                    if not free[hands]:
                        continue
                    free[hands] -= 1
                    waiting.remove(job)
                    if progress:
                        progress(job.task.name)
                    busy[threads.submit(hands.call, job.content, job.task.limit_s)] = (hands, job)
                done, _ = wait([*busy, *preparing.values()], return_when=FIRST_COMPLETED)
                for call in done & busy.keys():
                    settle(busy.pop(call)[1], call.result())
        except BaseException:
            if busy:  # so that no thread waits for an answer that nobody wants
                self.close()
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
    cores = os.cpu_count() or 1
    size = min(most, asked_size() or crew_size(cores, device.memory_bytes(), host_bytes()))
    return Crew(size, host_size(cores)) if size >= least else workers


def asked_size() -> int | None:
    """Processes a card that FLASHCORE_CREW asks for; None where it says nothing.

    Raises
    ------
    ClusterError
        It is no number of processes.
    """
    asked = os.environ.get(MANY, "")
    if asked and not (asked.isdecimal() and int(asked)):
        raise ClusterError(f"{MANY} is '{asked}'; give it a number of processes from 1 on, or leave it out.")
    return int(asked) if asked else None


def crew_size(cores: int, card_bytes: int, host_bytes: int, cards: int = 1) -> int:
    """Processes for each of some cards, for which a machine with so many cores, and so much memory on each card and
    beside them, has room."""
    each = (cores // cards - SPARE_CORES, card_bytes // CARD_BYTES, host_bytes // cards // HOST_BYTES)
    return max(1, min(MOST, *each))


def host_size(cores: int, cards: int = 1) -> int:
    """Processes for work of the host alone, beside each of some cards."""
    return max(1, cores // cards // HOST_SHARE)


def host_bytes() -> int:
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
