"""What judges is remembered, a change of it is named and put back, and honest work is not accused."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

from flashcore.errors import JudgeTampered
from flashcore.numerics import ambient, instruments
from flashcore.numerics.instruments import watched


@pytest.fixture(autouse=True)
def _afterwards_all_is_as_it_was():
    instruments.remember()
    threads = torch.get_num_threads()
    yield
    instruments.put_back()
    assert instruments.changed() == [] and torch.get_num_threads() == threads


def lie(*args):
    return 0


CHANGES = [
    (time, "perf_counter"), (time, "monotonic"), (torch, "allclose"), (torch, "isnan"), (torch.Tensor, "abs"),
    (torch.Tensor, "isnan"), (torch.Tensor, "__eq__"), (torch.Tensor, "__le__"), (torch.Tensor, "__sub__"),
    (torch.nn.functional, "scaled_dot_product_attention"), (torch.cuda, "Event"), (torch.cuda.Event, "elapsed_time"),
    (torch.cuda.CUDAGraph, "replay"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), CHANGES, ids=[f"{o.__name__}.{n}" for o, n in CHANGES])
def test_a_change_is_named_and_put_back(owner, name):
    true = getattr(owner, name)
    with pytest.raises(JudgeTampered, match=name) as raised, watched("cheat"):
        setattr(owner, name, lie)
    assert raised.value.backend == "cheat" and len(raised.value.names) == 1
    assert getattr(owner, name) == true and instruments.changed() == []


def test_what_was_changed_before_is_not_laid_at_the_backend(monkeypatch):
    monkeypatch.setattr(time, "monotonic_ns", lie)
    with pytest.raises(JudgeTampered, match="before this backend was called") as raised, watched("innocent"):
        pytest.fail("it is not even called")
    assert raised.value.backend is None and time.monotonic_ns is not lie


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "number of threads"),
        (lambda: torch.backends.cuda.enable_flash_sdp(False), "FlashAttention"),
        (lambda: torch.backends.cuda.enable_cudnn_sdp(False), "cuDNN"),
        (lambda: torch.backends.cuda.enable_math_sdp(False), "plain attention"),
        (lambda: torch.backends.cuda.enable_mem_efficient_sdp(False), "memory-efficient"),
    ],
)
def test_a_setting_that_is_left_changed_is_named_and_put_back(change, said):
    before = instruments._settings()
    with pytest.raises(JudgeTampered, match=said), watched("cheat"):
        change()
    assert {name: value for name, (value, _) in instruments._settings().items()} == {
        name: value for name, (value, _) in before.items()
    }


def test_a_thread_of_its_own_is_a_finding_and_one_of_a_package_is_not():
    stop = threading.Event()
    thread = threading.Thread(target=lambda: stop.wait(), name="mine")
    with ThreadPoolExecutor(1) as pool, watched("honest"):
        pool.submit(sum, ()).result()
    with pytest.raises(JudgeTampered, match="mine"), watched("cheat"):
        thread.start()
    with watched("later"):
        pass  # it ran before
    stop.set()
    thread.join()


def test_backends_that_are_judged_in_several_threads_accuse_nobody():
    from flashcore.measure.check import check_attention
    from flashcore.problem import square

    problem = square(1, 2, 64, 16)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: check_attention("cpu", problem, seed=seed), range(12)))
    assert {trial.status for trial in found} == {"ok"}, [trial.reason for trial in found]


def test_a_thread_that_begins_elsewhere_meanwhile_is_nobody_s_finding():
    """It runs a function of somebody's own, and is about to judge, or to do anything else."""
    inside, begun, over = threading.Event(), threading.Event(), threading.Event()

    def elsewhere():
        inside.wait(60)
        thread = threading.Thread(target=lambda: (begun.set(), over.wait(60)), name="about to judge")
        thread.start()
        thread.join()

    other = threading.Thread(target=elsewhere)
    other.start()
    try:
        with watched("honest"):
            inside.set()
            assert begun.wait(60)
    finally:
        over.set()
        other.join()


def started_by_another(work):
    threading.Thread(target=lambda: threading.Thread(target=work, name="second").start(), name="first").start()


def started_from_below(work):
    _thread.start_new_thread(work, ())


def started_by_one_from_below(work):
    _thread.start_new_thread(started_by_another, (work,))


@pytest.mark.parametrize("start", [started_by_another, started_from_below, started_by_one_from_below])
def test_a_thread_is_a_finding_however_the_backend_came_to_begin_it(start):
    stop, runs, ended = threading.Event(), threading.Event(), threading.Event()

    def work():
        runs.set()
        stop.wait(60)
        ended.set()

    try:
        with pytest.raises(JudgeTampered, match="goes on after the call"), watched("cheat"):
            start(work)
            assert runs.wait(60)
    finally:
        stop.set()
        assert ended.wait(60)


