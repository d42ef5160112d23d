"""Calls of other packages are tried where they may die; only what died or hung keeps this process from calling it."""

from __future__ import annotations

import pytest
from support.cluster_tasks import die, nap, refuse

from flashcore import backends
from flashcore.measure import screening
from flashcore.measure.cluster import Here, Task, hands, sharing
from flashcore.problem import square

PROBLEM = square(1, 1, 16, 64)


class Told:
    """A pool whose tasks end as told."""

    places = ("one that may die",)

    def __init__(self, **ends):
        self.ends, self.asked = ends, []

    def perform(self, works, record, progress=None):
        found = []
        for task in works[0].tasks:
            self.asked.append(task.name)
            end = self.ends.get(task.arguments[0].id)
            found += task.failed(*end[:1], crashed=end[1]) if end else task.trials()
        return [[record(trial) for trial in found]]


def test_what_took_its_process_with_it_is_barred_and_what_raised_is_not():
    cpu, math, fa4 = map(backends.get, ("cpu", "sdpa-math", "fa4"))
    pool = Told(fa4=("It exceeded 60 s and was ended.", True), **{"sdpa-math": ("ValueError: no", False)})
    barred = screening.screen([(cpu, PROBLEM), (math, PROBLEM), (fa4, PROBLEM.with_(causal=True))], pool=pool)
    assert list(barred) == [("fa4", PROBLEM.with_(causal=True))]
    assert "did not survive: It exceeded 60 s" in barred["fa4", PROBLEM.with_(causal=True)]
    assert pool.asked[0] == f"try cpu at {PROBLEM.label()}"


@pytest.mark.parametrize("masks", [{}, {"sink": True}, {"lengths": "ragged"}])
def test_a_call_is_made_once_with_what_the_problem_asks_for(masks):
    problem = PROBLEM.with_(batch=2, **masks)
    (trial,) = screening._called(backends.get("cpu"), problem, 3)
    assert (trial.status, trial.backend, trial.problem) == ("ok", "cpu", problem)


def test_nothing_is_tried_where_nothing_may_die(monkeypatch):
    def called(*given):
        pytest.fail("it was called in this process")

    monkeypatch.setattr(screening, "_called", called)
    monkeypatch.setattr(sharing.device, "has_gpu", lambda: False)
    assert screening.screen([(backends.get("cpu"), PROBLEM)]) == {}
    assert screening.screen([], pool=Here()) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "given", "said"), [(die, (), "SIGKILL"), (nap, (30.0,), "exceeded 0.5 s"), (refuse, (), None)]
)
def test_a_crew_of_this_machine_is_ended_afterwards(monkeypatch, function, given, said):
    made = []

    def crew(pool, least):
        assert least == 1, "one process that may die is enough"
        made.append(sharing.Crew(1))
        return made[0]

    owed = ({"kind": "attention_timing", "backend": "fa4", "problem": PROBLEM},)
    task = Task("try", function, given, owed=owed, limit_s=0.5 if function is nap else 600.0)
    monkeypatch.setattr(hands, "WARM", "flashcore.records")  # these tasks need no torch
    monkeypatch.setattr(screening, "crew", crew)
    monkeypatch.setattr(screening, "Task", lambda *asked, **named: task)
    barred = screening.screen([(backends.get("fa4"), PROBLEM)])
    assert list(barred) == ([("fa4", PROBLEM)] if said else [])
    assert said is None or said in barred["fa4", PROBLEM]
    assert made[0]._hands.pids == []
