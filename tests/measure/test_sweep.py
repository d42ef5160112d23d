"""The sweep: every backend and problem leaves a record, wrong ones have no speed, and everything is on disk at once."""

import pytest
import torch

from flashcore import backends
from flashcore.backends import Availability, Backend
from flashcore.backends.cpu import CpuBackend
from flashcore.decision import compare
from flashcore.decision.claims import Gpu
from flashcore.errors import ClaimsError, InvalidProblem, UnknownName, Unsupported
from flashcore.measure import check, sweep, workloads
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.problem import PRESETS, square
from flashcore.records import Timing

PROBLEM = square(1, 1, 32, 16, dtype="float32")


class Wrong(CpuBackend):
    id = "wrong"

    def scores(self, q, k, problem, page):
        return 2 * super().scores(q, k, problem, page)


class Raises(CpuBackend):
    id = "raises"

    def run(self, q, k, v, problem):
        raise RuntimeError("the kernel fell over")


class Gone(CpuBackend):
    id = "gone"

    def availability(self):
        return Availability(False, "it is not installed", "install it")


class Picky(CpuBackend):
    id = "picky"

    def why_not(self, problem):
        return "head_dim has to be 64"


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(sweep.device, "has_gpu", lambda: False)


def test_every_backend_leaves_a_record_and_only_right_ones_have_a_speed(run):
    chosen: list[Backend] = [CpuBackend(), Wrong(), Raises(), Gone(), Picky()]
    trials = sweep.sweep(run, [PROBLEM], chosen)
    timing = {t.backend: t for t in trials if t.kind == "attention_timing"}
    checked = {t.backend: t for t in trials if t.kind == "correctness"}
    assert timing["cpu"].status == "ok" and timing["cpu"].timing.tflops > 0 and checked["cpu"].status == "ok"
    assert timing["wrong"].status == "failed" and "its result is wrong" in timing["wrong"].reason
    assert checked["raises"].status == "error" and "fell over" in checked["raises"].reason and "raises" not in timing
    assert timing["gone"].status == "unavailable" and "install it" in timing["gone"].reason
    assert timing["picky"].status == "unsupported" and "64" in timing["picky"].reason
    assert [t.model_dump_json() for t in run.trials()] == [
        t.model_copy(update={"environment": None}).model_dump_json() for t in trials
    ]


def test_a_backend_that_is_right_in_its_check_and_wrong_when_timed_has_a_failed_check_and_no_speed(run):
    class Patient(CpuBackend):
        id, calls = "patient", 0

        def run(self, q, k, v, problem):
            type(self).calls += 1
            return super().run(q, k, v * (1 if self.calls < 5 else 2), problem)

    trials = sweep.sweep(run, [PROBLEM], [CpuBackend(), Patient()])
    mine = [t for t in trials if t.backend == "patient"]
    assert [(t.kind, t.status) for t in mine] == [
        ("correctness", "ok"), ("correctness", "failed"), ("attention_timing", "failed"),
    ]  # fmt: skip
    late, timed = mine[1:]
    assert late.data == {"role": "ours", "timed": True} and late.correctness.num_bad > 0
    assert "in timed call 3 of 7" in late.reason and late.reason in timed.reason and timed.timing is not None
    assert all(t.status == "ok" for t in trials if t.backend == "cpu")


def test_where_it_measures_can_be_said(run, monkeypatch):
    monkeypatch.setattr(sweep.device, "has_gpu", lambda: pytest.fail("it was said"))
    trials = sweep.sweep(run, [PROBLEM], [backends.get("sdpa-math")], gpu=False)
    assert [t.status for t in trials] == ["ok", "ok"] and trials[1].timing.method == "host"


def test_a_sweep_that_dies_keeps_what_it_had(run):
    class Dies(CpuBackend):
        id = "dies"

        def run(self, q, k, v, problem):
            if problem.causal:
                raise KeyboardInterrupt
            return super().run(q, k, v, problem)

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(run, [PROBLEM, PROBLEM.with_(causal=True)], [Dies()])
    assert [(t.kind, t.status) for t in run.trials()] == [("correctness", "ok"), ("attention_timing", "ok")]


