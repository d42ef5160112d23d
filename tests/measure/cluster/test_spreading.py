"""Tasks on Dask workers: right results, and workers that are killed, hang or lose their scheduler in the middle."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.cluster_seats import OF_HOST, TIMED, UNTIMED, seat
from support.cluster_tasks import count, die, hang, meet, nap, nap_until, refuse, stop_worker, wait_until

from flashcore.errors import ClusterError, ClusterLost
from flashcore.gpu import device
from flashcore.measure.cluster import Place, connecting, seats, spreading, starting
from flashcore.measure.cluster.serving import Answer
from flashcore.measure.cluster.tasks import Task, Work
from flashcore.records import Trial

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("distributed") is None, reason="the extra 'cluster' is not installed"),
    pytest.mark.skipif(device.has_gpu(), reason="CPU workers stand for cards where there are none"),
]
PATIENCE_S = 600.0
"""For processes of a busy machine; nothing is judged by it."""
OWED = ({"kind": "correctness", "backend": "cpu"},)


@pytest.fixture(scope="module")
def workers():
    with starting.spread(workers=2) as pool:
        yield pool


def done(pool, *tasks: Task):
    """What came of tasks, and everything that was recorded."""
    kept: list[Trial] = []

    def record(trial: Trial) -> Trial:
        kept.append(trial)
        return trial

    [found] = pool.perform([Work(tasks)], record)
    return found, [t for t in kept if t.kind == "worker"]


def deaths(kept):
    return [(t.data["task"], t.data["ended"], t.data["redone"]) for t in kept]


def killing(path: Path, which: int, *others: Path):
    """Kill one of the processes that a file names, once it is there: 0 the one that measures, 1 the Dask worker.

    Other files have to be there by then too.
    """

    def kill():
        until = time.monotonic() + PATIENCE_S
        while not all(p.exists() and p.read_text() for p in (path, *others)) and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(int(path.read_text().split()[which]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def test_trials_come_back_in_order_from_all_workers_with_where_they_were_made(workers):
    known, kept, begun = Trial(kind="fault", status="unsupported", reason="no"), [], []

    def record(trial):
        kept.append(trial)
        return trial

    tasks = [known, *(Task(f"count {i}", count, (i,), cost_s=i) for i in range(8))]
    one, two = workers.perform([Work(tasks), Work([Task("last", count, (9,))])], record, begun.append)
    assert one[0] == known and [t.data["number"] for t in one[1:]] == list(range(8)) and two[0].data["number"] == 9
    assert begun[:2] == ["count 7", "count 6"] and len(begun) == 9, "what takes longest begins first"
    assert {t.node for t in one[1:]} == {workers.places[0].node} and one[0].node is None
    assert {t.card for t in one[1:]} == {"cpu-0", "cpu-1"} and len({t.data["pid"] for t in one[1:]}) == 2
    assert len(kept) == 10


def test_work_that_is_being_prepared_keeps_no_worker_from_other_work(workers):
    order, other_done = [], threading.Event()

    def prepare(here):
        order.append(f"here: {here}")
        other_done.wait(PATIENCE_S)

    def record(trial):
        order.append(trial.data["number"])
        if trial.data["number"] == 2:
            other_done.set()
        return trial

    first = Work([Task("one", count, (1,), cost_s=9.0)], prepare, lambda: order.append("finished"))
    workers.perform([first, Work([Task("two", count, (2,))])], record)
    assert order == ["here: False", 2, 1, "finished"]

    def fail(here):
        raise ValueError("it does not compile")

    with pytest.raises(ValueError, match="does not compile"):
        workers.perform([Work([Task("one", count, (1,))], fail)], record)


@pytest.fixture(scope="module")
def crews():
    """Two workers as cards have them: each with one process that times, a crew of two, and one for the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starting, "_crew", lambda cards: {"CREW": 2, "HOST": 1})
        cluster = starting._local(["", ""], 2)
    pool = spreading.Spread(cluster.scheduler_address)
    pool._grace_s = 3.0
    try:
        pool.await_workers(2, timeout_s=PATIENCE_S)
        yield pool
    finally:
        pool.close()
        cluster.close()


