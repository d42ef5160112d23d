"""What a pool knows of its workers and of its work: who does what, who has room, what waits, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashcore.measure.cluster.places import Place
from flashcore.measure.cluster.serving import By
from flashcore.measure.cluster.tasks import Task, Work
from flashcore.records import Trial

RESOURCES = ("GPU", "CPU")
"""What a worker offers one of: Dask then puts nothing else beside a task of ours."""
CREW, HOST = "CREW", "HOST"
"""What a worker may offer some of besides: processes that share its card, and such that compute on the host alone."""


def threads_of(offered: Mapping[str, float]) -> int:
    """Threads that a worker with these resources needs: one for each call that it may have to wait for."""
    return max(1, int(offered.get(CREW, 0)) + int(offered.get(HOST, 0)))


@dataclass
class Seat:
    """One worker, and what it does."""

    address: str
    name: str
    resource: str
    crew: int = 0
    """Processes that share its card; 0 where it has one process for everything."""
    hosts: int = 0
    """Processes that compute on the host alone."""
    place: Place | None = None
    """None until it has said what it is; asked again after a crash."""
    barred: str = ""
    """Why it gets nothing to do."""
    calls: dict[int, Call] = field(default_factory=dict)
    """Those that it is answering, by their tokens."""

    @property
    def jobs(self) -> list[Job]:
        """The tasks that it is doing."""
        return [call.job for call in self.calls.values() if call.job is not None]

    @property
    def doing(self) -> str:
        """What it does, in words: its last task, and how many there are beside it; empty for nothing."""
        names = [job.task.name for job in self.jobs]
        return f"{names[-1]}, and {len(names) - 1} beside it" if len(names) > 1 else "".join(names)

    @property
    def nodes(self) -> set[str]:
        """Where its tasks run; empty where it does none."""
        return {call.place.node for call in self.calls.values() if call.job is not None and call.place is not None}

    @property
    def timing(self) -> bool:
        """Whether it times something."""
        return any(job.task.timing for job in self.jobs)

    def room(self, task: Task, *, spare: bool = False) -> By | None:
        """Which of its processes can do a task now; None while there is no room for it.

        What is timed waits until all else has ended, and keeps it off. With `spare` the crew helps the host out.
        """
        if not self.crew or task.timing:
            return None if self.calls else "one"
        beside = [call.by for call in self.calls.values()]
        kinds: list[By] = ["host"] if task.host and self.hosts else ["crew"]
        kinds += ["crew"] * (spare and kinds == ["host"])
        return None if "one" in beside else next((by for by in kinds if beside.count(by) < self.size(by)), None)

    def size(self, by: By) -> int:
        """How many processes there are of a kind."""
        return {"one": 1, "crew": self.crew, "host": self.hosts}[by]


@dataclass
class Job:
    """One task on its way."""

    task: Task
    work: int
    slot: int
    tried: set[str] = field(default_factory=set)
    deaths: list[str] = field(default_factory=list)


class Agenda:
    """What is to be done for some works, and what came of it; a trial is recorded as soon as it is known.

    Parameters
    ----------
    works
        Their lists may hold trials beside tasks: what was known before.
    record
        Keeps a trial, and gives it back as it was kept.
    """

    def __init__(self, works: Sequence[Work], record: Callable[[Trial], Trial]):
        self.record = record
        self.waiting: list[Job] = []
        """Those that no worker does now, in the order in which they begin: what takes longest first."""
        self._found: list[list[list[Trial]]] = [[[] for _ in work.tasks] for work in works]
        for number, work in enumerate(works):
            for slot, task in enumerate(work.tasks):
                if isinstance(task, Task):
                    self.waiting.append(Job(task, number, slot))
                else:
                    self._found[number][slot].append(record(task))
        self.waiting.sort(key=lambda job: -job.task.cost_s)  # stable, so that others keep their order
        self.left = len(self.waiting)
        """Tasks of which nothing has come yet."""

    def settle(self, job: Job, trials: Iterable[Trial]) -> None:
        """These are the records of a task, which is done."""
        self.left -= 1
        self._found[job.work][job.slot] += map(self.record, trials)

    def results(self) -> list[list[Trial]]:
        """The trials of each work, in the order of its list."""
        return [[trial for trials in work for trial in trials] for work in self._found]


@dataclass
class Call:
    """What a worker was asked and has not answered yet."""

    job: Job | None
    """None where it has to say what it is."""
    place: Place | None
    """Where it was when it was asked."""
    by: By
    """Whose processes do it."""
    since: float
    future: Any = None
