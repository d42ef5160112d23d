"""Timing: medians and spread by arithmetic, interleaving on the CPU, and graph replay on a GPU."""

import contextlib
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from flashcore import backends
from flashcore.errors import InvalidTiming, JudgeTampered, WrongWhenTimed
from flashcore.measure import timing
from flashcore.measure.proof import Proof
from flashcore.measure.timing import Candidate, input_sets, summarise, time_on_cpu, time_on_gpu
from flashcore.measure.watching import Watch
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.problem import PRESETS, square

SMALL = square(1, 1, 16, 8, dtype="float32")


def test_a_summary_is_the_median_with_quartiles_and_tflops():
    samples = [4.0, 2.0, 3.0, 1.0, 100.0]
    summary = summarise(samples, PRESETS["report"], method="graph_replay", round_id="r", l2="warm", launch_us=7.0)
    assert summary.latency_us == 3.0 and summary.samples_us == samples and summary.round == "r"
    assert summary.tflops == pytest.approx(PRESETS["report"].flops() / 3e-6 / 1e12)
    assert summary.quartiles_us[0] <= 3.0 <= summary.quartiles_us[1] and summary.launch_us == 7.0


def test_of_sequences_with_lengths_somebody_has_to_say_how_many_operations_are_done():
    padded = SMALL.with_(lengths="right")
    for flops, tflops, kept in ((None, None, {}), (6_000_000, 2.0, {"flops": 6_000_000})):
        found = summarise([3.0], padded, method="host", round_id="r", l2="warm", flops=flops)
        assert found.tflops == tflops and {k: v for k, v in found.model_extra.items() if k == "flops"} == kept


def test_no_more_samples_are_kept_than_a_timing_takes_and_all_count_for_the_median():
    samples = [1.0] * timing.MOST_ROUNDS + [9.0] * (timing.MOST_ROUNDS + 10)
    summary = summarise(samples, SMALL, method="host", round_id="r", l2="warm")
    assert len(summary.samples_us) == timing.MOST_ROUNDS and summary.latency_us == 9.0


def test_an_interval_is_narrow_by_its_width_over_the_median():
    even = [100.0] * 20
    assert timing.is_narrow(even) and not timing.is_narrow(even[:6]), "six samples have no interval"
    for step, narrow in ((0.03, True), (0.3, False)):  # the 9th and the 22nd of 30 lie 13 steps apart
        assert timing.is_narrow([100 + step * i for i in range(30)]) is narrow


class Replays:
    """A graph whose replays take these times in ms, over and over."""

    def __init__(self, *taken):
        self.taken, self.count = taken, 0

    def replay(self):
        Emulated.now_ms += self.taken[self.count % len(self.taken)]
        self.count += 1


def captured_of(graph, estimate_us=1000.0):
    return timing._Captured(graph, calls=1, estimate_us=estimate_us, launch_us=1.0, results=None, kept=0)


STEADY, NOISY = (1.0,), (1.0, 1.1, 0.9, 1.3)


@pytest.mark.parametrize(
    ("graphs", "seconds", "rounds", "why"),
    [
        ({"a": STEADY, "b": STEADY}, 0, 30, "narrow"),
        ({"a": STEADY, "b": NOISY}, 0, 100, "100 rounds are the most"),
        ({"a": STEADY, "b": NOISY}, 0.5, 35, "0.6 s more were up"),
    ],
)
def test_rounds_go_on_until_every_interval_is_narrow_or_the_time_is_up(
    emulated, monkeypatch, graphs, seconds, rounds, why
):
    now = [0.0]

    def clock():
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(timing, "_clock", clock)
    graphs = {name: captured_of(Replays(*taken)) for name, taken in graphs.items()}
    samples, ended = timing._rounds(graphs, emulated.Stream(), 30, timing.MOST_ROUNDS)
    assert ended == why and {len(s) for s in samples.values()} == {rounds}
    assert samples["a"] == pytest.approx([1000.0] * rounds)
    stopped = {name: timing._stopped(samples[name], graphs[name], ended) for name in graphs}
    assert stopped["a"] == "narrow" and stopped["b"] == why


