"""What keeps its bits keeps all cases, and what breaks them is found: planted breaks, crashes, refusals, limits."""

from __future__ import annotations

import itertools
import time
import types

import pytest
from support import steady_attention
from support.steady_attention import Steady

from flashcore import backends
from flashcore.errors import BackendUnavailable, InvalidProblem, UnknownName
from flashcore.gpu.build import source_hashes
from flashcore.records import Trial
from flashcore.surveys.invariance import Setting, Way, cases, compare, judging, measuring
from flashcore.surveys.invariance.ways import implementation

FEW = 100
"""Cases that find each planted break; a quick report asks three times as many."""


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A busy machine may need longer for the cases that are asked."""
    monkeypatch.setitem(measuring.LIMIT_S, "cpu", 600.0)


@pytest.fixture
def small(monkeypatch):
    """Settings that an attention of many small steps gets through."""
    size = cases.Size(8, 1 << 17, ((8, 150), (1, 400)), 40, 4, 4, 7)
    monkeypatch.setitem(cases.SIZES, "cpu", size)
    monkeypatch.setitem(measuring.SHRINK_S, "cpu", 0.1)


def test_the_backend_that_promises_it_keeps_every_case():
    trial = measuring.measure("cpu", "invariant", num_cases=60, seed=1)
    assert trial.status == "ok" and (trial.data["cases"], trial.data["broken"]) == (60, 0), trial.data["breaks"]


@pytest.mark.slow
def test_over_pages_too_every_case_is_kept(small):
    trial = measuring.measure(Steady(), "invariant", num_cases=120)
    assert trial.status == "ok" and (trial.data["cases"], trial.data["broken"]) == (120, 0), trial.data["breaks"]
    assert len(trial.data["pairs"]) == 10 and sum(count for _, count in trial.data["pairs"].values()) == 120
    assert trial.data["others"][1] > 30 and trial.data["subjects"] > 20 and trial.data["refused"] == {}
    assert (trial.kind, trial.backend, trial.variant, trial.data["promised"]) == (
        "invariance",
        "steady",
        "invariant",
        True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "pairs"),
    [
        ("TileByBatch", {"alone, batch"}), ("TileByPage", {"pages, pages"}), ("Votes", {"alone, chunks"}),
        ("VotesInGroups", {"alone, pages"}), ("SplitsByOccupancy", {"batch, pages"}),
    ],
)  # fmt: skip
def test_a_planted_break_is_found_among_the_quick_cases(small, planted, pairs):
    bad = getattr(steady_attention, planted)()
    trial = measuring.measure(bad, "invariant", num_cases=FEW, limit_s=600)
    assert FEW < measuring.CASES["quick"]["cpu"]
    assert trial.status == "failed" and trial.reason.endswith("cases are broken."), trial.data
    broken = {pair for pair, (kept, count) in trial.data["pairs"].items() if kept < count}
    assert broken >= pairs and trial.data["broken"] == trial.data["cases"] - trial.data["kept"] > 0
    assert len({found["pair"] for found in trial.data["breaks"]}) == len(trial.data["breaks"]) >= 1
    for found in trial.data["breaks"]:
        assert found["said"].startswith("broken: ") and found["line"].startswith("from flashcore.surveys.invariance")


@pytest.mark.slow
def test_the_line_of_a_break_asks_it_again(small):
    trial = measuring.measure(steady_attention.TileByBatch(), "invariant", num_cases=60)
    line = trial.data["breaks"][0]["line"].partition("print(")[2][:-1].replace("'steady'", "bad", 1)
    names = {"Setting": Setting, "Way": Way, "compare": compare}
    assert not eval(line, {**names, "bad": steady_attention.TileByBatch()})
    assert eval(line, {**names, "bad": Steady()})


@pytest.mark.parametrize(("num_cases", "settings", "subjects"), [(500, 40, 1), (10_000, 40, 16)])
def test_few_cases_come_from_many_settings_too(num_cases, settings, subjects, monkeypatch):
    """As on a GPU: 500 cases of five settings would miss chunks that hang on the batch, which need long keys."""
    asked = []

    def cases_of(one, setting, drawn, chosen, *, invariant, refused):
        asked.append((setting, drawn, len(chosen)))
        return [judging.Case(setting, n, (Way(), Way(again=1)), True) for n in chosen for _ in drawn]

    monkeypatch.setattr(judging, "cases_of", cases_of)
    count, stopped = measuring._ask(implementation("cpu"), True, "cuda", num_cases, 0, 60.0, None)
    assert (count.cases, stopped) == (num_cases, "all were asked") and count.settings == len(asked) >= settings
    assert max(chosen for _, _, chosen in asked) == subjects
    long = [s for s, drawn, _ in asked if s.lengths[0][1] > 1024 and any(way.carrier == "batch" for way in drawn)]
    assert len(long) >= 5, "batches of long sequences"


@pytest.mark.slow
def test_the_ordinary_mode_of_a_backend_is_a_finding_and_no_fault(small):
    trial = measuring.measure("cpu", "ordinary", num_cases=60)
    assert trial.status == "ok" and trial.reason is None and trial.data["cases"] == 60 and not trial.data["promised"]
    again = measuring.measure("cpu", "ordinary", num_cases=60)
    assert again.data["pairs"] == trial.data["pairs"], "the same seed asks the same"
    other = measuring.measure("cpu", "ordinary", num_cases=60, seed=1)
    assert other.data["pairs"] != trial.data["pairs"]


def test_who_promises_nothing_is_not_asked_in_the_mode(monkeypatch):
    trial = measuring.measure("sdpa-math", "invariant", num_cases=10)
    assert trial.status == "unsupported" and "does not promise" in trial.reason and "cases" not in trial.data


def test_one_that_raises_is_told_and_ends():
    class Raises(Steady):
        id = "raises"

        def run(self, q, k, v, problem, masks=None):
            raise RuntimeError("no such\nluck")

    trial = measuring.measure(Raises(), "invariant", num_cases=10)
    assert trial.status == "error" and "RuntimeError: no such luck" in trial.reason and "Setting(" in trial.reason
    assert trial.data["errors"] == measuring.MOST_ERRORS and trial.data["stopped"] == "its calls raise"


@pytest.mark.slow
def test_the_time_is_kept_to(small, monkeypatch):
    """By a clock that goes on by a tenth of a second whenever it is looked at."""
    looks = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: next(looks) / 10, perf_counter=time.perf_counter)
    monkeypatch.setattr(measuring, "time", clock)

    class Slow(Steady):
        id = "slow"

        def run(self, q, k, v, problem, masks=None):
            return backends.get("cpu").run(q, k, v, problem.with_(batch_invariant=False), masks)

        run_paged = None
        paged = False

    trial = measuring.measure(Slow(), "ordinary", num_cases=10_000, limit_s=0.3)
    assert 0 < trial.data["cases"] < 10_000 and trial.data["stopped"] == "the time ran out" and trial.status == "ok"


def test_a_promise_that_nobody_had_time_to_look_at_is_not_kept():
    for mode, status in (("invariant", "error"), ("ordinary", "unsupported")):
        trial = measuring.measure("cpu", mode, num_cases=5, limit_s=1e-9)
        assert (trial.status, trial.reason) == (status, "The time ran out before a case was asked.")


def test_what_is_not_here_is_said():
    if backends.get("hopper").availability().ok:
        pytest.skip("this machine has the GPU")
    trial = measuring.measure("hopper", "ordinary", num_cases=5)
    assert trial.status == "unavailable" and trial.reason.startswith("hopper: ")
    assert trial.data["over_pages"] == ["hopper-paged", "decode"]
    assert set(trial.data["sources"]) == {"attention_hopper", "attention_decode"}
    assert {trial.source_hash, *trial.data["sources"].values()} <= set(source_hashes().values())
    with pytest.raises(BackendUnavailable):
        measuring.measure_all(["cpu", "hopper"], num_cases=5)


def test_a_question_without_sense_is_refused():
    with pytest.raises(UnknownName, match="There is no mode 'invarint'.*Did you mean 'invariant'"):
        measuring.measure("cpu", "invarint", num_cases=5)
    with pytest.raises(InvalidProblem, match="cases is 0"):
        measuring.measure("cpu", "ordinary", num_cases=0)
    with pytest.raises(UnknownName):
        measuring.measure_all(["nobody"], num_cases=5)


def test_peers_are_asked_in_their_ordinary_mode_alone():
    assert measuring.plan(["cpu", "sdpa-math"], measuring.MODES) == [
        ("cpu", "invariant"), ("cpu", "ordinary"), ("sdpa-math", "ordinary"),
    ]  # fmt: skip
    assert measuring.plan(["sdpa-math"], ["invariant"]) == [("sdpa-math", "invariant")]
    assert set(measuring.asked_by_default()) >= {"cpu", "sdpa-math"}
    assert not {"reference", "decode", "hopper-paged", "hopper-unsplit"} & set(measuring.asked_by_default())


def test_tasks_yield_a_record_each_and_say_what_is_owed(small, monkeypatch):
    monkeypatch.setattr(measuring, "CASES", {"quick": {"cpu": 20}})
    found = measuring.tasks(["sdpa-math"], "quick", seed=4)
    assert [task.name for task in found] == ["the bits of sdpa-math, ordinary mode"]
    (trial,) = found[0].trials()
    assert trial.data["cases"] == 20 and trial.data["seed"] == 4
    (owed,) = found[0].failed("it died")
    assert (owed.kind, owed.backend, owed.variant, owed.status) == ("invariance", "sdpa-math", "ordinary", "error")


def test_each_record_is_told_as_it_comes(small):
    heard: list[Trial] = []
    found = measuring.measure_all(["sdpa-math"], num_cases=12, told=heard.append)
    assert heard == found and found[0].data["cases"] == 12