def test_a_backend_that_keeps_anybody_from_hearing_of_its_threads_is_found_out():
    name = instruments._STARTS[-1]
    own, stop = getattr(threading, name), threading.Event()
    thread = threading.Thread(target=lambda: stop.wait(60), name="mine")
    with pytest.raises(JudgeTampered, match="mine") as raised, watched("cheat"):
        setattr(threading, name, own)
        thread.start()
    assert raised.value.names == [f"threading.{name}"] and getattr(threading, name) is own
    stop.set()
    thread.join()


def test_judges_take_turns_so_that_what_one_backend_changes_is_laid_at_no_other_one():
    inside, over = threading.Event(), threading.Event()

    def cheats():
        with pytest.raises(JudgeTampered, match=r"perf_counter.*cheat"), watched("cheat"):
            true, time.perf_counter = time.perf_counter, lie
            inside.set()
            over.wait(0.2)  # the other one would begin now, or end
        return time.perf_counter is true

    def is_honest():
        inside.wait(60)
        with watched("honest"):
            over.set()
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(one.result() for one in [pool.submit(cheats), pool.submit(is_honest)])


def test_a_call_that_holds_torch_to_one_kernel_meanwhile_is_laid_at_nobody_and_ends_as_it_began():
    before = {name: value for name, (value, _) in instruments._settings().items()}
    inside, called, over = threading.Event(), threading.Event(), threading.Event()

    def calls():
        inside.wait(60)
        with ambient.torchs_kernel(torch.nn.attention.SDPBackend.MATH):
            called.set()
            over.wait(0.2)

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(calls) for _ in range(2)]
        with watched("honest"):
            inside.set()
            assert called.wait(60)
        over.set()
        [one.result() for one in found]
    assert {name: value for name, (value, _) in instruments._settings().items()} == before


def test_a_thread_that_has_ended_is_none():
    with watched("honest"):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()


def test_what_a_backend_raises_comes_first_and_all_is_put_back():
    with pytest.raises(ZeroDivisionError), watched("broken"):
        time.perf_counter = lie
        raise ZeroDivisionError
    assert time.perf_counter is not lie


def test_what_comes_back_inside_the_call_is_no_finding():
    with watched("honest"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        true, time.perf_counter = time.perf_counter, lie
        time.perf_counter = true


def test_a_name_is_trusted_as_it_was_first_and_one_that_was_not_there_is_taken_away(monkeypatch):
    monkeypatch.setattr(instruments, "_kept", {})
    module = ModuleType("toy")
    module.there = len
    instruments.trust(module, ("there", "not_there"))
    module.there, module.not_there = lie, lie
    instruments.trust(module, ("there",))
    assert instruments.changed() == ["toy.there", "toy.not_there"]
    instruments.put_back()
    assert module.there is len and not hasattr(module, "not_there")


def test_a_module_that_is_reloaded_renews_its_own_names(monkeypatch):
    monkeypatch.setattr(instruments, "_kept", {})
    module = ModuleType("toy")
    body = "from flashcore.numerics import instruments\ndef judge(): pass\ninstruments.trust(me, ('judge',))"
    module.me = module
    exec(body, vars(module))
    first = module.judge
    exec(body, vars(module))
    assert module.judge is not first and instruments.changed() == []


@pytest.mark.slow
def test_a_plug_in_finds_everything_remembered_already(tmp_path):
    (tmp_path / "sly.py").write_text(
        "import time, torch\nimport flashcore.numerics.tolerance as t\n"
        "time.perf_counter = torch.allclose = t.compare = lambda *a, **k: 0\n"
    )
    program = (
        "from flashcore import backends; backends.all_backends(); from flashcore.numerics import instruments;"
        "print(*sorted(instruments.changed()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={"FLASHCORE_PLUGINS": str(tmp_path), "PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert done.stdout.split() == ["flashcore.numerics.tolerance.compare", "time.perf_counter", "torch.allclose"], (
        done.stderr
    )


def test_a_name_may_be_trusted_while_others_are_looked_at(monkeypatch):
    """Another thread that imports a backend trusts names of it: what is being looked through grows meanwhile."""

    class Trusts:
        """Compares as anything does, and is followed by another trusted name whenever it is looked at."""

        def __getattribute__(self, name):
            if name == "__dict__":
                instruments.trust(type("Other", (), {}), ("run",))
            return object.__getattribute__(self, name)

    monkeypatch.setattr(instruments, "_kept", dict(instruments._kept))
    instruments.trust(Trusts(), ("run",), "Trusts")
    assert instruments.changed() == []
    instruments.put_back()
