"""Planted bugs are diagnosed with their stages hidden, and right backends raise no alarm."""

from __future__ import annotations

import random

import pytest
from support.sampling import first

from flashcore import backends
from flashcore.bisection.faults import catalogue, diagnosing, planting, proving
from flashcore.decision import evidence
from flashcore.errors import FlashCoreError
from flashcore.numerics.reference import STAGES
from flashcore.page import proof as page
from flashcore.pipeline import reporting
from flashcore.records import Trial

PLANTED = [name for name, backend in diagnosing.plan([backends.get("cpu")])]


def test_every_bug_of_a_backends_stages_is_asked_about():
    assert len(PLANTED) >= 25 and "F16" not in PLANTED
    every = {f.id: f for f in catalogue.planted_in("cpu") if f.found_by == "bisection"}
    assert set(PLANTED) == {name for name, fault in every.items() if not fault.problem.masks}
    left_out = set(every) - set(PLANTED)
    assert left_out == {f"G{n}" for n in range(53, 69)}, "a function is not told of windows, caps, sinks and lengths"


@pytest.mark.slow
@pytest.mark.parametrize("fault", first(sorted(PLANTED, key=lambda name: name != "F9"), 1))
def test_a_planted_bug_is_diagnosed_from_outputs_alone(fault):
    trial = diagnosing.prove(fault, "cpu")
    assert trial.data["outcome"] in ("stage", "class", "not visible"), trial.reason


@pytest.mark.slow
def test_right_backends_raise_no_alarm():
    trial = diagnosing.ask_clean("sdpa-math", cases=2, seed=3)
    assert trial.status == "ok" and trial.data == {"cases": 2, "alarms": 0, "seed": 3}


def test_a_stage_that_may_be_taken_for_another_has_a_reason():
    assert set(diagnosing.CLASSES) == set(diagnosing.REASONS) == set(STAGES)
    for stage, others in diagnosing.CLASSES.items():
        assert stage in others and set(others) <= set(STAGES)


def test_random_problems_have_no_row_without_a_key():
    generator = random.Random(5)
    for _ in range(200):
        problem = diagnosing.random_problem(generator)
        assert not problem.causal or problem.seqlen_q <= problem.seqlen_k


def test_the_sentence_counts():
    def trial(outcome, status="ok", variant="F1", **data):
        return Trial(kind="diagnosis", backend="cpu", variant=variant, status=status, data={"outcome": outcome, **data})

    trials = [trial("stage"), trial("class"), trial("missed", "failed"), trial("not visible"),
              trial(None, variant="clean", cases=7, alarms=1)]  # fmt: skip
    said = diagnosing.sentence(trials)
    assert said.startswith("2 of 3 planted bugs") and "1 missed" in said
    assert "1 change no output" in said and "7 clean cases over 1 implementations gave 1 alarms" in said


def test_the_whole_proof_is_a_list_of_tasks_that_each_owe_a_record():
    cpu, peer = backends.get("cpu"), backends.get("fa4")
    found = diagnosing.tasks([cpu], [peer])
    bugs, clean = found[: len(PLANTED)], found[len(PLANTED) :]
    assert [task.arguments for task in bugs] == [(fault, "cpu") for fault in PLANTED]
    assert sum(task.arguments[1] for task in clean) == diagnosing.CLEAN_CASES
    assert len({task.arguments[2] for task in clean}) == len(clean), "each has a seed of its own"
    lost = bugs[0].failed("it is gone")[0]
    assert (lost.variant, lost.status, lost.data["outcome"]) == (PLANTED[0], "error", "elsewhere")
    words = diagnosing.sentence([lost, *clean[0].failed("it is gone")])
    assert "0 of 1 planted" in words and words.endswith("clean cases of fa4 did not all come to an end")
    absent = next(iter(clean[0].trials()))
    assert absent.status == "unavailable" and "not installed" in absent.reason


def test_the_proof_is_given_to_processes_that_share_a_card_where_there_are_some(run, monkeypatch):
    class Crew:
        places, closed = (), False

        def perform(self, works, record, progress=None):
            found = []
            for work in works:
                if work.prepare:
                    work.prepare(False)
                found.append([record(trial) for task in work.tasks for trial in task.failed("it is not asked")])
            return found

        def close(self):
            self.closed = True

    pool, compiled = Crew(), []
    monkeypatch.setattr(diagnosing, "crew", lambda here: pool)
    monkeypatch.setattr(diagnosing, "compile_planted", lambda *given, **named: compiled.append(named))
    trials = diagnosing.prove_all(run, [backends.get("cpu")])
    assert {t.variant for t in trials} == {*PLANTED, "clean"} and pool.closed
    assert [t.id for t in run.trials()] == [t.id for t in trials] and compiled == [{"traced": (False,)}]


