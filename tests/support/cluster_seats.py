"""Workers as a pool knows them, without any process: for tests of what may begin where."""

from __future__ import annotations

from dataclasses import replace

from flashcore.measure.cluster.places import Place
from flashcore.measure.cluster.seats import Call, Job, Seat
from flashcore.measure.cluster.tasks import Task
from support.cluster_tasks import count

H200 = Place("box", "GPU-0", "NVIDIA H200", "1.0", "aa", {}, 141 << 30)


def seat(number: int, *tasks: Task, node: str = "box", crew: int = 2, hosts: int = 1) -> Seat:
    """A worker on a card of its own, in the middle of these tasks."""
    place = replace(H200, card=f"GPU-{number}", node=node)
    found = Seat(f"tcp://{number}", str(number), "GPU", crew, hosts, place)
    for token, task in enumerate(tasks):
        by = "one" if task.timing else "host" if task.host else "crew"
        found.calls[token] = Call(Job(task, 0, 0), place, by, 0.0)
    return found


UNTIMED, TIMED, OF_HOST = Task("check", count), Task("time", count, timing=True), Task("cpu", count, host=True)