def test_a_slow_call_gets_few_samples_and_keeps_nobody_waiting(emulated):
    graphs = {"slow": captured_of(Replays(30.0, 60.0), 2 * timing.SLOW_CALL_US), "fast": captured_of(Replays(1.0))}
    samples, ended = timing._rounds(graphs, emulated.Stream(), 30, timing.MOST_ROUNDS)
    assert len(samples["slow"]) == timing.SLOW_ROUNDS and len(samples["fast"]) == 30 and ended == "narrow"
    assert timing._stopped(samples["slow"], graphs["slow"], ended) == "a call this slow gets 10"


def test_rounds_that_were_asked_for_are_all_there_are(emulated):
    samples, ended = timing._rounds({"a": captured_of(Replays(*NOISY))}, emulated.Stream(), 5, 5)
    assert len(samples["a"]) == 5 and ended == "5 rounds are the most"


def test_one_sample_is_its_own_spread():
    assert summarise([5.0], SMALL, method="host", round_id="r", l2="warm").quartiles_us == [5.0, 5.0]


def test_rotating_buffers_exceed_twice_the_cache_and_warm_ones_are_one():
    cache = 60 << 20
    sets = input_sets(PRESETS["latency"], l2="rotating", l2_bytes=cache)
    assert sets * PRESETS["latency"].bytes() >= 2 * cache > (sets - 1) * PRESETS["latency"].bytes()
    assert input_sets(SMALL, l2="rotating", l2_bytes=cache) == timing.MAX_INPUT_SETS, "and no more than that"
    assert input_sets(PRESETS["latency"], l2="warm", l2_bytes=cache) == 1
    assert input_sets(PRESETS["report"], l2="rotating", l2_bytes=cache) == 1, "it exceeds the cache by itself"


def test_candidates_on_the_cpu_are_interleaved_and_a_failure_stays_its_own(monkeypatch):
    order, now = [], [0.0]
    monkeypatch.setattr(timing, "_clock", lambda: now[0])
    monkeypatch.setattr(timing.instruments, "_kept", {})
    monkeypatch.setattr(timing.instruments, "_torch_is_kept", True)

    def call(name, seconds):
        def run(number):
            assert number == 0, "a CPU has one set of buffers"
            order.append(name)
            now[0] += seconds

        return run

    def broken(_):
        raise RuntimeError("no")

    def tires(_):
        now[0] += 1.0
        tired.append(len(tired))
        if len(tired) > 2:
            raise RuntimeError("no more")

    tired = []
    found = time_on_cpu([Candidate("slow", call("slow", 0.004)), Candidate("fast", call("fast", 0.001)),
                         Candidate("broken", broken)], SMALL, rounds=4)  # fmt: skip
    assert isinstance(found["broken"], RuntimeError)
    for proof in (
        None,
        SimpleNamespace(
            next_turn=int, lay=lambda turn: None, take=lambda *_: None, fault=lambda *_, **__: None, seed=0
        ),
    ):
        tired.clear()
        beside = time_on_cpu([Candidate("tires", tires), Candidate("fast", call("fast", 0.001))], SMALL, proof=proof)
        assert str(beside["tires"]) == "no more" and len(tired) == 3, "it is not asked again"
        assert beside["fast"].latency_us == 1000 and len(beside["fast"].samples_us) == 7
    del order[10:]
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
            self.at, self.timing = None, enable_timing

        def record(self, stream):
            self.at = Emulated.now_ms

        def elapsed_time(self, end):
            assert self.timing and end.timing, "CUDA keeps no time of such an event"
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


def test_calls_are_captured_and_launched_as_often_as_it_takes_and_turn_by_turn_over_the_sets(emulated, monkeypatch):
    monkeypatch.setattr(timing, "_clock", lambda: emulated.now_ms / 1e3)
    numbers = []

    def call(number):
        numbers.append(number)
        emulated.launch(lambda: setattr(emulated, "now_ms", emulated.now_ms + 0.05))
        return number

    captured = timing._capture(call, 3, emulated.Stream())
    assert (captured.estimate_us, captured.launch_us) == (pytest.approx(50), pytest.approx(50))
    assert captured.calls == 39 and len(captured.graph.nodes) == 39, "2 ms, in whole turns"
    assert captured.results == captured.kept % 3 and 0 <= captured.kept < 39
    turns = [3, 3, timing.EAGER_CALLS, 39]  # to warm up, to estimate, to be launched, and captured
    assert numbers == [number % 3 for turn in turns for number in range(turn)]
    numbers.clear()
    found = timing._eager(call, 2, emulated.Stream())
    assert found == {"eager_us": pytest.approx(50), "single_us": pytest.approx(50)}
    turns = [1, timing.EAGER_CALLS, timing.SINGLE_CALLS]
    assert numbers == [number % 2 for turn in turns for number in range(turn)]


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
    assert found["honest"].calls == 40 // sets * sets, "of 50 µs each for a sample of 2 ms, and whole turns of sets"
    assert found["one_buffer"].proved
    for name in ("cached", "rarely", "slightly_off"):
        assert isinstance(found[name], WrongWhenTimed), name
    assert "NaN" in str(found["cached"]) and "(0 NaN" in str(found["slightly_off"])
    assert isinstance(found["broken"], RuntimeError)
    without = time_on_gpu(calls[:2], problem, sets=sets, rounds=3)
    assert without["cached"].latency_us < 1 and "proved" not in without["cached"].model_dump()