def test_a_crew_does_several_tasks_at_once_and_a_timing_has_its_card_alone(crews, tmp_path):
    place = str(tmp_path / "here")
    tasks = [Task(f"task {i}", meet, (place, str(i), 6), host=i > 3) for i in range(6)]
    found, lost = done(crews, *tasks)
    assert all(t.data["met"] for t in found), "all six at once: two a crew, and one of each host"
    pids = {card: {t.data["pid"] for t in found if t.card == card} for card in ("cpu-0", "cpu-1")}
    assert [len(some) for some in pids.values()] == [3, 3] and lost == []
    assert {t.node for t in found} == {crews.places[0].node}

    place = str(tmp_path / "there")
    found, _ = done(crews, *(Task(f"host {i}", meet, (place, str(i), 6), host=True) for i in range(6)))
    assert all(t.data["met"] for t in found), "where nothing is left for the cards their crews help"

    timed = [Task(f"timed {i}", nap, (0.3,), timing=True, cost_s=9.0) for i in range(2)]
    found, _ = done(crews, *timed, *(Task(f"nap {i}", nap, (0.6,)) for i in range(4)))
    spans = [(t.data["ended"] - t.data["slept"], t.data["ended"], t.data["pid"]) for t in found]
    for begin, end, pid in spans[:2]:
        assert not any(b < end and begin < e for b, e, other in spans if other != pid), "something ran beside it"
    crew = pids["cpu-0"] | pids["cpu-1"]
    assert crew.isdisjoint(pid for *_, pid in spans[:2]), "what is timed has a process for itself"
    assert {t.card for t in found} == {"cpu-0", "cpu-1"}

    assert any(Path(f"/proc/{pid}").exists() for pid in crew)
    done(crews, *(Task("timed", count, (1,), timing=True, only=place.key) for place in crews.places))
    assert not any(Path(f"/proc/{pid}").exists() for pid in crew), "before a timing they give their memory back"


def test_a_member_of_a_crew_that_dies_costs_its_own_task_alone(crews, tmp_path):
    killing(tmp_path / "victim", 0)
    beside = [Task(f"nap {i}", nap, (1.0,), owed=OWED) for i in range(3)]
    found, lost = done(crews, Task("victim", nap_until, (str(tmp_path / "victim"), PATIENCE_S), cost_s=9.0), *beside)
    assert found[0].data["first"] is False and [t.status for t in found] == ["ok"] * 4
    assert deaths(lost) == [("victim", "signal", True)]
    assert "A process of the worker CPU worker" in lost[0].reason and lost[0].card != found[0].card
    assert {t.card for t in found} <= {"cpu-0", "cpu-1"} and all(t.node for t in found)
    found, _ = done(crews, *(Task(f"count {i}", count, (i,)) for i in range(6)))
    assert [t.data["number"] for t in found] == list(range(6)), "both workers said who they are, and go on"


def test_a_worker_with_a_crew_that_is_killed_is_a_record_for_each_of_its_tasks(crews, tmp_path):
    """The tasks go to the two workers in turn."""
    killing(tmp_path / "victim", 1, tmp_path / "beside")
    long = [Task(name, nap_until, (str(tmp_path / name), PATIENCE_S)) for name in ("victim", "beside")]
    found, lost = done(crews, long[0], Task("one", count, (1,)), long[1], Task("two", count, (2,)))
    assert [t.data.get("first") for t in found] == [False, None] * 2
    assert sorted(deaths(lost)) == [("beside", "gone", True), ("victim", "gone", True)]
    crews.await_workers(2, timeout_s=PATIENCE_S)


@pytest.mark.parametrize(
    ("mine", "other", "task", "may"),
    [
        ([], [], TIMED, True),
        ([UNTIMED], [], TIMED, False),
        ([OF_HOST], [], TIMED, False),
        ([TIMED], [], UNTIMED, False),
        ([TIMED], [], OF_HOST, False),
        ([UNTIMED], [], UNTIMED, True),
        ([UNTIMED, UNTIMED], [], UNTIMED, False),
        ([UNTIMED, UNTIMED], [], OF_HOST, True),
        ([UNTIMED, OF_HOST], [], OF_HOST, False),
        ([], [TIMED], TIMED, True),
        ([], [TIMED], UNTIMED, True),  # one thing beside a timing on another card, and no crew
        ([UNTIMED], [TIMED], UNTIMED, False),
        ([], [UNTIMED], TIMED, True),
        ([], [UNTIMED, UNTIMED], TIMED, False),
    ],
)
def test_what_may_begin_on_a_card_that_has_a_crew(mine, other, task, may):
    pool = spreading.Spread.__new__(spreading.Spread)
    asked, beside = seat(0, *mine), seat(1, *other)
    pool._seats = {"tcp://0": asked, "tcp://1": beside}
    assert pool._may(asked, seats.Job(task, 0, 0)) is may
    pool._seats["tcp://1"] = seat(1, *other, node="elsewhere")
    assert pool._may(asked, seats.Job(task, 0, 0)) is (asked.room(task) is not None), "another node disturbs nothing"


