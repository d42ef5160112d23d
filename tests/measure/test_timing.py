"""Timing: medians and spread by arithmetic, interleaving on the CPU, and graph replay on a GPU."""

import contextlib
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
    monkeypatch.setattr(timing.instruments, "_torch_is_kept", True)

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
    """Emulated: the second of two input sets is what the fourth of six calls reads."""
    problem = square(1, 2, 128, 64)
    sets = [make_inputs(problem, seed=i) for i in range(2)]
    graph, proof = make(sets[1], problem), Proof(problem, sets)
    captured = timing._Captured(graph, calls=6, estimate_us=1.0, launch_us=1.0, results=graph.results, kept=3)
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


class Emulated:
    """What timing asks of CUDA, on the CPU: a graph is a list of functions, and each call takes 50 µs."""

    capturing: list | None = None
    now_ms = 0.0

    class Stream:
        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self, stream):
            self.at = Emulated.now_ms

        def elapsed_time(self, end):
            return end.at - self.at

    class CUDAGraph:
        def __init__(self):
            self.nodes = []

        def replay(self):
            Emulated.now_ms += 0.001
            for node in self.nodes:
                node()

    @classmethod
    @contextlib.contextmanager
    def graph(cls, graph, stream):
        cls.capturing = graph.nodes
        yield
        cls.capturing = None

    @classmethod
    def launch(cls, kernel):
        """Run now, or in each replay of the graph that is being captured."""
        if cls.capturing is None:
            kernel()
        else:
            cls.capturing.append(kernel)

    @classmethod
    def backend(cls, inputs, problem):
        """Results in fresh tensors, which a kernel fills that takes 50 µs."""
        q = inputs[0]
        results = torch.empty_like(q), torch.empty(q.shape[:-1])

        def kernel():
            cls.now_ms += 0.05
            for result, value in zip(results, backends.get("cpu").run(*inputs, problem), strict=True):
                result.copy_(value)

        cls.launch(kernel)
        return results


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(timing.instruments, "_kept", {})  # CUDA is replaced here, and that is no cheating
    monkeypatch.setattr(timing.instruments, "_torch_is_kept", True)
    for name in ("Stream", "Event", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(Emulated, name))
    for name, value in (("synchronize", lambda: None), ("current_stream", Emulated.Stream),
                        ("stream", lambda stream: contextlib.nullcontext())):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return Emulated


@pytest.mark.parametrize("sets", [1, 3])
def test_the_whole_way_of_a_timing_on_a_gpu_emulated(emulated, sets):
    problem = square(1, 2, 32, 16)
    buffers = [make_inputs(problem, seed=i) for i in range(sets)]
    memory, own = {}, emulated.backend(buffers[0], problem)

    def honest(number):
        return emulated.backend(buffers[number], problem)

    def cached(number):
        if number not in memory:
            memory[number] = emulated.backend(buffers[number], problem)
        return memory[number]

    def one_buffer(number):
        emulated.launch(lambda: [to.copy_(t) for to, t in zip(own, honest(number), strict=True)])
        return own

    def rarely(number):
        memory["calls"] = memory.get("calls", 0) + 1
        return honest(number) if emulated.capturing is None or memory["calls"] % 1000 == 0 else memory[number]

    def slightly_off(number):
        out, lse = honest(number)
        emulated.launch(lambda: out.mul_(1.05))
        return out, lse

    def broken(number):
        raise RuntimeError("no")

    calls = [Candidate(one.__name__, one) for one in (honest, cached, one_buffer, rarely, slightly_off, broken)]
    found = time_on_gpu(calls, problem, sets=sets, rounds=3, proof=Proof(problem, buffers))
    assert found["honest"].proved and found["honest"].latency_us == pytest.approx(50, rel=0.01)
    assert found["honest"].calls % sets == 0 and found["one_buffer"].proved
    for name in ("cached", "rarely", "slightly_off"):
        assert isinstance(found[name], WrongWhenTimed), name
    assert "NaN" in str(found["cached"]) and "(0 NaN" in str(found["slightly_off"])
    assert isinstance(found["broken"], RuntimeError)
    without = time_on_gpu(calls[:2], problem, sets=sets, rounds=3)
    assert without["cached"].latency_us < 1 and "proved" not in without["cached"].model_dump()


def test_calls_that_take_no_time_at_all_are_no_timing(emulated, monkeypatch):
    monkeypatch.setattr(emulated.CUDAGraph, "replay", lambda self: None)
    found = time_on_gpu([Candidate("nothing", lambda number: None)], SMALL, rounds=3)
    assert isinstance(found["nothing"], InvalidTiming)


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
