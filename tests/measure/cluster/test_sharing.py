"""Several processes on one card: what each does, what is done here, and what is left of one that dies."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
from support.cluster_tasks import await_file, count, die, meet, nap, refuse, threads_given

from flashcore.errors import ClusterError
from flashcore.measure.cluster import hands, sharing
from flashcore.measure.cluster.pools import Here, perform
from flashcore.measure.cluster.sharing import Crew, crew, crew_size, host_size
from flashcore.measure.cluster.tasks import Task, Work
from flashcore.records import Trial

GIB = 1 << 30


@pytest.fixture(scope="module")
def two():
    """Their tasks need no torch, which each process would wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hands, "WARM", "flashcore.records")
        found = Crew(2, 1)
    yield found
    found.close()


def test_what_each_process_imports_at_once_is_what_measures():
    assert importlib.import_module(hands.WARM).check_attention and "torch" in sys.modules


@pytest.mark.slow
def test_processes_do_the_tasks_and_this_one_writes_them_in_their_order(two, run):
    owed = ({"kind": "correctness", "backend": "cpu", "data": {"number": 7}},)
    known = Trial(kind="correctness", data={"number": -1})
    heavy = Task("heavy", nap, (0.3,), cost_s=9.0)
    done, said = [], []
    first = Work([Task("one", count, (1,)), known, Task("dies", die, owed=owed), heavy],
                 lambda here: done.append(f"here: {here}"), lambda: done.append("finished"))  # fmt: skip
    second = [Task("raises", refuse, owed=owed), Task("hangs", nap, (60.0,), owed=owed, limit_s=0.3)]
    one, two_ = perform(first, second, [Task("timed", count, (2,), timing=True)], run=run, pool=two,
                        progress=said.append)[:2]  # fmt: skip
    assert [t.data.get("number") for t in one] == [1, -1, 7, None] and one[0].data["pid"] != os.getpid()
    assert one[2].status == "error" and "SIGKILL" in one[2].reason and one[2].data["crashed"]
    assert one[3].data["slept"] == 0.3, "a process that died is replaced, and the other goes on"
    assert [t.status for t in two_] == ["error", "error"]
    assert "cannot be measured" in two_[0].reason and not two_[0].data["crashed"]
    assert "exceeded 0.3 s" in two_[1].reason and two_[1].data["ended"] == "timeout"
    timed = run.trials()[-1]
    assert timed.data == {"number": 2, "pid": os.getpid()}, "what is timed is done here, after all the rest"
    assert done == ["here: False", "finished"] and said[-1] == "timed"
    assert len(run.trials()) == 7


@pytest.mark.slow
def test_what_cannot_travel_is_done_here_and_what_nobody_owes_for_is_an_error(two):
    def inside(number: int):
        yield from count(number)

    assert perform([Task("one", inside, (3,))], pool=two)[0][0].data["pid"] == os.getpid()
    with pytest.raises(ClusterError, match="'no' could not be done: ValueError: this cannot be measured"):
        perform([Task("no", refuse)], pool=two)
    assert perform([Task("one", count, (4,))], pool=two)[0][0].data["number"] == 4