@pytest.mark.slow
def test_calls_of_two_problems_share_a_round_and_each_has_its_own_proof_and_operations(emulated):
    small, large = square(1, 2, 32, 16), square(1, 2, 48, 16, lengths="right")
    masks = make_masks(large)
    buffers = {small: [make_inputs(small)], large: [make_inputs(large, masks=masks)]}

    def call(problem, change=1.0):
        def run(number):
            given = {"masks": masks} if problem is large else {}
            results = tuple(
                torch.empty_like(t) for t in backends.get("cpu").run(*buffers[problem][0], problem, **given)
            )

            def kernel():
                Emulated.now_ms += 0.05
                found = backends.get("cpu").run(*buffers[problem][0], problem, **given)
                results[0].copy_(found[0] * change)
                results[1].copy_(found[1])

            emulated.launch(kernel)
            return results

        return run

    proofs = {small: Proof(small, buffers[small]), large: Proof(large, buffers[large], masks)}
    found = time_on_gpu(
        [Candidate("a", call(small), problem=small, proof=proofs[small]),
         Candidate("b", call(large), problem=large, proof=proofs[large], flops=1000),
         Candidate("c", call(large, 1.1), problem=large, proof=proofs[large], flops=1000)], small, rounds=3,
    )  # fmt: skip
    assert found["a"].round == found["b"].round and found["a"].proved and found["b"].proved
    assert isinstance(found["c"], WrongWhenTimed), "another proof would have taken it for what it is not"
    assert found["a"].tflops == pytest.approx(small.flops() / found["a"].latency_us / 1e6, rel=1e-5)
    assert found["b"].tflops == pytest.approx(1000 / found["b"].latency_us / 1e6, rel=1e-5)
    assert found["b"].flops == 1000 and "flops" not in found["a"].model_extra


def test_a_timing_says_how_many_samples_it_has_why_and_what_the_sensors_read(emulated, monkeypatch):
    problem = square(1, 1, 16, 8)
    buffers = [make_inputs(problem)]
    monkeypatch.setattr(timing, "Watch", lambda: Watch(lambda: {"sm_clock_mhz": 1755}))
    candidate = Candidate("a", lambda number: emulated.backend(buffers[number], problem))
    found = time_on_gpu([candidate], problem, rounds=10, most_rounds=60)["a"].model_extra
    assert (found["samples"], found["stopped"]) == (10, "narrow")
    assert found["during"]["sm_clock_mhz"] == [1755, 1755, 1755] and found["during"]["readings"] >= 1
    assert not found.keys() & {"eager_us", "single_us", "cupti_us"}, "nobody asked for them"
    monkeypatch.setattr(timing, "Watch", lambda: Watch(lambda: None))
    found = time_on_gpu([candidate], problem, rounds=3)["a"].model_extra
    assert found["stopped"] == "3 rounds are the most" and found["during"]["reason"].startswith("not available")


