"""Processes that take calls: as many at once as there are, each replaced when it dies, and ended together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from support.cluster_tasks import count, die, nap, threads_given

from flashcore.measure.cluster import hands
from flashcore.measure.cluster.tasks import packed

pytestmark = pytest.mark.slow


def test_a_process_is_given_its_variables_in_place_of_those_that_are_there(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    monkeypatch.setattr(hands, "WARM", "flashcore.records")
    for given, number in (({"environment": hands.ONE_THREAD}, "16"), ({"instead": hands.ONE_THREAD}, "1")):
        some = hands.Hands(1, **given)
        outcome = some.call(packed(threads_given), 60.0)
        assert outcome.value[0].data["number"] == number and some.pids == [outcome.value[0].data["pid"]]
        some.close()
        assert some.pids == []


def test_a_process_that_is_warm_comes_first_and_one_that_died_is_replaced():
    some = hands.Hands(2, warm="flashcore.records")
    try:
        pids = [some.call(packed(count, (i,)), 60.0).value[0].data["pid"] for i in range(3)]
        assert len(set(pids)) == 1 and some.pids == pids[:1], "one at a time needs one process"
        outcome = some.call(packed(die), 60.0)
        assert outcome.crashed and "SIGKILL" in outcome.reason
        with ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(some.call, packed(nap, (0.2,)), 60.0) for _ in range(4)]
            used = [call.result().value[0].data["pid"] for call in calls]
        assert len(set(used)) == 2 and pids[0] not in used, "more callers than processes wait for one"
    finally:
        some.close()
    assert some.pids == []
