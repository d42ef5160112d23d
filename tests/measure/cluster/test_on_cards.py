"""Several real cards: the same results as one gives, bits that agree, and cards that are lost in the middle.

Run on a box with two GPUs or more: ``python -m pytest -m gpu -n 0 tests/measure/cluster/test_on_cards.py``.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from importlib.util import find_spec

import pytest
import torch
from support.cluster_tasks import hang, lose_card, nap, nap_until

from flashcore import backends
from flashcore.decision import fleet
from flashcore.measure import cards, check
from flashcore.measure.cluster import Task, perform
from flashcore.measure.sweep import sweep
from flashcore.problem import PRESETS, square
from flashcore.records import RunFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("distributed") is None, reason="the extra 'cluster' is not installed"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this takes two GPUs"),
]
PROBLEMS = [square(1, 2, 256, d, dtype=t, causal=c) for d in (64, 128) for t in ("float16", "bfloat16")
            for c in (False, True)]  # fmt: skip
PATIENCE_S = 600.0
"""For processes of a busy machine; nothing is judged by it."""


@pytest.fixture(scope="module")
def workers():
    from flashcore.measure.cluster import spread

    with spread(gpus="all") as pool:
        yield pool


def lost(run):
    return [(t.data.get("task"), t.data.get("ended"), t.data.get("redone")) for t in run.trials(kind="worker")]


def test_each_worker_has_a_card_of_its_own(workers):
    places = workers.places
    assert len(places) == torch.cuda.device_count() == len({place.card for place in places})
    assert all(place.card.startswith("GPU-") for place in places) and len({place.gpu for place in places}) == 1


def test_checks_on_several_cards_are_those_of_one(workers, run):
    chosen = backends.select("hopper,wmma,sdpa-cudnn")
    todo = check.tasks(check.pairs(PROBLEMS, chosen))
    [spread] = perform(todo, run=run, pool=workers)
    [here] = perform(todo)
    assert [(t.backend, t.problem, t.status) for t in spread] == [(t.backend, t.problem, t.status) for t in here]
    assert [t.correctness and t.correctness.max_abs_error for t in spread] == [
        t.correctness and t.correctness.max_abs_error for t in here
    ]
    assert len({t.card for t in spread}) == len(workers.places) and lost(run) == []


def test_each_card_has_a_crew_and_what_is_timed_has_the_card_alone(workers, run):
    cards_ = len(workers.places)
    naps = [Task(f"nap {i}", nap, (1.0,), cost_s=2.0) for i in range(2 * cards_)]
    perform(naps, pool=workers)  # the processes start
    timed = [Task(f"timed {i}", nap, (0.5,), timing=True) for i in range(cards_)]
    [beside, alone] = perform(naps, timed, run=run, pool=workers)
    spans = {t.id: (t.data["ended"] - t.data["slept"], t.data["ended"]) for t in [*beside, *alone]}
    assert max(spans[t.id][0] for t in beside) < min(spans[t.id][1] for t in beside), "two at once on each card"
    for one in alone:
        begin, end = spans[one.id]
        with_it = [t for t in [*beside, *alone] if t is not one and t.card == one.card]
        assert not any(spans[t.id][0] < end and begin < spans[t.id][1] for t in with_it)
    assert {t.data["pid"] for t in alone}.isdisjoint({t.data["pid"] for t in beside}) and lost(run) == []


def test_a_round_of_timings_stays_on_one_card(workers, run):
    trials = sweep(run, [PRESETS["latency"], *PROBLEMS[:3]], backends.select("hopper,sdpa-cudnn"), pool=workers)
    rounds: dict[str, set] = {}
    for trial in trials:
        if trial.timing:
            rounds.setdefault(trial.timing.round, set()).add(trial.card)
    assert len(rounds) == 4 and all(len(on) == 1 for on in rounds.values())
    assert len(set.union(*rounds.values())) > 1, "one card did it all"


def test_the_cards_of_a_box_give_the_same_bits(workers, run):
    trials = cards.measure(run, workers)
    found = fleet.judge(trials)
    assert [t.status for t in trials] == ["ok"] * len(workers.places), [t.reason for t in trials]
    assert all(kind.agrees for kind in found.kinds), found.sentences()


@pytest.mark.parametrize(("which", "ended"), [(0, "signal"), (1, "gone")])
def test_what_a_killed_card_was_doing_is_done_on_another(workers, run, tmp_path, which, ended):
    path = tmp_path / "victim"

    def kill():
        until = time.monotonic() + PATIENCE_S
        while not (path.exists() and path.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(int(path.read_text().split()[which]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    todo = [
        Task("victim", nap_until, (str(path), PATIENCE_S), cost_s=9.0),
        *check.tasks(check.pairs(PROBLEMS, [backends.get("hopper")])),
    ]
    [found] = perform(todo, run=run, pool=workers)
    assert [t.status for t in found] == ["ok"] * len(todo)
    gone = lost(run)
    assert ("victim", ended, True) in gone and {(how, again) for _, how, again in gone} == {(ended, True)}
    assert len(gone) == 1 or ended == "gone", (
        "a process of a crew costs its own task alone, and a worker all of its tasks"
    )
    workers.await_workers(torch.cuda.device_count(), timeout_s=PATIENCE_S)


def test_a_card_whose_context_is_lost_works_again_and_its_task_is_done_elsewhere(workers, run, tmp_path):
    todo = [Task("loses its card", lose_card, (str(tmp_path / "lost"),), cost_s=9.0),
            *check.tasks(check.pairs(PROBLEMS, [backends.get("hopper")]))]  # fmt: skip
    [found] = perform(todo, run=run, pool=workers)
    assert [t.status for t in found] == ["ok"] * len(todo)
    [(task, _, redone)] = lost(run)
    assert (task, redone) == ("loses its card", True)
    workers.await_workers(torch.cuda.device_count(), timeout_s=PATIENCE_S)


def test_a_hang_on_a_card_ends_with_its_limit(workers, run, tmp_path):
    [found] = perform([Task("hang", hang, (str(tmp_path / "hang"),), limit_s=2.0)], run=run, pool=workers)
    assert [t.data["first"] for t in found] == [False] and lost(run) == [("hang", "timeout", True)]


def test_more_cards_than_there_are_is_one_sentence():
    from flashcore.errors import ClusterError
    from flashcore.measure.cluster import spread

    count = torch.cuda.device_count()
    with pytest.raises(ClusterError, match=f"{count + 1} GPUs are asked for and this machine has {count}"):
        with spread(gpus=count + 1):
            pass


def test_a_run_names_its_cards(workers, tmp_path):
    from flashcore.gpu import device

    run = RunFolder.create(tmp_path / "named")
    device.record_environment(run, "before", {}, cards=[place.as_dict() for place in workers.places])
    assert {one["card"] for one in run.environment()["cards"]} == {place.card for place in workers.places}
