"""A task's trials, what it owes, and how a call travels to another process."""

from __future__ import annotations

import copy

import pytest
from support.cluster_tasks import count

from flashcore import backends
from flashcore.errors import ClusterError
from flashcore.measure.cluster.tasks import Task, carry_out, packed
from flashcore.problem import square

PROBLEM = square(1, 2, 64, 64)


def test_a_task_yields_the_trials_of_its_function():
    [trial] = Task("count", count, (7,)).trials()
    assert trial.data["number"] == 7


def test_what_is_owed_becomes_records_that_say_why_there_is_nothing():
    owed = {"kind": "correctness", "backend": "cpu", "problem": PROBLEM, "data": {"role": "ours"}}
    first, second = Task("check", count, (1,), owed=(owed, {**owed, "backend": "hopper"})).failed(
        "it died", ended="exit"
    )
    assert (first.status, first.reason, first.problem) == ("error", "it died", PROBLEM)
    assert first.data == {"role": "ours", "ended": "exit"} and second.backend == "hopper"
    assert Task("count", count, (1,)).failed("it died") == []


def test_a_backend_travels_as_its_id_and_arrives_as_the_registered_one():
    one = backends.get("cpu")
    assert carry_out(packed(_same, (one,), {"again": [one]})) == [True, True]
    assert len(packed(_same, (one,))) < 300, "the backend itself went along"


def test_a_backend_that_no_other_process_can_find_is_refused():
    with pytest.raises(ClusterError, match="'cpu' is no registered one"):
        packed(_same, (copy.copy(backends.get("cpu")),))


@pytest.mark.parametrize(("reserved", "emptied"), [(1 << 20, 0), (4 << 30, 1)])
def test_memory_that_torch_keeps_is_given_back_after_a_task(monkeypatch, reserved, emptied):
    done = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: reserved)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append(1))
    carry_out(packed(count, (1,)))
    assert len(done) == emptied


def _same(one, again=()):
    return [each is backends.get("cpu") for each in (one, *again)]