def test_a_task_for_one_place_is_done_there_or_not_at_all(workers):
    found, _ = done(workers, *(Task(f"on {key}", count, (i,), only=key, owed=OWED)
                               for i, key in enumerate(("cpu-1", "cpu-0", "cpu-1", "GPU-none"))))  # fmt: skip
    assert [t.card for t in found] == ["cpu-1", "cpu-0", "cpu-1", None]
    assert (found[3].status, found[3].reason) == ("error", "its worker is gone")


def test_a_worker_whose_card_is_gone_gets_nothing_more_to_do():
    """As after a crash, when its process is asked again what it is."""
    pool, said = spreading.Spread.__new__(spreading.Spread), []
    h200 = Place("box", "GPU-1", "NVIDIA H200", "1.0", "aa", {"torch": "2.13.0"}, 141 << 30)
    pool.mixed, pool._mine, pool._seats, pool._refused = False, h200, {}, []
    pool._tell = lambda seat, doing: said.append(doing)
    facts = {"node": "box", "card": "GPU-2", "gpu": "NVIDIA H200", "version": "1.0", "sources": "aa",
             "software": {"torch": "2.13.0"}, "memory_bytes": 141 << 30}  # fmt: skip
    seat = pool._seats["tcp://a"] = seats.Seat("tcp://a", "1", "GPU")
    pool._met(seat, Answer(True, facts))
    assert seat.place.card == "GPU-2" and not seat.barred and said == ["ready"]
    seat.place = None
    pool._met(seat, Answer(True, facts | {"card": None, "gpu": None, "memory_bytes": None}))
    assert seat.place is None and "has no GPU and this process NVIDIA H200" in seat.barred
    other = pool._seats["tcp://b"] = seats.Seat("tcp://b", "2", "GPU")
    pool._met(other, Answer(False, reason="ModuleNotFoundError: No module named 'flashcore'"))
    assert "cannot say what it is: ModuleNotFoundError" in other.barred and pool.places == ()


def test_where_every_worker_is_refused_the_reason_is_told():
    """As in a notebook whose files were changed after the workers began."""
    pool = spreading.Spread.__new__(spreading.Spread)
    pool.address, pool._refused = "tcp://a", [("1", "The worker 1 has other kernels.")]
    pool._look, pool._hear = (lambda at_once: []), (lambda seconds: [])
    pool._seats = {"tcp://b": seats.Seat("tcp://b", "1", "GPU", barred="The worker 1 has other kernels.")}
    with pytest.raises(ClusterError, match="^The worker 1 has other kernels.$"):
        pool.await_workers(timeout_s=0.0, strict=False)
    pool._refused, pool._seats = [], {}
    with pytest.raises(ClusterError, match="Only 0 of 2 workers at tcp://a were ready within 0 s; see their logs"):
        pool.await_workers(2, timeout_s=0.0)  # jobs that never came: to start a worker by hand would be no help


def test_a_task_that_cannot_travel_is_an_error_and_costs_no_worker(workers):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        done(workers, Task("inner", lambda: []))
    found, _ = done(workers, *(Task(f"count {i}", count, (i,)) for i in range(4)))
    assert len(workers.places) == 2 and [t.data["number"] for t in found] == [0, 1, 2, 3]


def test_timings_on_a_cpu_run_while_no_other_work_is_on_the_node(workers):
    naps = [Task(f"nap {i}", nap, (0.15,), timing=True) for i in range(3)]
    found, _ = done(workers, *naps, Task("beside", nap, (0.15,)))
    ends = sorted(t.data["ended"] for t in found)
    assert all(later - earlier > 0.14 for earlier, later in zip(ends, ends[1:], strict=False)), ends


def test_what_a_killed_process_was_doing_is_done_elsewhere(workers, tmp_path):
    killing(tmp_path / "victim", 0)
    found, lost = done(workers, Task("victim", nap_until, (str(tmp_path / "victim"), PATIENCE_S)))
    assert [t.data["first"] for t in found] == [False]
    assert deaths(lost) == [("victim", "signal", True)]
    assert "lost during 'victim': its process was ended by SIGKILL; it is done elsewhere." in lost[0].reason