def test_the_reference_is_not_timed_and_an_unswept_backend_only_at_the_reports_workload(run, monkeypatch):
    class Rare(CpuBackend):
        id = "rare"
        swept = False

    trials = sweep.sweep(run, [PROBLEM], [backends.get("reference"), Rare()])
    assert trials == []
    monkeypatch.setattr(sweep, "REPORT_PROBLEMS", (PROBLEM,))
    assert {t.backend for t in sweep.sweep(run, [PROBLEM], [Rare()])} == {"rare"}


def test_problems_of_a_profile_hold_the_reports_workload_and_grow_with_full():
    quick, full = sweep.sweep_problems("quick", True), sweep.sweep_problems("full", True)
    assert PRESETS["report"] in quick and PRESETS["latency"] in quick and set(quick) < set(full)
    assert len(set(full)) == len(full)
    assert {p.head_dim for p in full} == {64, 128} and {p.causal for p in full} == {True, False}
    assert all(p.flops() < 2e9 for p in sweep.sweep_problems("full", False)), "a CPU's problems stay small"


def test_a_sweep_has_the_shapes_that_people_have():
    quick, full = sweep.sweep_problems("quick", True), sweep.sweep_problems("full", True)
    assert {197, 777, 3000} <= {p.seqlen_q for p in full} and 197 in {p.seqlen_q for p in quick}
    for problems in (quick, full):
        assert any((p.num_heads_q, p.num_heads_kv) == (32, 8) for p in problems)
        assert any(p == PRESETS["report"].with_(dtype="bfloat16") for p in problems)
    assert all(square(32, 12, 197, d) in full for d in (64, 128))
    assert sum(p.flops() for p in sweep.AWKWARD_PROBLEMS) < 0.5 * sum(p.flops() for p in full), "a report stays short"


class Peer(CpuBackend):
    id, role = "peer", "peer"

    def software(self):
        return "somebody's 1.2"


def test_the_version_of_a_peers_software_stands_in_its_timing(run):
    trials = sweep.sweep(run, [PROBLEM], [CpuBackend(), Peer()])
    timed = {t.backend: t.data for t in trials if t.kind == "attention_timing"}
    assert timed == {"cpu": {}, "peer": {"version": "somebody's 1.2"}}


SHEET = Gpu(id="a", names=("A",), peak_tflops={"float16": 1000.0}, peak_clock_ghz=2.0, boost_ghz=2.0, sm_count=1,
            memory_tb_s=4.0, l2_mb=50, launch_us=1.0, source="made up")  # fmt: skip


def test_shares_of_what_the_gpu_can_do_at_the_clock_that_was_seen():
    problem = PRESETS["report"]
    fields = {"method": "graph_replay", "latency_us": 500.0, "tflops": problem.flops() / 500 / 1e6, "l2": "rotating"}
    during = {"sm_clock_mhz": [900, 1500, 2000], "readings": 9}
    found = sweep.speed_of_light(Timing(**fields, during=during), problem, SHEET)
    assert found["peak_share"] == pytest.approx(549.8 / 750, rel=1e-3), "1000 TFLOPS at 2 GHz are 750 at 1.5"
    assert found["memory_share"] == pytest.approx(problem.bytes() / 500e-6 / 4e12, rel=1e-3)
    warm = sweep.speed_of_light(Timing(**fields | {"l2": "warm"}, during=during), problem, SHEET)
    assert warm.keys() == {"peak_share"}, "what stays in the cache is not read from memory"
    for more in ({}, {"during": {"readings": 0, "reason": "not available"}}):
        assert sweep.speed_of_light(Timing(**fields, **more), problem, SHEET).keys() == {"memory_share"}
    assert sweep.speed_of_light(Timing(**fields, during=during), problem, None) == {}
    single = problem.with_(dtype="float32")
    assert "peak_share" not in sweep.speed_of_light(Timing(**fields, during=during), single, SHEET)


@pytest.mark.parametrize(
    ("name", "sheet"), [("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H200", "H200"), (None, None)]
)
def test_the_data_sheet_is_that_of_the_gpu_here(monkeypatch, name, sheet):
    monkeypatch.setattr(sweep.device, "gpu_name", lambda: name)
    sweep._data_sheet.cache_clear()
    found = sweep._data_sheet()
    sweep._data_sheet.cache_clear()
    assert (found and found.id) == sheet


