"""Which workers are asked for, and what cannot be had, in one sentence each."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from flashcore.errors import ClusterError
from flashcore.gpu import device
from flashcore.measure.cluster import sharing, starting


@pytest.fixture
def three_cards(monkeypatch):
    """A machine with three cards, as far as torch says."""
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: False)


def test_each_worker_gets_a_card_of_its_own(three_cards, monkeypatch):
    assert starting._cards("all") == ["0", "1", "2"] and starting._cards("2") == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-aa,7")
    assert starting._cards("all") == ["5", "GPU-aa", "7"] and starting._cards(1) == ["5"]


def test_each_card_gets_a_crew_that_the_machine_has_room_for(three_cards, monkeypatch):
    monkeypatch.setattr(device, "memory_bytes", lambda: 140 << 30)
    monkeypatch.setattr(device, "is_shared", lambda: True)
    monkeypatch.setattr(starting, "host_bytes", lambda: 256 << 30)
    monkeypatch.setattr(starting.os, "cpu_count", lambda: 32)
    monkeypatch.delenv(sharing.MANY, raising=False)
    assert starting._crew(2) == {"CREW": 14, "HOST": 4} and starting._crew(4) == {"CREW": 6, "HOST": 2}
    monkeypatch.setenv(sharing.MANY, "3")
    assert starting._crew(4) == {"CREW": 3, "HOST": 2}
    monkeypatch.setenv(sharing.MANY, "1")
    assert starting._crew(4) == {}, "one process does everything"
    monkeypatch.setenv(sharing.MANY, "none")
    with pytest.raises(ClusterError, match="FLASHCORE_CREW is 'none'"):
        starting._crew(4)
    monkeypatch.delenv(sharing.MANY)
    monkeypatch.setattr(device, "is_shared", lambda: False)
    assert starting._crew(2) == {}, "the card takes one process alone"


def test_workers_keep_what_a_package_of_others_compiled_and_have_their_card_and_their_threads(monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    monkeypatch.setattr(distributed, "SpecCluster", lambda workers, **_: [one["options"] for one in workers.values()])
    monkeypatch.setattr(starting, "_crew", lambda cards: {"CREW": 3, "HOST": 1})
    monkeypatch.setattr(starting, "keeping_kernels", lambda: {"KEEP_ENABLED": "1", "KEEP_DIR": "/ours"})
    monkeypatch.setenv("KEEP_DIR", "/mine")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(starting.os, "cpu_count", lambda: 8)
    found = starting._local(["0", "GPU-aa"], 2)
    assert [one["env"]["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "GPU-aa"]
    for one in found:
        assert one["env"]["KEEP_ENABLED"] == "1" and "KEEP_DIR" not in one["env"], "the user's own folder stays"
        assert one["env"]["OMP_NUM_THREADS"] == "4"
        assert one["resources"] == {"GPU": 1, "CREW": 3, "HOST": 1} and one["nthreads"] == 4
    [one] = starting._local(None, 1)
    assert (one["resources"], one["nthreads"]) == ({"CPU": 1}, 1)
    before = signal.getsignal(signal.SIGINT)
    try:
        exec(one["preload"])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "Ctrl-C is for the process that has workers"
    finally:
        signal.signal(signal.SIGINT, before)


def test_workers_that_do_not_start_are_one_sentence(monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")

    def broken(**_):
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr(distributed, "SpecCluster", broken)
    said = "The workers of this machine do not start .RuntimeError: Nanny failed to start.; ask for fewer"
    with pytest.raises(ClusterError, match=said):
        starting._local(None, 1)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("4", "4 GPUs are asked for and this machine has 3; give --gpus 3"),
        ("0", "--gpus is '0'; give a number of cards from 1 on, or 'all'"),
        ("many", "--gpus is 'many'; give a number"),
    ],
)
def test_cards_that_are_not_there_are_refused(three_cards, asked, words):
    with pytest.raises(ClusterError, match=words):
        starting._cards(asked)


@pytest.mark.parametrize("asked", ["all", "2"])
def test_a_machine_without_a_card_says_so(no_card, asked):
    with pytest.raises(ClusterError, match="This machine has no GPU that torch can use; leave --gpus out"):
        starting._cards(asked)


def test_cpu_workers_are_for_machines_without_a_card(three_cards):
    with pytest.raises(ClusterError, match="this machine has a GPU; use --gpus"):
        starting._checked(2)


@pytest.mark.parametrize("count", [0, -1, 65])
def test_a_number_of_cpu_workers_makes_sense(no_card, count):
    with pytest.raises(ClusterError, match=f"--workers is {count}; give a number from 1 to 64"):
        starting._checked(count)


def test_the_workers_are_named_in_one_way():
    with pytest.raises(ClusterError, match="--gpus and --scheduler name the workers; give one of --gpus, --workers"):
        with starting.spread(gpus=1, scheduler="tcp://127.0.0.1:9"):
            pass


def test_another_thread_cannot_name_other_workers_to_what_this_one_starts(monkeypatch):
    """A notebook's kernel finds its workers by the environment, which is that of all threads."""
    monkeypatch.delenv(starting.SCHEDULER, raising=False)

    def named(address):
        with starting._named(address):
            return os.environ[starting.SCHEDULER]

    with ThreadPoolExecutor(1) as pool:
        with starting._named("tcp://one"):
            assert named("tcp://within") == "tcp://within"
            with pytest.raises(ClusterError, match="Another thread of this process has workers already"):
                pool.submit(named, "tcp://two").result()
            assert os.environ[starting.SCHEDULER] == "tcp://one"
        assert pool.submit(named, "tcp://two").result() == "tcp://two"
    assert starting.SCHEDULER not in os.environ


@pytest.mark.slow
def test_a_scheduler_without_workers_says_how_to_start_one(monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    monkeypatch.setattr(starting, "JOIN_S", 0.2)
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0", silence_logs="ERROR") as cluster:
        with pytest.raises(ClusterError, match="has no worker; start one a card with 'CUDA_VISIBLE_DEVICES=0 dask wor"):
            with starting.spread(scheduler=cluster.scheduler_address):
                pass


@pytest.mark.slow
def test_a_worker_that_dask_may_give_other_work_is_refused(monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0",
                                  silence_logs="ERROR") as cluster:  # fmt: skip
        with pytest.raises(ClusterError, match="has 2 threads and the resources none, so Dask could put other work"):
            with starting.spread(scheduler=cluster.scheduler_address):
                pass
