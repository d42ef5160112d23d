"""What a worker has room for, which of its processes does it, and what it says that it does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.cluster_seats import OF_HOST, TIMED, UNTIMED, seat

from flashcore.measure.cluster.seats import Agenda, threads_of
from flashcore.measure.cluster.tasks import Work
from flashcore.records import Trial


def test_which_process_does_a_task():
    assert seat(0, crew=0).room(OF_HOST) == "one" and seat(0, UNTIMED, crew=0).room(OF_HOST) is None
    assert (seat(0).room(TIMED), seat(0).room(UNTIMED), seat(0).room(OF_HOST)) == ("one", "crew", "host")
    assert seat(0, OF_HOST).room(OF_HOST) is None and seat(0, OF_HOST).room(OF_HOST, spare=True) == "crew"
    assert seat(0, UNTIMED, UNTIMED, OF_HOST).room(OF_HOST, spare=True) is None
    assert seat(0, UNTIMED, UNTIMED).room(UNTIMED, spare=True) is None, "the host does nothing of the card's"
    assert seat(0, hosts=0).room(OF_HOST) == "crew"


def test_what_a_worker_does_in_words():
    assert seat(0).doing == "" and seat(0, TIMED).doing == "time" and seat(0, TIMED).timing
    busy = seat(0, UNTIMED, UNTIMED, OF_HOST)
    assert busy.doing == "cpu, and 2 beside it" and busy.nodes == {"box"} and not busy.timing


@pytest.mark.parametrize(("offered", "threads"), [({}, 1), ({"GPU": 1}, 1), ({"CREW": 3, "HOST": 2.0}, 5)])
def test_a_worker_has_a_thread_for_each_call_that_it_waits_for(offered, threads):
    assert threads_of(offered) == threads


def test_what_takes_longest_waits_first_and_what_comes_of_it_stands_in_its_place():
    kept = []

    def record(trial):
        kept.append(trial.variant)
        return trial

    known = Trial(kind="ceiling", variant="known")
    agenda = Agenda([Work([UNTIMED, known, replace(UNTIMED, cost_s=9.0)]), Work([TIMED])], record)
    assert kept == ["known"] and agenda.left == 3
    assert [(job.work, job.slot) for job in agenda.waiting] == [(0, 2), (0, 0), (1, 0)]
    for job in agenda.waiting:
        agenda.settle(job, [Trial(kind="ceiling", variant=f"{job.work}.{job.slot}.{n}") for n in range(2 - job.work)])
    assert agenda.left == 0 and kept == ["known", "0.2.0", "0.2.1", "0.0.0", "0.0.1", "1.0.0"]
    assert [[t.variant for t in work] for work in agenda.results()] == [
        ["0.0.0", "0.0.1", "known", "0.2.0", "0.2.1"], ["1.0.0"],
    ]  # fmt: skip