def test_a_file_of_claims_that_cannot_be_read_costs_no_timing(monkeypatch):
    def damaged():
        raise ClaimsError("claims.toml", 3, "is damaged")

    monkeypatch.setattr(sweep.claims, "load_claims", damaged)
    sweep._data_sheet.cache_clear()
    assert sweep._data_sheet() is None
    sweep._data_sheet.cache_clear()


def test_what_gates_ask_for_is_timed_by_other_clocks_too(monkeypatch):
    """On a GPU, emulated: what the sweep asks of the timing, and what it adds to its result."""
    asked = []

    def time_on_gpu(chosen, problem, **options):
        asked.append(options | {"proved": [candidate.proof for candidate in chosen]})
        return {"cpu": Timing(method="graph_replay", latency_us=10.0, tflops=1.0, l2=options["l2"])}

    monkeypatch.setattr(sweep, "time_on_gpu", time_on_gpu)
    monkeypatch.setattr(sweep, "make_inputs", lambda problem, seed, device: make_inputs(problem, seed=seed))
    monkeypatch.setattr(sweep.device, "l2_bytes", lambda: 0)
    monkeypatch.setattr(sweep, "_data_sheet", lambda: SHEET)
    monkeypatch.setattr(sweep, "REPORT_PROBLEMS", (PROBLEM,))
    other = PROBLEM.with_(dtype="float16")
    for problem in (PROBLEM, other):
        (timing,) = sweep._time([(CpuBackend(), problem)], 0, True)
        assert timing.model_extra["clocks_before"].keys() and timing.model_extra["memory_share"] > 0
    assert [o["other_clocks"] for o in asked] == [True, False]
    assert {o["most_rounds"] for o in asked} == {100} and all(None not in o["proved"] for o in asked)


def test_problems_by_name():
    assert sweep.named_problems("report; B=1,H=2,S=64,D=64", "quick", False) == [
        PRESETS["report"],
        square(1, 2, 64, 64),
    ]
    assert sweep.named_problems("default", "quick", False) == sweep.sweep_problems("quick", False)
    with pytest.raises(UnknownName):
        sweep.named_problems("nonsense", "quick", False)
    with pytest.raises(InvalidProblem):
        sweep.named_problems("B=0,H=1,S=1,D=64", "quick", False)


@pytest.mark.gpu
def test_backends_of_one_problem_share_a_round_on_a_gpu(run, monkeypatch):
    monkeypatch.setattr(sweep.device, "has_gpu", lambda: True)
    trials = sweep.sweep(run, [PRESETS["latency"]], backends.select("wmma,sdpa-flash"))
    timed = [t for t in trials if t.kind == "attention_timing" and t.status == "ok"]
    assert len(timed) == 2 and len({t.timing.round for t in timed}) == 1
    assert all(t.timing.method == "graph_replay" and t.timing.l2 == "warm" for t in timed)
    torch.cuda.synchronize()


def test_masked_problems_are_timed_and_proved_and_lengths_count_what_is_real(run):
    window = PROBLEM.with_(causal=True, window_left=8, softcap=20.0, sink=True)
    trials = sweep.sweep(run, [window, PROBLEM.with_(lengths="ragged")], [CpuBackend()])
    timings = [trial for trial in trials if trial.kind == "attention_timing"]
    assert [t.status for t in trials] == ["ok"] * 4 and all(t.timing.model_extra["proved"] for t in timings)
    assert timings[0].timing.tflops > 0 and "flops" not in timings[0].timing.model_extra
    masks = make_masks(PROBLEM.with_(lengths="ragged"))
    lengths = [tensor.diff().tolist() for _, tensor in masks.named()]
    ragged = timings[1]
    assert ragged.timing.model_extra["flops"] == PROBLEM.flops_of(*lengths) <= PROBLEM.flops()
    assert ragged.timing.tflops == pytest.approx(compare.tflops(ragged), rel=1e-5) and compare.tflops(ragged) > 0
    assert compare.contradiction(ragged) is None and ragged.data["lengths"] == "mixed"
    assert all(compare.passed(t) for t in trials if t.kind == "correctness")
    assert sweep.speed_of_light(ragged.timing.model_copy(update={"l2": "rotating"}), ragged.problem, SHEET) == {}