def test_a_call_is_timed_by_other_clocks_when_all_rounds_are_over(emulated, monkeypatch):
    problem = square(1, 1, 16, 8)
    buffers = [make_inputs(problem, seed=i) for i in range(2)]
    profiled = []

    def kernel_us(calls):
        """Two kernels of 20 and 25 µs of each call; the third call's were lost."""
        profiling_now.append(True)
        for call in calls:
            call()
        profiled.append(len(calls))
        return [[] if number == 2 else [20.0, 25.0] for number in range(len(calls))]

    def fine(number):
        return emulated.backend(buffers[number], problem)

    def only_when_timed(number):
        if emulated.capturing is None and len(seen) > 40:
            raise RuntimeError("no more")
        seen.append(number)
        return fine(number)

    def patches(number):
        if emulated.capturing is None and len(patched) > 40:
            torch.backends.cuda.enable_math_sdp(False)
        patched.append(number)
        return fine(number)

    def patches_the_profile(number):
        if profiling_now:
            torch.backends.cuda.enable_math_sdp(False)
        return fine(number)

    def only_outside_the_profile(number):
        if profiling_now:
            raise RuntimeError("not here")
        return fine(number)

    seen, patched, profiling_now = [], [], []
    monkeypatch.setattr(timing.profiling, "kernel_us", kernel_us)
    calls = [Candidate(one.__name__, one) for one in (fine, only_when_timed, patches, patches_the_profile,
                                                      only_outside_the_profile)]  # fmt: skip
    monkeypatch.setattr(timing, "SAMPLE_US", 50.0)  # one call a graph
    found = time_on_gpu(calls, problem, sets=2, rounds=3, other_clocks=True)
    clocks = found["fine"].model_extra
    assert clocks["eager_us"] == pytest.approx(50) and clocks["single_us"] > 0
    assert (clocks["cupti_us"], clocks["cupti_kernels"]) == (45.0, 2)
    assert "cupti_us" not in found["only_when_timed"].model_extra, "its timing stands, and says no more than it knows"
    assert found["only_when_timed"].latency_us == pytest.approx(50, rel=0.05)
    assert isinstance(found["patches"], JudgeTampered) and isinstance(found["patches_the_profile"], JudgeTampered)
    silent = found["only_outside_the_profile"]
    assert silent.latency_us == pytest.approx(50, rel=0.05) and "cupti_us" not in silent.model_extra
    assert profiled == [3 * timing.CUPTI_CALLS], "the two others were left out"


def test_a_backend_that_spoils_the_profile_spoils_only_its_own(emulated, monkeypatch):
    """Its kernels are called as the marker is, so that a profile that holds it tells no calls apart."""
    problem = square(1, 1, 16, 8)
    buffers, ran, sessions = [make_inputs(problem)], [], []

    def backend(name):
        return Candidate(name, lambda number: (ran.append(name), emulated.backend(buffers[number], problem))[1])

    def kernel_us(calls):
        ran.clear()
        for call in calls:
            call()
        sessions.append(set(ran))
        return [[] if "spoils" in ran else [45.0] for _ in calls]

    monkeypatch.setattr(timing.profiling, "kernel_us", kernel_us)
    found = time_on_gpu([backend("fine"), backend("spoils")], problem, rounds=3, other_clocks=True)
    assert sessions == [{"fine", "spoils"}, {"fine"}, {"spoils"}]
    assert found["fine"].model_extra["cupti_us"] == 45.0 and "cupti_us" not in found["spoils"].model_extra


def test_without_a_profiler_the_other_clocks_remain_and_slow_calls_have_none(emulated, monkeypatch):
    problem = square(1, 1, 16, 8)
    buffers = [make_inputs(problem)]

    def forbidden(calls):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(timing.profiling, "kernel_us", forbidden)
    calls = [Candidate("a", lambda number: emulated.backend(buffers[number], problem))]
    found = time_on_gpu(calls, problem, rounds=3, other_clocks=True)["a"].model_extra
    assert found["eager_us"] == pytest.approx(50) and "cupti_us" not in found
    monkeypatch.setattr(timing, "MOST_CLOCKED_US", 49.0)
    found = time_on_gpu(calls, problem, rounds=3, other_clocks=True)["a"].model_extra
    assert "eager_us" not in found and found["samples"] == 3


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
def test_the_clocks_of_a_gpu_agree_and_its_sensors_are_read():
    problem = PRESETS["report"].with_(batch=4)
    inputs = make_inputs(problem, device="cuda")
    call = Candidate("sdpa-flash", lambda _: backends.get("sdpa-flash").run(*inputs, problem))
    found = time_on_gpu([call], problem, most_rounds=timing.MOST_ROUNDS, other_clocks=True)["sdpa-flash"]
    more = found.model_extra
    assert more["cupti_us"] == pytest.approx(found.latency_us, rel=0.1) and more["cupti_kernels"] >= 1
    assert 0.8 * found.latency_us < more["eager_us"] and more["single_us"] > 0.8 * found.latency_us
    assert more["samples"] == len(found.samples_us) >= 30 and more["stopped"]
    assert more["during"]["readings"] >= 1


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
