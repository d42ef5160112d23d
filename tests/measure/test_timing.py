"""Timing: medians and spread by arithmetic, interleaving on the CPU, and graph replay on a GPU."""

import math

import pytest
import torch

from flashcore.measure import timing
from flashcore.measure.timing import Candidate, input_sets, summarise, time_on_cpu, time_on_gpu
from flashcore.problem import PRESETS, square

SMALL = square(1, 1, 16, 8, dtype="float32")


def test_a_summary_is_the_median_with_quartiles_and_tflops():
    samples = [4.0, 2.0, 3.0, 1.0, 100.0]
    summary = summarise(samples, PRESETS["report"], method="graph_replay", round_id="r", l2="warm", launch_us=7.0)
    assert summary.latency_us == 3.0 and summary.samples_us == samples and summary.round == "r"
    assert summary.tflops == pytest.approx(PRESETS["report"].flops() / 3e-6 / 1e12)
    assert summary.quartiles_us[0] <= 3.0 <= summary.quartiles_us[1] and summary.launch_us == 7.0


def test_at_most_fifty_samples_are_kept_and_all_count_for_the_median():
    samples = [1.0] * 50 + [9.0] * 60
    summary = summarise(samples, SMALL, method="host", round_id="r", l2="warm")
    assert len(summary.samples_us) == 50 and summary.latency_us == 9.0


def test_one_sample_is_its_own_spread():
    assert summarise([5.0], SMALL, method="host", round_id="r", l2="warm").quartiles_us == [5.0, 5.0]


def test_rotating_buffers_exceed_twice_the_cache_and_warm_ones_are_one():
    cache = 60 << 20
    sets = input_sets(PRESETS["latency"], l2="rotating", l2_bytes=cache)
    assert sets * PRESETS["latency"].bytes() >= 2 * cache
    assert input_sets(PRESETS["latency"], l2="warm", l2_bytes=cache) == 1
    assert input_sets(PRESETS["report"], l2="rotating", l2_bytes=cache) == 1, "it exceeds the cache by itself"


def test_candidates_on_the_cpu_are_interleaved_and_a_failure_stays_its_own(monkeypatch):
    order, now = [], [0.0]
    monkeypatch.setattr(timing, "_clock", lambda: now[0])
    monkeypatch.setattr(timing.instruments, "_kept", {})

    def call(name, seconds):
        def run(_):
            order.append(name)
            now[0] += seconds

        return run

    def broken(_):
        raise RuntimeError("no")

    found = time_on_cpu([Candidate("slow", call("slow", 0.004)), Candidate("fast", call("fast", 0.001)),
                         Candidate("broken", broken)], SMALL, rounds=4)  # fmt: skip
    assert isinstance(found["broken"], RuntimeError)
    assert (found["slow"].latency_us, found["fast"].latency_us) == (4000, 1000)
    assert found["slow"].round == found["fast"].round and len(found["slow"].samples_us) == 4
    assert order[2:] == ["slow", "fast", "fast", "slow"] * 2, "the order rotates from round to round"


@pytest.mark.gpu
def test_graph_replay_measures_the_device_and_not_the_host():
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)

    def broken(_):
        raise RuntimeError("no")

    calls = [Candidate("one", lambda _: a @ a), Candidate("two", lambda _: (a @ a) @ a), Candidate("broken", broken)]
    found = time_on_gpu(calls, SMALL, rounds=10)
    assert isinstance(found["broken"], RuntimeError)
    assert found["two"].latency_us / found["one"].latency_us == pytest.approx(2, rel=0.2)
    assert found["one"].method == "graph_replay" and math.isfinite(found["one"].launch_us)
