"""Work in this process alone: in order, each record before the next task, with what has to be done around it."""

from __future__ import annotations

import pytest
from support.cluster_tasks import count, refuse

from flashcore.errors import ClusterError
from flashcore.measure.cluster import pools
from flashcore.measure.cluster.pools import Here, perform, pool
from flashcore.measure.cluster.tasks import Task, Work
from flashcore.records import Trial


def test_lists_are_done_in_order_and_recorded_as_they_come(run):
    said, seen = [], []

    def look(number: int):
        seen.append(len(run.trials()))
        yield from count(number)

    known = Trial(kind="correctness", data={"number": -1})
    first, second = perform([Task("one", look, (1,)), known], [Task("two", look, (2,))], run=run, progress=said.append)
    assert [t.data["number"] for t in first] == [1, -1] and [t.data["number"] for t in second] == [2]
    assert said == ["one", "two"] and seen == [0, 2]
    assert [t.data["number"] for t in run.trials()] == [1, -1, 2]
    assert all(t.card is None and t.node is None for t in run.trials()), "a run of one process has one card"


def test_preparing_comes_before_the_first_task_and_finishing_after_the_last_even_when_one_raises():
    done = []
    work = Work([Task("no", refuse)], lambda here: done.append(f"here: {here}"), lambda: done.append("finished"))
    with pytest.raises(ValueError, match="cannot be measured"):
        perform(work)
    assert done == ["here: True", "finished"]


def test_a_process_without_a_scheduler_computes_itself(monkeypatch):
    monkeypatch.delenv(pools.SCHEDULER, raising=False)
    pool.cache_clear()
    assert isinstance(pool(), Here) and pool().places == ()
    pool.cache_clear()


def test_a_process_whose_scheduler_does_not_answer_says_so(monkeypatch):
    pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    monkeypatch.setattr("flashcore.measure.cluster.connecting.CONNECT_S", 0.5)
    monkeypatch.setenv(pools.SCHEDULER, "tcp://127.0.0.1:9")
    pool.cache_clear()
    with pytest.raises(ClusterError, match="No scheduler answers at tcp://127.0.0.1:9"):
        pool()
