"""A measurement that kills or hangs its process is one record; the caller goes on, and a warm worker is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flashcore.gpu.isolation import Worker, isolated_trial, run
from flashcore.problem import square
from flashcore.records import Trial

FIELDS = {"kind": "fault", "backend": "scalar", "problem": square(1, 1, 8, 64), "data": {"fault": "F11"}}


# what runs in the worker: importable functions of this module


def add(a: int, b: int = 1) -> int:
    return a + b


def measured() -> Trial:
    return Trial(kind="fault", backend="scalar", data={"pid": os.getpid()})


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def hang() -> None:
    subprocess.Popen(["sleep", "3000"])
    while True:
        time.sleep(1)


def raise_of_cuda() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nFor debugging consider ...\n")


def leave(code: int) -> None:
    print("the last line")
    sys.stdout.flush()
    os._exit(code)


def not_picklable():
    return lambda: None


def noisy() -> int:
    print("words on standard output")
    os.write(1, b"and on its descriptor\n")
    return 7


def children_of_group(group: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(name))
    return found


@pytest.fixture(scope="module")
def worker():
    with Worker() as one:
        yield one


def test_a_result_comes_back_and_the_worker_stays(worker):
    assert worker.call(add, 2, b=3).value == 5
    pid = worker.pid
    assert worker.call(noisy).value == 7 and worker.pid == pid != os.getpid()


def test_threads_that_share_a_worker_get_each_its_own_answers(worker):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: worker.call(add, number, b=1000).value, range(40)))
    assert found == [1000 + number for number in range(40)]


def test_a_worker_that_its_owner_ends_in_the_middle_of_a_call_gives_an_outcome_and_no_error():
    with Worker() as one, ThreadPoolExecutor(1) as pool:
        assert one.call(add, 1).value == 2
        asked = pool.submit(one.call, hang)
        time.sleep(0.2)
        one.close()
        outcome = asked.result()
        assert not outcome.ok and outcome.how in ("exit", "signal"), outcome
        assert one.call(add, 3).value == 4


@pytest.mark.parametrize(
    ("function", "argument", "how", "words"),
    [
        (die, signal.SIGSEGV, "signal", "Its process was ended by SIGSEGV"),
        (die, signal.SIGKILL, "signal", "ended by SIGKILL"),
        (die, signal.SIGABRT, "signal", "ended by SIGABRT"),
        (leave, 3, "exit", "exit code 3, after it said: the last line"),
    ],
)
def test_a_death_is_a_sentence_and_the_next_call_gets_a_new_worker(worker, function, argument, how, words):
    outcome = worker.call(function, argument)
    assert (outcome.ok, outcome.how, outcome.crashed) == (False, how, True)
    assert words in outcome.reason and outcome.reason.count("\n") == 0
    assert worker.call(add, 1).value == 2


@pytest.mark.slow
def test_a_hang_is_ended_with_everything_it_started(worker):
    worker.call(add, 1)
    group = worker.pid
    outcome = worker.call(hang, timeout_s=1)
    assert outcome.how == "timeout" and outcome.crashed and "exceeded 1 s" in outcome.reason
    deadline = time.monotonic() + 300
    while (left := children_of_group(group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert worker.call(add, 1).value == 2


def test_an_exception_is_one_line_and_keeps_the_worker(worker):
    worker.call(add, 1)
    pid = worker.pid
    outcome = worker.call(raise_of_cuda)
    assert outcome.how == "raised" and not outcome.crashed
    assert outcome.reason == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert worker.pid == pid


def test_what_cannot_be_sent_is_said(worker):
    assert "cannot be sent back" in worker.call(not_picklable).reason
    assert worker.call(add, 1).value == 2


def test_a_worker_killed_between_calls_is_noticed(worker):
    worker.call(add, 1)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert worker.call(add, 1).how == "signal"
    assert worker.call(add, 1).value == 2


@pytest.mark.slow
def test_a_trial_comes_back_or_is_made_of_the_death():
    done = isolated_trial(measured, fields=FIELDS)
    assert done.status == "ok" and done.data["pid"] != os.getpid()
    dead = isolated_trial(die, signal.SIGSEGV, fields=FIELDS)
    assert (dead.status, dead.kind, dead.backend) == ("error", "fault", "scalar")
    assert "SIGSEGV" in dead.reason and dead.data["ended"] == "signal" and dead.data["fault"] == "F11"
    assert Trial.model_validate_json(dead.model_dump_json()) == dead


def test_a_worker_does_not_outlive_its_owner():
    code = (
        "import os, signal; from flashcore.gpu.isolation import Worker; from flashcore.problem import square\n"
        "w = Worker(); w.call(square, 1, 1, 8, 64); print(w.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 300
    while os.path.exists(f"/proc/{pid}") and pid in children_of_group(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pid not in children_of_group(pid)


def test_run_takes_a_process_of_its_own():
    assert run(add, 4).value == 5


# what runs in the worker on a GPU


def read_out_of_bounds() -> None:
    import cupy

    kernel = cupy.RawKernel('extern "C" __global__ void f(float* x) { x[1LL << 40] = 1.f; }', "f")
    kernel((1,), (1,), (cupy.zeros(1, cupy.float32),))
    cupy.cuda.runtime.deviceSynchronize()


def spin() -> None:
    import cupy

    kernel = cupy.RawKernel('extern "C" __global__ void f(volatile int* x) { while (*x == 0) {} }', "f")
    kernel((1,), (1,), (cupy.zeros(1, cupy.int32),))
    cupy.cuda.runtime.deviceSynchronize()


def sum_on_the_gpu() -> float:
    import torch

    return float(torch.ones(1000, device="cuda").sum())


@pytest.mark.gpu
def test_the_gpu_survives_an_access_out_of_bounds_and_a_hang():
    import torch

    before = torch.ones(8, device="cuda")
    with Worker() as worker:
        assert worker.call(sum_on_the_gpu).value == 1000
        broken = worker.call(read_out_of_bounds)
        assert not broken.ok and broken.crashed and "illegal" in broken.reason.lower(), broken
        assert worker.call(sum_on_the_gpu).value == 1000
        assert worker.call(spin, timeout_s=5).how == "timeout"
        assert worker.call(sum_on_the_gpu).value == 1000
    assert float(before.sum()) == 8


@pytest.mark.slow
def test_a_worker_gets_variables_that_its_owner_has_not(monkeypatch):
    monkeypatch.setenv("FLASHCORE_TEST_MINE", "stays")
    given = {"FLASHCORE_TEST_MINE": "is not replaced", "FLASHCORE_TEST_ITS": "is new"}
    with Worker(environment=given) as worker:
        found = [worker.call(os.getenv, name).value for name in given]
    assert found == ["stays", "is new"]
