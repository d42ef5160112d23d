"""What a worker has room for, which of its processes does it, and what it says that it does."""

from __future__ import annotations

import pytest
from support.cluster_seats import OF_HOST, TIMED, UNTIMED, seat

from flashcore.measure.cluster.seats import threads_of


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
