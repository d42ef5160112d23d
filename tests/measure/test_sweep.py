"""The sweep: every backend and problem leaves a record, wrong ones have no speed, and everything is on disk at once."""

import pytest
import torch

from flashcore import backends
from flashcore.backends import Availability, Backend
from flashcore.backends.cpu import CpuBackend
from flashcore.errors import InvalidProblem, UnknownName
from flashcore.measure import sweep
from flashcore.problem import PRESETS, square

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