class Refuses(CpuBackend):
    id = "refuses"

    def run(self, q, k, v, problem, masks=None):
        raise Unsupported(self.id, "the package says: no kernels")


def test_problems_held_against_each_other_share_a_round_and_equal_lengths_do_the_work_of_a_dense_batch(
    run, monkeypatch
):
    dense = square(2, 2, 24, 16, dtype="float32", causal=True)
    ragged = dense.with_(lengths="ragged")
    one = workloads.Workload("a", ragged, lengths="equal", beside=dense, beside_words="b")
    monkeypatch.setattr(workloads, "WORKLOADS", (one,))
    monkeypatch.setattr(sweep, "MASKED_ALONE", frozenset({ragged}))
    lines = []
    trials = sweep.sweep(
        run, [dense, PROBLEM, ragged], [CpuBackend(), Refuses(), backends.get("sdpa-math"), backends.get("scalar")],
        gpu=False, progress=lines.append,
    )  # fmt: skip
    timed = {(t.backend, t.problem): t for t in trials if t.kind == "attention_timing" and t.problem is not None}
    mine, beside = timed["cpu", ragged], timed["cpu", dense]
    assert mine.timing.round == beside.timing.round != timed["cpu", PROBLEM].timing.round
    assert compare.flops(mine) == compare.flops(beside) == dense.flops() and mine.data == {"lengths": "equal"}
    found = compare.speed_beside(mine, beside)
    assert found.value == pytest.approx(beside.timing.latency_us / mine.timing.latency_us) and found.n == 7
    assert [line.split(":")[0] for line in lines] == ["1 to 2 of 3", "3 of 3"] and "and 1 beside it" in lines[0]
    assert timed["sdpa-math", dense].status == "ok", "the dense batch is one of the ordinary problems"
    refused = [timed["refuses", problem] for problem in (dense, ragged)]
    assert {(t.status, t.reason) for t in refused} == {("unsupported", "the package says: no kernels")}
    kept = [t.data["lengths"] for t in trials if t.kind == "correctness" and t.problem == ragged and t.status == "ok"]
    assert kept == ["equal"]


def test_backends_without_masks_and_those_that_store_scores_are_left_out_of_problems_with_masks(run, monkeypatch):
    window = PROBLEM.with_(causal=True, window_left=8)
    monkeypatch.setattr(sweep, "MASKED_ALONE", frozenset({window}))

    class Plain(CpuBackend):
        id, masks = "plain", ()

    trials = sweep.sweep(run, [window], [backends.get("sdpa-math"), Plain()], gpu=False)
    assert [(t.backend, t.status, t.kind) for t in trials] == [("sdpa-math", "unsupported", "attention_timing")]
    assert "stores all scores" in trials[0].reason


def test_the_problems_with_masks_have_a_name_and_are_part_of_the_profile():
    for profile in ("quick", "full"):
        named = sweep.named_problems("masked", profile, True)
        assert named and set(named) <= set(sweep.sweep_problems(profile, True))
    assert not any(p.masks for p in sweep.sweep_problems("full", False)), "a CPU's speed at them interests nobody"


def test_what_the_mode_costs_is_timed_in_one_round_of_who_promises_it_and_peers(run, monkeypatch):
    plain, asked = PROBLEM, PROBLEM.with_(batch_invariant=True)
    monkeypatch.setattr(sweep, "COSTED_ALONE", frozenset({plain, asked}))

    class Plain(CpuBackend):
        id, batch_invariant = "plain", False

    class Rival(Peer):
        id, batch_invariant = "rival", False

    check.make_case.cache_clear()
    chosen = [CpuBackend(), Plain(), Rival(), backends.get("sdpa-math")]
    trials = sweep.sweep(run, [plain, asked], chosen, gpu=False)
    assert check.make_case.cache_info().misses == 1, "float64 is worked out once for both"
    timed = {(t.backend, t.problem): t for t in trials if t.kind == "attention_timing"}
    assert set(timed) == {("cpu", plain), ("cpu", asked), ("rival", plain), ("sdpa-math", plain)}
    assert timed["sdpa-math", plain].status == "unsupported" and "stores all" in timed["sdpa-math", plain].reason
    right = [timed["cpu", plain], timed["cpu", asked], timed["rival", plain]]
    assert len({t.timing.round for t in right}) == 1 and all(t.timing.model_extra["proved"] for t in right)
    checked = {(t.backend, t.problem) for t in trials if t.kind == "correctness" and compare.passed(t)}
    assert checked == {("cpu", plain), ("cpu", asked), ("rival", plain)}
    assert compare.ratio(right[1], right[0]) is None and compare.ratio(right[1], right[2]) is None
    assert compare.speed_beside(right[1], right[0]).n == 7
    kept = {t.problem.batch_invariant for t in run.trials() if t.backend == "cpu"}
    assert kept == {True, False}, "a record on disk says which it was"