@pytest.mark.slow
def test_what_the_host_computes_takes_no_place_on_the_card_and_has_processes_of_its_own(
    two, run, monkeypatch, tmp_path
):
    """Both processes of the card are busy until the tasks of the host are done."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    perform([Task("it starts", count, (1,), host=True)], pool=two)
    over, append = tmp_path / "over", run.append

    def record(trial):
        kept = append(trial)
        if len(run.trials()) == 3:
            over.touch()
        return kept

    monkeypatch.setattr(run, "append", record)
    card = [Task(f"card {i}", await_file, (str(over),), cost_s=9.0) for i in range(2)]
    host = [Task(f"host {i}", threads_given, host=True) for i in range(3)]
    on_card, on_host = perform(card, host, run=run, pool=two)
    assert [t.data["number"] for t in on_host] == ["2"] * 3, "the processes of the host have more threads"
    pids = {t.data["pid"] for t in on_host}
    assert len(pids) == 1 and pids.isdisjoint({t.data["pid"] for t in on_card})
    assert all(t.kind == "correctness" for t in run.trials())
    order = [t.data.get("number") for t in run.trials()]
    assert order == ["2"] * 3 + [None] * 2, "no task of the host waited for the card"
    place = str(tmp_path / "here")
    [helped] = perform([Task(f"host {i}", meet, (place, str(i), 3), host=True) for i in range(3)], pool=two)
    assert all(t.data["met"] for t in helped), "they were not there at once"
    assert len({t.data["pid"] for t in helped}) == 3, "where nothing is left for the card its processes help"


@pytest.mark.slow
def test_without_processes_for_the_host_those_of_the_card_do_its_tasks(two):
    alone = Crew(1)
    try:
        alone._hands = two._hands
        [found] = perform([Task("host", threads_given, host=True)], pool=alone)
        assert found[0].data["number"] == "1" and found[0].data["pid"] in two._hands.pids
    finally:
        alone._hands = hands.Hands(0)


def test_what_preparing_raises_ends_it_all(two):
    def prepare(here: bool):
        raise ValueError("no compiler")

    done = []
    with pytest.raises(ValueError, match="no compiler"):
        perform(Work([Task("one", count, (1,))], prepare, lambda: done.append("finished")), pool=two)
    assert done == ["finished"]


@pytest.mark.parametrize(
    ("cores", "card", "host", "size"),
    [(16, 140 * GIB, 128 * GIB, 14), (64, 140 * GIB, 128 * GIB, 14),
     (8, 140 * GIB, 128 * GIB, 6), (16, 20 * GIB, 128 * GIB, 3),
     (16, 140 * GIB, 16 * GIB, 5), (2, 140 * GIB, 128 * GIB, 1), (1, 0, 0, 1)],
)  # fmt: skip
def test_its_size_leaves_cores_and_memory_to_others(cores, card, host, size):
    assert crew_size(cores, card, host) == size


def test_several_cards_share_the_cores_and_the_memory_of_their_machine():
    assert [crew_size(32, 140 * GIB, 256 * GIB, cards) for cards in (1, 2, 4, 8)] == [14, 14, 6, 2]
    assert crew_size(64, 140 * GIB, 48 * GIB, 4) == 4 and crew_size(4, 140 * GIB, 256 * GIB, 4) == 1
    assert [host_size(32, cards) for cards in (1, 2, 8)] == [8, 4, 1] and host_size(2) == 1


def test_there_is_one_only_where_one_process_would_be_slower(monkeypatch):
    here = Here()
    monkeypatch.setattr(sharing.device, "has_gpu", lambda: False)
    assert crew(here) is here
    monkeypatch.setattr(sharing.device, "has_gpu", lambda: True)
    monkeypatch.setattr(sharing.device, "memory_bytes", lambda: 80 * GIB)
    monkeypatch.setattr(sharing.device, "is_shared", lambda: False)
    monkeypatch.setattr(sharing.os, "cpu_count", lambda: 16)
    assert crew(here) is here, "the card takes one process alone"
    monkeypatch.setattr(sharing.device, "is_shared", lambda: True)
    monkeypatch.setattr(sharing, "host_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(sharing.os, "cpu_count", lambda: 2)
    assert crew(here) is here, "two cores are too few"
    monkeypatch.setattr(sharing.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(hands.Worker, "start", lambda self: None)
    assert crew(here).size == 13 and crew(here, most=5).size == 5
    monkeypatch.setenv(sharing.MANY, "3")
    assert crew(here).size == 3 and crew(here, most=2).size == 2
    monkeypatch.setenv(sharing.MANY, "1")
    assert crew(here) is here and crew(here, least=1).size == 1
    for wrong in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv(sharing.MANY, wrong)
        with pytest.raises(ClusterError, match=f"FLASHCORE_CREW is '{wrong}'"):
            crew(here)
    monkeypatch.delenv(sharing.MANY)

    class Spread:
        places = ("card 0", "card 1")

    assert crew(spread := Spread()) is spread
