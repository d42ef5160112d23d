"""Timing: medians and spread by arithmetic, interleaving on the CPU, and graph replay on a GPU."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from flashcore import backends
from flashcore.errors import InvalidTiming, WrongWhenTimed
from flashcore.measure import timing
from flashcore.measure.proof import Proof
from flashcore.measure.timing import Candidate, input_sets, summarise, time_on_cpu, time_on_gpu
from flashcore.numerics.inputs import make_inputs
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


class Graph:
    """A captured graph on the CPU: each replay computes from what lies in the buffers, into the tensors captured."""

    def __init__(self, buffers, problem, change=lambda tensor: tensor):
        self.buffers, self.problem, self.change = buffers, problem, change
        self.results = tuple(torch.zeros_like(t) for t in backends.get("cpu").run(*buffers, problem))
        self.replays = 0

    def replay(self):
        self.replays += 1
        for result, value in zip(self.results, backends.get("cpu").run(*self.buffers, self.problem), strict=True):
            result.copy_(self.change(value))


class Empty(Graph):
    def __init__(self, buffers, problem):
        super().__init__(buffers, problem)
        super().replay()  # what an eager call left there is right for the values before
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (Graph, None), (lambda b, p: Graph(b, p, lambda t: t * 1.1), "out: "),
        (Empty, "out: 16384 of 16384 elements are wrong (16384 NaN"),
    ],
)  # fmt: skip
def test_a_graph_is_replayed_once_more_on_values_that_it_has_not_seen(make, wrong):
    """Emulated: the second of two input sets is what the last of six calls reads."""
    problem = square(1, 2, 128, 64)
    sets = [make_inputs(problem, seed=i) for i in range(2)]
    graph, proof = make(sets[1], problem), Proof(problem, sets)
    captured = timing._Captured(graph, calls=6, estimate_us=1.0, launch_us=1.0, results=graph.results)
    stream = SimpleNamespace(synchronize=lambda: None)
    timing._replay_proof(proof, "x", captured, 2, stream)
    results = {"x": summarise([1.0, 2.0], problem, method="graph_replay", round_id="r", l2="rotating"),
               "y": RuntimeError("no")}  # fmt: skip
    timing._add_proof(results, proof, [Candidate("x", None), Candidate("y", None)])
    assert graph.replays == 1 and isinstance(results["y"], RuntimeError)
    if wrong is None:
        assert results["x"].proved and results["x"].proof_seed == proof.seed
    else:
        assert isinstance(results["x"], WrongWhenTimed) and wrong in str(results["x"])


@pytest.mark.gpu
@pytest.mark.parametrize("l2", ["warm", "rotating"])
def test_a_timing_on_a_gpu_is_proved(l2):
    problem = square(2, 8, 512, 64)
    sets = [make_inputs(problem, seed=i, device="cuda") for i in range(1 if l2 == "warm" else 3)]
    kept = []

    def cached(number):
        kept.append(None if kept else backends.get("sdpa-math").run(*sets[number], problem))
        return kept[0]

    def honest(number):
        return backends.get("sdpa-math").run(*sets[number], problem)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a graph without a kernel
        calls = [Candidate("cached", cached), Candidate("honest", honest)]
        found = time_on_gpu(calls, problem, sets=len(sets), rounds=3, l2=l2, proof=Proof(problem, sets))
    assert found["honest"].proved
    assert isinstance(found["cached"], (WrongWhenTimed, InvalidTiming))


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
