"""Timings of two runs, row by row: what may be compared, on which basis, and why not."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from support import synthetic_records as synthetic
from support.synthetic_history import OURS_US, PEER_US, REPORT, at_report, one, retimed, snapshot, timing, words

from flashcore.page import history
from flashcore.page.history import timings
from flashcore.page.history.runs import Snapshot
from flashcore.problem import square


def test_another_clock_is_no_change_relative_to_a_peer():
    found = history.compare_runs(snapshot("before"), snapshot(clock=1.1))
    row = at_report(found)
    assert (row.word, row.basis, row.peer) == ("same", "relative", "sdpa-cudnn")
    assert row.absolute_percent == pytest.approx(10, abs=0.1)
    assert row.before_ratio == pytest.approx(PEER_US / OURS_US) and row.samples == (30, 30)


def test_a_drift_common_to_both_cancels_pair_by_pair():
    """The clock falls by a fifth in the middle of the round: each latency has two modes, their ratio has one."""

    def bimodal(run):
        trials = []
        for trial in run.trials:
            t = trial.timing
            taken = [us * (1.0 if i < 15 else 1.2) for i, us in enumerate(t.samples_us)]
            trials.append(trial.model_copy(update={"timing": t.model_copy(update={"samples_us": taken})}))
        return Snapshot(run.name, tuple(trials), run.environment)

    assert words(bimodal(snapshot("before")), bimodal(snapshot(faster=1.06)))["faster"] == 12


def test_the_drift_of_unchanged_peers_widens_every_interval():
    def restless(name, **more):
        """sdpa-flash moves by up to 6 % from run to run, whatever its samples say."""
        run, rng = snapshot(name, **more), random.Random(name)
        trials = []
        for trial in run.trials:
            factor = rng.choice([0.97, 1.03]) if trial.backend == "sdpa-flash" else 1.0
            t = trial.timing
            taken = {"samples_us": [us * factor for us in t.samples_us], "latency_us": t.latency_us * factor}
            trials.append(trial.model_copy(update={"timing": t.model_copy(update=taken)}))
        return Snapshot(run.name, tuple(trials), run.environment)

    calm = history.compare_runs(snapshot("before"), snapshot(faster=1.05))
    moved = history.compare_runs(restless("before"), restless("now", faster=1.05))
    assert calm.drift_percent["relative"] < 1.0 and moved.drift_percent["relative"] > 4.0
    assert at_report(calm).word == "faster" and at_report(moved).word == "too noisy to say"


def test_the_same_runs_give_the_same_figures_in_any_company():
    before, now = snapshot("before"), snapshot(faster=1.02)
    whole = history.compare_runs(before, now)
    assert whole.as_dict() == history.compare_runs(before, now).as_dict()
    few = tuple(t for t in now.trials if t.problem == REPORT)
    alone = timings.rows(timings.Pair(before, Snapshot("now", few, now.environment)))[0]
    row = next(r for r in alone.values() if r.backend == "wmma")
    assert row.percent == at_report(whole).percent


def test_without_a_peer_latencies_are_compared_and_it_says_so():
    found = history.compare_runs(snapshot("before", peers=False), snapshot(faster=0.9, peers=False))
    row = at_report(found)
    assert (row.word, row.basis, row.peer, row.regression) == ("slower", "absolute", None, True)
    assert "no peer" in row.note and any("absolute latency" in limit for limit in found.limits)


def test_a_peer_with_other_software_is_no_measure():
    changed = synthetic.environment()["before"] | {"torch": "3.0.0"}
    found = history.compare_runs(snapshot("before"), snapshot(before=changed))
    assert at_report(found).basis == "absolute" and "torch 2.13.0 → 3.0.0" in at_report(found).note
    assert "torch was 2.13.0 and is 3.0.0." in [d.sentence for d in found.differences]


@pytest.mark.parametrize(
    ("now", "word", "said"),
    [
        (one(samples=0), "too noisy to say", "usable samples"),
        (one(samples=6), "too noisy to say", "7 each are needed"),
        (retimed(latency_us=math.nan), "not compared", "no usable latency"),
        (retimed(samples_us=[math.nan] * 30), "too noisy to say", "usable samples"),
        (retimed(l2="warm"), "not compared", "timed in another way"),
        (retimed(method="host"), "not compared", "host"),
        (one(status="failed", reason="17 elements are wrong"), "not compared", "wrong now (17 elements"),
        (one(status="error", reason="it crashed\nat line 3"), "not compared", "not finished now (it crashed)"),
        (one(environment="another"), "not compared", "another machine"),
    ],
)
def test_what_cannot_be_compared_says_why(now, word, said):
    row = at_report(history.compare_runs(snapshot("before"), now))
    assert row.word == word and said in row.note and not row.regression


def test_a_ratio_that_moved_while_the_call_did_not_is_marked():
    before, now = snapshot("before"), snapshot()
    quick = [t.model_copy(update={"timing": t.timing.model_copy(update={
        "samples_us": [s / 1.2 for s in t.timing.samples_us], "latency_us": t.timing.latency_us / 1.2})})
        if t.backend == "sdpa-cudnn" and t.problem == REPORT else t for t in now.trials]  # fmt: skip
    row = at_report(history.compare_runs(before, Snapshot("now", tuple(quick), now.environment)))
    assert row.word == "slower" and "may be the peer" in row.note


# --- parts -----------------------------------------------------------------------------------------------------------


def pair(before=None, now=None) -> timings.Pair:
    return timings.Pair(before or snapshot("before"), now or snapshot("now"))


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ({}, {}, True), ({}, {"gpu": "SYNTHETIC H100"}, False), ({}, {"gpu": None}, False),
        ({"gpu": None}, {"gpu": None}, True), ({"gpu": None, "before": {}}, {"gpu": None, "before": {}}, False),
    ],
)  # fmt: skip
def test_machines_are_alike_when_both_say_the_same_name(before, now, same):
    runs = [Snapshot(name, (), synthetic.environment(**{"gpu": "SYNTHETIC H200", **e}))
            for name, e in (("a", before), ("b", now))]  # fmt: skip
    assert timings.Pair(*runs).same_machine is same


def test_software_that_only_one_run_names_has_not_changed():
    known = synthetic.environment()["before"]
    fewer, other = {**known, "torch": None}, {**known, "torch": "9.9", "cudnn": "1"}
    assert pair(now=snapshot(before=fewer)).peer_software == []
    assert pair(now=snapshot(before=other)).peer_software == ["torch 2.13.0 → 9.9"]


def test_of_several_timings_the_last_counts_and_the_reference_none():
    first, last = one().trials[0], retimed(latency_us=1.0).trials[0]
    reference = first.model_copy(update={"backend": "reference"})
    found = timings.timed([first, reference, synthetic.correctness("wmma", REPORT), last])
    assert list(found.values()) == [last]
    assert len(timings.timed([first, first.model_copy(update={"variant": "v2"})])) == 2


def test_the_key_of_a_problem_is_its_mathematics():
    problem = square(2, 4, 128, 64)
    assert timings.problem_key(problem) == timings.problem_key(square(2, 4, 128, 64, page_size=16, softmax_scale=0.125))
    assert timings.problem_key(problem) != timings.problem_key(square(2, 4, 128, 64, softmax_scale=0.25))
    assert timings.problem_key(problem) != timings.problem_key(square(2, 4, 128, 64, causal=True))


def test_rows_of_one_problem_keep_the_drift_of_all():
    both = pair(now=snapshot("now", faster=1.02))
    every, drifts = timings.rows(both)
    some, same_drifts = timings.rows(both, problem=REPORT)
    assert drifts == same_drifts and len(every) == 3 * len(some) * 4 and len(some) == 3
    assert all(every[key] == row for key, row in some.items())


def test_what_was_not_there_in_either_run_has_no_row():
    gone = [t.model_copy(update={"status": "unavailable", "reason": "no GPU"}) for t in one().trials]
    assert timings.rows(pair(snapshot("a", trials=gone), snapshot("b", trials=gone)))[0] == {}
    (row,) = timings.rows(pair(one(), snapshot("b", trials=gone)))[0].values()
    assert row.word == "not compared" and "unavailable now (no GPU)" in row.note


def test_two_backends_can_be_held_against_each_other_under_one_name():
    then = timing("scalar", 2 * OURS_US, 0.005, seed="then")
    found = timings.judge(pair(one(), one()), then, one().trials[0], backend="best of ours")
    row = found.with_drift(0.0)
    assert row.backend == "best of ours" and row.word == "faster" and row.percent == pytest.approx(100, abs=3)
    assert row.absolute_percent == pytest.approx(100) and row.as_dict()["regression"] is False


def test_only_a_slowdown_of_ours_beyond_what_matters_on_one_machine_is_a_regression():
    row = at_report(history.compare_runs(snapshot("before"), snapshot(faster=0.9)))
    assert row.regression and row.judged
    for changes in ({"percent": -2.9}, {"role": "peer"}, {"same_machine": False}, {"word": "too noisy to say"}):
        assert not replace(row, **changes).regression, changes
    assert not replace(row, word="not compared").judged


@pytest.mark.parametrize(
    ("before", "now", "common"), [("1.0", "1.0", True), ("1.0", "1.1", False), (None, "1.1", True)]
)
def test_a_peer_of_another_version_is_no_common_measure(before, now, common):
    like = synthetic.timing("fa4", REPORT, 100.0, round_="r")
    first, second = (like.model_copy(update={"data": {"version": v} if v else {}}) for v in (before, now))
    assert timings._same_version(first, second) is common