def test_a_short_proof_plants_the_first_bugs_and_asks_about_few_problems():
    bugs, clean = diagnosing.works([backends.get("cpu")], [backends.get("fa4")], most_bugs=2, cases=30, seed=7)
    assert [task.arguments for task in bugs.tasks] == [(fault, "cpu") for fault in PLANTED[:2]]
    assert [task.arguments for task in clean.tasks] == [("fa4", 25, 7), ("fa4", 5, 32)]
    assert [task.owed[0]["data"]["wanted"] for task in clean.tasks] == [25, 5]
    for wrong in ({"most_bugs": -1}, {"cases": -1}):
        with pytest.raises(FlashCoreError, match=f"{next(iter(wrong))}: -1"):
            diagnosing.works([], [], **wrong)


@pytest.mark.notebook
@pytest.mark.slow
def test_the_notebook_asks_about_a_few_bugs_and_finishes(run):
    short = {"profile": "quick", "backends": "cpu", "most_bugs": 1, "cases": 2}
    executed = reporting.execute_notebook("08_outputs_alone", run, short)
    assert [t.status for t in run.trials(kind="notebook")] == ["ok"]
    assert [t.variant for t in run.trials(kind="diagnosis")] == [*PLANTED[:1], "clean"]
    finding = "1 of 1 planted bugs were diagnosed from outputs alone"
    assert finding in executed.read_text() and finding in page.proof_html(evidence.gather(run))


def ours() -> list:
    return [one for one in backends.all_backends() if one.role == "ours" and one.traceable and one.variant_of is None]


def test_a_patch_that_backends_of_one_kernel_share_is_asked_about_once(monkeypatch):
    hopper, unsplit = backends.get("hopper"), backends.get("hopper-unsplit")
    both = diagnosing.tasks([hopper, unsplit], [])
    alone = {task.arguments for one in (hopper, unsplit) for task in diagnosing.tasks([one], [])}
    assert len(both) < len(alone) == len(diagnosing.plan([hopper, unsplit]))
    asked = [(fault, backend) for task in both for fault, *ids in [task.arguments] for backend in ids]
    assert sorted(asked) == sorted(alone), "whoever is left out is asked where the first does not tell"

    outcomes = {"hopper": "missed", "hopper-unsplit": "stage"}
    monkeypatch.setattr(diagnosing, "prove", lambda fault, backend: Trial(
        kind="diagnosis", backend=backend, variant=fault, data={"outcome": outcomes[backend]}))  # fmt: skip
    shared = next(task for task in both if len(task.arguments) == 3)
    assert [t.data["outcome"] for t in shared.trials()] == ["missed", "stage"], "the first still counts as missed"
    outcomes["hopper"] = "class"
    assert [t.backend for t in shared.trials()] == ["hopper"]


def test_each_bug_of_the_plan_is_compiled_in_one_variant_and_no_other_bug(monkeypatch):
    monkeypatch.setattr("flashcore.backends.hopper.multiprocessors", lambda device: 132)
    compiled: list[tuple] = []
    monkeypatch.setattr(proving, "compile_kernel", lambda kernel, *, source, **how: compiled.append((source, how)))
    bugs, _ = diagnosing.works(ours(), [], most_bugs=12)
    bugs.prepare(False)
    sources = {catalogue.get(fault).plants[first].text(backends.get(first).kernel)
               for fault, first, *_ in (task.arguments for task in bugs.tasks)
               if isinstance(catalogue.get(fault).plants[first], planting.Source)}  # fmt: skip
    assert {source for source, _ in compiled} == sources
    assert {(how["trace"], how["dtype"], how["head_dim"]) for _, how in compiled} == {(False, "float16", 64)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", PLANTED[:1])
def test_a_bug_that_was_told_is_not_made_smaller_and_one_that_was_not_is(fault, monkeypatch):
    assert "smallest" not in diagnosing.prove(fault, "cpu").data
    monkeypatch.setattr(diagnosing, "judge", lambda *given, **named: "elsewhere")
    assert diagnosing.prove(fault, "cpu").data["smallest"]["problem"]


def test_without_them_one_process_after_another_may_die(run, monkeypatch):
    def told(function, *given, worker=None, timeout_s, fields):
        return Trial(**{**fields, "data": {**fields.get("data", {}), "crashed": fields["variant"] == PLANTED[0]}})

    monkeypatch.setattr(diagnosing, "crew", lambda here: here)
    monkeypatch.setattr(diagnosing, "isolated_trial", told)
    trials = diagnosing.prove_all(run, [backends.get("cpu")])
    assert [t.variant for t in trials] == [*PLANTED, "clean"] and len(run.trials()) == len(trials)
    assert trials[0].data["outcome"] in ("raised", "elsewhere") and "outcome" not in trials[1].data


def test_what_a_planted_bug_raises_is_its_record(monkeypatch):
    def broken(fault: str, backend: str):
        raise ValueError("no such thing")

    monkeypatch.setattr(diagnosing, "prove", broken)
    trial = next(iter(diagnosing.tasks([backends.get("cpu")], [])[0].trials()))
    assert (trial.status, trial.reason) == ("error", "ValueError: no such thing")
    assert trial.data["outcome"] == "elsewhere"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "wmma", "scalar", "cublaslt", "sdpa-cudnn", "sdpa-flash", "sdpa-math"])
def test_right_backends_raise_no_alarm_on_a_gpu(backend):
    trial = diagnosing.ask_clean(backend, cases=25)
    assert trial.status == "ok", trial.reason