def test_a_profile_asks_what_the_mode_costs_on_a_gpu_alone():
    for profile, number in (("quick", 1), ("full", 10)):
        asked = [p for p in sweep.sweep_problems(profile, True) if p.batch_invariant]
        assert len(asked) == number and {p.with_(batch_invariant=False) for p in asked} <= {
            *sweep.sweep_problems(profile, True)
        }
        assert not any(p.batch_invariant for p in sweep.sweep_problems(profile, False)), "there it is for tests"
        assert not any(p.batch_invariant for p in sweep.named_problems("masked", profile, True))


@pytest.mark.gpu
def test_a_ragged_batch_shares_its_round_with_the_dense_one_on_a_gpu(run, monkeypatch):
    monkeypatch.setattr(sweep.device, "has_gpu", lambda: True)
    dense = square(3, 4, 512, 64, dtype="bfloat16", causal=True)
    ragged = dense.with_(lengths="ragged")
    one = workloads.Workload("a", ragged, lengths="equal", beside=dense, beside_words="b")
    monkeypatch.setattr(workloads, "WORKLOADS", (one,))
    trials = sweep.sweep(run, [dense, ragged], backends.select("hopper,fa3,fa4"))
    timed = [t for t in trials if t.kind == "attention_timing" and t.status == "ok"]
    assert len({t.timing.round for t in timed}) == 1 and {dense, ragged} == {t.problem for t in timed}
    assert all(t.timing.proved and compare.flops(t) == dense.flops() for t in timed)
    assert not [t.reason for t in trials if t.status in ("failed", "error")]


def test_a_call_that_did_not_survive_elsewhere_is_not_made_here_and_costs_one_row(run, monkeypatch):
    class Deadly(CpuBackend):
        id, foreign, role = "deadly", True, "peer"

        def run(self, q, k, v, problem):
            assert problem != PROBLEM, "it was called all the same"
            return super().run(q, k, v, problem)

    other, asked = PROBLEM.with_(causal=True), []

    def screen(wanted, **more):
        asked.extend(wanted)
        return {("deadly", PROBLEM): "it did not survive"}

    monkeypatch.setattr(sweep.device, "has_gpu", lambda: True)
    monkeypatch.setattr(sweep, "screen", screen)
    monkeypatch.setattr(sweep, "_time", lambda candidates, seed, gpu: [ValueError("no clock")] * len(candidates))
    deadly = Deadly()
    trials = sweep.sweep(run, [PROBLEM, other], [deadly, CpuBackend()])
    assert [(backend.id, problem) for backend, problem in asked] == [("deadly", PROBLEM), ("deadly", other)]
    died = [t for t in trials if t.backend == "deadly" and t.problem == PROBLEM]
    assert [(t.kind, t.status, t.reason) for t in died] == [("attention_timing", "error", "it did not survive")]
    assert [t.status for t in trials if t.backend == "deadly" and t.kind == "correctness"] == ["ok"]


def test_a_peer_that_takes_all_the_time_is_asked_no_further(run, monkeypatch):
    class Slow(CpuBackend):
        id, foreign, role = "slow", True, "peer"

    monkeypatch.setattr(sweep, "FOREIGN_S", 0.0)
    trials = sweep.sweep(run, [PROBLEM, PROBLEM.with_(causal=True)], [Slow()])
    assert [(t.kind, t.status) for t in trials] == [
        ("correctness", "ok"), ("attention_timing", "ok"), ("attention_timing", "unavailable")]  # fmt: skip
    assert "asked at no further problem" in trials[2].reason