def test_a_worker_that_is_killed_is_a_record_and_comes_back(workers, tmp_path):
    killing(tmp_path / "victim", 1)
    found, lost = done(workers, Task("victim", nap_until, (str(tmp_path / "victim"), PATIENCE_S)))
    assert [t.data["first"] for t in found] == [False]
    assert deaths(lost) == [("victim", "gone", True)]
    workers.await_workers(2, timeout_s=PATIENCE_S)

    def held():
        gc.collect()
        return workers.client.run_on_scheduler(
            lambda dask_scheduler: [key for key in dask_scheduler.tasks if "victim" in key]
        )

    wait_until(lambda: not held(), PATIENCE_S)
    assert held() == [], "Dask would keep it for a worker that never comes back"


def test_a_hang_ends_with_its_limit_and_is_tried_on_another_worker(workers, tmp_path):
    found, lost = done(workers, Task("hang", hang, (str(tmp_path / "hang"),), limit_s=2.0))
    assert [t.data["first"] for t in found] == [False]
    assert deaths(lost) == [("hang", "timeout", True)]


def test_a_task_that_takes_two_workers_with_it_is_at_fault_itself(workers):
    found, lost = done(workers, Task("poison", die, owed=OWED), Task("fine", count, (1,)))
    assert [t.status for t in found] == ["error", "ok"] and found[0].backend == "cpu"
    assert "it took 2 workers with it" in found[0].reason and found[0].data["ended"] == "signal"
    assert deaths(lost) == [("poison", "signal", True), ("poison", "signal", False)]
    assert len({t.data["worker"] for t in lost}) == 2, "it was tried twice on one worker"


def test_what_a_function_raises_is_recorded_once_and_takes_nobody_with_it(workers):
    found, lost = done(workers, Task("no", refuse, owed=OWED))
    assert [t.status for t in found] == ["error"] and "this cannot be measured" in found[0].reason and lost == []
    with pytest.raises(ClusterError, match="'no' failed on CPU worker . on .*this cannot be measured"):
        done(workers, Task("no", refuse))


def test_a_worker_that_does_not_answer_within_the_limit_gets_nothing_more_to_do(workers, tmp_path, monkeypatch):
    path = tmp_path / "stopped"
    monkeypatch.setattr(workers, "_grace_s", 8.0)  # the other one has to answer within it, on a busy machine too
    try:
        found, lost = done(workers, Task("stop", stop_worker, (str(path),), limit_s=1.0))
        assert len(found) == 1 and deaths(lost) == [("stop", "hung", True)]
        assert len(workers.places) == 1
    finally:
        os.kill(int(path.read_text()), signal.SIGKILL)  # the nanny starts another
    workers.await_workers(2, timeout_s=PATIENCE_S, strict=False)


def test_workers_with_other_sources_or_on_a_card_of_another_kind_are_refused(workers):
    other = spreading.Spread(workers.address)
    try:
        other._mine = replace(other._mine, sources="0123456789abcdef")
        with pytest.raises(ClusterError, match="other kernels or modules .*instead of 0123456789abcdef"):
            other.await_workers(timeout_s=PATIENCE_S)
    finally:
        other.close()


def test_when_the_scheduler_goes_what_was_measured_stays(run, monkeypatch):
    import dask

    with starting.spread(workers=1) as pool:
        tasks = [Task("first", count, (1,), cost_s=9.0), Task("long", nap, (PATIENCE_S,))]
        measured = threading.Event()

        def record(trial):
            run.append(trial)
            measured.set()
            return trial

        def end():
            measured.wait(PATIENCE_S)
            monkeypatch.setattr(connecting, "CONNECT_S", 1.0)  # from now on: a busy machine may need longer to answer
            dask.config.set({"distributed.comm.timeouts.connect": "1s"})  # the next `Spread` sets it anew
            with contextlib.suppress(Exception):  # it answers no more, which is what is asked of it
                pool.client.sync(pool.client.scheduler.terminate)

        stop = threading.Thread(target=end)
        stop.start()
        with pytest.raises(
            ClusterLost, match=r"The scheduler at tcp://\S+ answers no more .* what was measured is kept"
        ):
            pool.perform([Work(tasks)], record)
        stop.join()
    assert [t.data["number"] for t in run.trials(kind="correctness")] == [1]
