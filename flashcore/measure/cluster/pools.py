"""Do addressed trials on whatever workers there are; the records are written by this one process."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from flashcore.measure.cluster.tasks import Task, Work
from flashcore.records import RunFolder, Trial

if TYPE_CHECKING:
    from flashcore.measure.cluster.places import Place

SCHEDULER = "FLASHCORE_SCHEDULER"
"""Environment variable with the address of the workers that a report has for its notebooks."""
AWAIT_S = 180.0
"""Seconds that the workers of a report may take to say what they are, should all be starting again."""
Record = Callable[[Trial], Trial]
Progress = Callable[[str], None]


class Pool(Protocol):
    """Whatever computes trials."""

    @property
    def places(self) -> tuple[Place, ...]:
        """The cards or processes that compute; none where this process does it itself."""

    def perform(self, works: Sequence[Work], record: Record, progress: Progress | None = None) -> list[list[Trial]]:
        """Do all tasks; gives the trials of each work in the order of its tasks, each as `record` gave it back."""


class Here:
    """This process computes, one trial after the other; each is recorded before the next begins."""

    places: tuple[Place, ...] = ()

    def perform(self, works: Sequence[Work], record: Record, progress: Progress | None = None) -> list[list[Trial]]:
        """See `Pool`. What a task raises ends it all, as if its function had been called."""
        found = []
        for work in works:
            if work.prepare:
                work.prepare(True)
            try:
                found.append(_in_order(work, record, progress))
            finally:
                if work.finish:
                    work.finish()
        return found


def _in_order(work: Work, record: Record, progress: Progress | None) -> list[Trial]:
    trials = []
    for task in work.tasks:
        if isinstance(task, Task):
            if progress:
                progress(task.name)
            trials += [record(trial) for trial in task.trials()]
        else:
            trials.append(record(task))
    return trials


def perform(
    *works: Work | Sequence[Task | Trial],
    run: RunFolder | None = None,
    pool: Pool | None = None,
    progress: Progress | None = None,
) -> list[list[Trial]]:
    """Do lists of tasks, all together where there are several workers; gives the trials of each list.

    Parameters
    ----------
    works
        The lists. In one process they are done in this order.
    run
        Where each trial is appended as soon as it is there; None keeps them in memory.
    pool
        The workers; None for this process alone.
    progress
        Called with the name of each task that begins.

    Raises
    ------
    ClusterError
        The workers or their scheduler are gone, and none came back. What was measured is in the run.
    """
    record = run.append if run is not None else lambda trial: trial
    lists = [work if isinstance(work, Work) else Work(work) for work in works]
    return (pool or Here()).perform(lists, record, progress)


@functools.cache
def pool() -> Pool:
    """The workers that this process was given: those of its report, or none but itself."""
    address = os.environ.get(SCHEDULER)
    if not address:
        return Here()
    from flashcore.measure.cluster.spreading import Spread

    found = Spread(address)
    found.await_workers(timeout_s=AWAIT_S, strict=False)
    return found
