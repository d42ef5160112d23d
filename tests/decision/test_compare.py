"""Which trials may be compared, and by how much."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from support import synthetic_records as synthetic

from flashcore.decision import compare
from flashcore.problem import PRESETS, square
from flashcore.records import Correctness, Timing, Trial

REPORT = PRESETS["report"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(131.26, "131"), (4.4, "4.40"), (0.2814, "0.281"), (25811.2, "25,811"), (0, "0"), (-59.06, "−59.1"),
     (2.1e-5, "2.10e-05"), (math.nan, "not known"), (None, "not known")],
)  # fmt: skip
def test_sensible_digits(value, text):
    assert compare.number(value) == text


# --- roles and problems --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "data", "role"),
    [
        ("wmma", {}, "ours"), ("cpu", {}, "ours"), (None, {}, "ours"), ("sdpa-cudnn", {}, "peer"), ("fa3", {}, "peer"),
        ("plug-in", {"role": "peer"}, "peer"), ("reference", {"role": "peer"}, "reference"),
    ],
)  # fmt: skip
def test_whose_backend_a_trial_measured(backend, data, role):
    assert compare.role(Trial(kind="attention_timing", backend=backend, data=data)) == role


def test_problems_are_the_same_when_their_mathematics_is():
    problem = square(2, 4, 128, 64)
    assert compare.same_problem(problem, square(2, 4, 128, 64, page_size=32))
    assert compare.same_problem(problem, square(2, 4, 128, 64, softmax_scale=1 / 8))  # what None stands for
    assert not compare.same_problem(problem, square(2, 4, 128, 64, softmax_scale=0.2))
    assert not compare.same_problem(problem, square(2, 4, 128, 64, causal=True))
    in_the_mode = problem.with_(batch_invariant=True)
    assert not compare.same_problem(problem, in_the_mode), "other bits come out, at another cost"
    trials = [Trial(kind="attention_timing", backend="wmma", problem=p) for p in (problem, in_the_mode, None)]
    assert [compare.in_ordinary_mode(trial) for trial in trials] == [True, False, True]
    assert not compare.same_problem(problem, None) and compare.same_problem(None, None)


def test_a_variant_for_checks_is_ours_and_contends_for_nothing():
    for name, contends in (("hopper", True), ("hopper-unsplit", False), ("sdpa-cudnn", False), ("reference", False)):
        assert compare.contends(Trial(kind="attention_timing", backend=name)) == contends
    from flashcore import backends

    variants = {b.id for b in backends.all_backends() if type(b).__mro__[1].__name__ == "Hopper"}
    assert variants == compare.FOR_CHECKS


# --- figures of one timing -----------------------------------------------------------------------------------------


def timed(us=100.0, samples=None, *, backend="wmma", round_="r", **changes) -> Trial:
    """A SYNTHETIC timing with these samples."""
    trial = synthetic.timing(backend, REPORT, 100.0, round_=round_)
    timing = {"latency_us": us, "samples_us": [us] * 9 if samples is None else samples, **changes}
    return trial.model_copy(update={"timing": trial.timing.model_copy(update=timing)})


@pytest.mark.parametrize(("us", "known"), [(1e-3, True), (9e-4, False), (1e12, True), (2e12, False), (math.nan, False),
                                           (math.inf, False), (0.0, False), (-5.0, False)])  # fmt: skip
def test_a_latency_that_no_clock_could_have_told_is_none(us, known):
    assert compare.latency_us(timed(us)) == (us if known else None)
    assert (compare.tflops(timed(us)) is not None) == known


def test_tflops_are_worked_out_from_the_latency_and_not_read():
    assert compare.tflops(timed(1000.0, tflops=1e9)) == pytest.approx(REPORT.flops() / 1e9)
    failed = timed().model_copy(update={"status": "failed"})
    assert compare.latency_us(failed) is None and compare.tflops(failed) is None
    assert compare.latency_us(synthetic.correctness("wmma", REPORT)) is None
    padded = timed(1000.0).model_copy(update={"problem": REPORT.with_(lengths="left")})
    assert compare.tflops(padded) is None and compare.latency_us(padded) == 1000.0
    for stated, known in ((REPORT.flops() // 3, True), (REPORT.flops() + 1, False), (0, False), ("many", False)):
        said = padded.model_copy(update={"timing": padded.timing.model_copy(update={"flops": stated})})
        assert compare.flops(said) == (stated if known else None), "what lengths leave out is all that they change"
        assert compare.tflops(said) == (pytest.approx(stated / 1e9) if known else None)
    assert "contradict" in compare.contradiction(padded), "TFLOPS of nobody knows how many operations"


def test_two_problems_of_one_round_are_compared_by_operations_a_second():
    windowed = REPORT.with_(causal=True, window_left=127)
    mine = timed(50.0).model_copy(update={"problem": windowed})
    work = windowed.flops() / REPORT.flops()
    found = compare.speed_beside(mine, timed(100.0))
    assert (found.value, found.n) == (pytest.approx(2 * work), 9) and found.interval == pytest.approx((2 * work,) * 2)
    assert compare.ratio(mine, timed(100.0)) is None, "they are two problems"
    assert compare.speed_beside(mine, timed(100.0, round_="other")) is None
    ragged = mine.model_copy(update={"problem": REPORT.with_(lengths="ragged")})
    assert compare.speed_beside(ragged, timed(100.0)) is None, "its operations are not known"
    unsure = compare.speed_beside(mine, timed(100.0, [100.0] * 3))
    assert (unsure.value, unsure.interval, unsure.n) == (pytest.approx(2 * work), None, 3)
    check = synthetic.correctness("wmma", REPORT)
    assert compare.flops(check) is None and compare.flops(timed().model_copy(update={"problem": None})) is None


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_one_sample_that_is_no_time_puts_all_of_them_in_doubt(bad):
    assert compare.samples_us(timed(samples=[1.0, 2.0, bad])) == []
    assert compare.samples_us(timed(samples=[1.0, 2.0])) == [1.0, 2.0]


def test_a_spread_is_the_middle_of_at_least_three_samples():
    assert compare.spread([1.0, 2.0]) is None
    assert compare.spread(range(101)) == (5.0, 95.0)
    assert compare.spread(iter([4.0, 4.0, 4.0])) == (4.0, 4.0)


@pytest.mark.parametrize("n", [*range(0, 24), 30, 50, 101])
@pytest.mark.parametrize("confidence", [50.0, 95.0, 98.0, 99.0])
def test_the_interval_of_a_median_is_the_narrowest_that_holds_it_often_enough(n, confidence):
    """Held against every way in which n fair coins fall: how many of the samples lie below the true median."""
    ways = [math.comb(n, below) for below in range(n + 1)]

    def holds(k: int) -> float:
        """Share of cases in which the median lies between the k-th sample from below and the k-th from above."""
        return sum(w for below, w in enumerate(ways) if k <= below <= n - k) / 2**n

    found = compare.median_interval(range(n), confidence=confidence)
    if found is None:
        assert n < 2 or holds(1) < confidence / 100
        return
    k = int(found[0]) + 1
    assert found == (k - 1, n - k) and holds(k) >= confidence / 100
    assert k + 1 > n // 2 or holds(k + 1) < confidence / 100


@pytest.mark.parametrize("n", [compare.MANY + 1, 4000, 10**6])
@pytest.mark.parametrize("confidence", [90.0, 98.0, 99.0])
def test_of_very_many_samples_the_interval_is_hardly_wider_than_it_has_to_be(n, confidence):
    """Against the normal distribution, which coins of so many throws follow to a hair."""
    k = compare._from_each_end(n, confidence)
    inside = NormalDist().cdf((n - 2 * k) / math.sqrt(n)) - NormalDist().cdf((2 * k - n) / math.sqrt(n))
    assert confidence / 100 < inside < 1
    counted = compare._from_each_end(compare.MANY, confidence)
    assert (n / 2 - k) / math.sqrt(n) < 1.6 * (compare.MANY / 2 - counted) / math.sqrt(compare.MANY)
    assert compare._from_each_end(n, 100.0) == 0, "nothing holds it always"


def test_a_timing_may_keep_any_number_of_samples():
    found = compare.interval_us(timed(100.0, [99.0, 100.0, 101.0] * 1000))
    assert found == (100.0, 100.0)


def test_the_interval_holds_the_median_of_skewed_samples_as_often_as_it_says():
    draw = np.random.default_rng(7)
    samples, true = draw.exponential(size=(2000, 30)) ** 3, math.log(2) ** 3
    held = [low <= true <= high for low, high in map(compare.median_interval, samples)]
    assert sum(held) / len(held) >= compare.CONFIDENCE / 100 - 0.005


def test_the_fewest_samples_are_the_fewest_that_have_an_interval():
    assert compare.median_interval(range(compare.FEWEST_SAMPLES)) == (0, compare.FEWEST_SAMPLES - 1)
    assert compare.median_interval(range(compare.FEWEST_SAMPLES - 1)) is None


def test_the_stated_median_lies_in_its_interval():
    """More samples were taken than the record keeps, and the median of all lies beyond those kept."""
    assert compare.interval_us(timed(5.0, [7.0] * 50)) == (5.0, 7.0)
    assert compare.interval_us(timed(5.0, [5.0] * 3)) is None
    assert compare.interval_us(timed(math.nan, [5.0] * 30)) is None


def test_an_interval_is_told_with_as_many_digits_as_tell_its_ends_apart():
    assert compare.between((4.766, 4.772)) == "4.766 to 4.772" and compare.between((4.7, 5.2)) == "4.70 to 5.20"
    assert compare.between((5.0, 5.0)) == "5.00 to 5.00"
    assert compare.between((1.0000011, 1.0000021)) == "1.00 to 1.00", "six digits are the most"


# --- ratios --------------------------------------------------------------------------------------------------------


def test_samples_taken_side_by_side_are_paired_and_others_are_not():
    drift = [1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0]
    ours, peer = timed(200.0, [100 * d for d in drift]), timed(400.0, [200 * d for d in drift], backend="fa3")
    found = compare.ratio(ours, peer)
    assert (found.value, found.n, found.other) == (2.0, 9, peer) and found.interval == pytest.approx((2.0, 2.0))
    assert found.in_words() == "faster" and compare.ratio(peer, ours).in_words() == "slower"
    nearly = compare.ratio(ours, timed(202.0, [101 * d for d in drift], backend="fa3"))
    assert nearly.in_words() == "faster" and nearly.interval == pytest.approx((1.01, 1.01))
    shorter = compare.ratio(ours, timed(400.0, [200 * d for d in drift[:8]], backend="fa3"))
    assert shorter.n == 8 and shorter.interval[0] < 1 < shorter.interval[1] and shorter.in_words() == "no difference"


def test_a_ratio_whose_interval_is_not_known_is_no_difference():
    found = compare.ratio(timed(100.0, []), timed(900.0, [], backend="fa3"))
    assert (found.value, found.interval, found.n, found.in_words()) == (9.0, None, 0, "no difference")


@pytest.mark.parametrize("changes", [{"round": "other"}, {"round": None}, {"method": "host"}, {"l2": "warm"},
                                     {"latency_us": math.nan}])  # fmt: skip
def test_what_was_not_timed_alike_in_one_round_has_no_ratio(changes):
    assert compare.ratio(timed(), timed(backend="fa3", **changes)) is None
    assert compare.ratio(timed(backend="fa3", **changes), timed()) is None


def test_two_machines_or_two_problems_have_no_ratio():
    peer = timed(backend="fa3")
    assert compare.ratio(timed(), peer) is not None
    assert compare.ratio(timed(), peer.model_copy(update={"environment": "another"})) is None
    assert compare.ratio(timed(), peer.model_copy(update={"problem": PRESETS["latency"]})) is None


def test_the_best_peer_is_the_fastest_of_the_round():
    peers = [timed(us, backend=name) for name, us in (("sdpa-math", 900.0), ("fa3", 80.0), ("sdpa-flash", 200.0))]
    elsewhere = timed(1.0, backend="sdpa-cudnn", round_="another")
    found = compare.ratio_to_best_peer(timed(), [*peers, elsewhere, timed(10.0, backend="scalar")])
    assert found.other.backend == "fa3" and found.value == pytest.approx(0.8)
    assert compare.ratio_to_best_peer(timed(), [elsewhere]) is None


# --- checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, True), ({"passed": False}, False), ({"num_bad": 1}, False), ({"max_abs_error": math.nan}, False),
        ({"max_abs_error": math.inf}, False), ({"checked": 0}, None), ({"max_abs_error": 9.4e-4}, True),
        ({"max_abs_error": 9.5e-4}, False), ({"num_nan": 1}, False), ({"num_inf": 1}, False),
        ({"lse_max_abs_error": math.nan}, False), ({"lse_max_abs_error": math.inf}, False),
        ({"lse_max_abs_error": None}, True), ({"lse_bound": 3e-6}, True), ({"lse_bound": 2e-6}, False),
        ({"lse_bound": "3e-6"}, False), ({"lse_bound": math.nan}, False),
    ],
)  # fmt: skip
def test_an_ok_is_believed_only_as_far_as_its_figures_go(changes, outcome):
    trial = synthetic.correctness("wmma", REPORT)
    correctness = Correctness(**{**trial.correctness.model_dump(), **changes})
    assert compare.passed(trial.model_copy(update={"correctness": correctness})) is outcome


def test_what_did_not_compare_anything_neither_passes_nor_fails():
    right = synthetic.correctness("wmma", REPORT)
    assert compare.passed(right.model_copy(update={"status": "error"})) is None
    assert compare.passed(right.model_copy(update={"correctness": None})) is None
    assert compare.passed(right.model_copy(update={"status": "failed", "correctness": None})) is False
    assert compare.passed(timed()) is None
    for checked, outcome in ((0, None), (1, True)):
        of_no_problem = right.correctness.model_copy(update={"checked": checked})
        assert compare.passed(right.model_copy(update={"problem": None, "correctness": of_no_problem})) is outcome


def test_a_ragged_batch_has_fewer_rows_than_its_longest_sequence_times_its_sequences():
    for lengths, rows, outcome in [
        ("ragged", 150, True),
        ("ragged", 0.5, None),
        ("right", 399, None),
        ("right", 400, True),
    ]:
        trial = synthetic.correctness("hopper", square(4, 2, 100, 64, lengths=lengths))
        checked = {"checked": int(rows * 2 * 64)}
        trial = trial.model_copy(update={"correctness": trial.correctness.model_copy(update=checked)})
        assert compare.passed(trial) is outcome, (lengths, rows)


@pytest.mark.parametrize(
    ("value", "can"), [(3, True), (2.5, True), (True, False), ("3", False), (None, False), (math.nan, False),
                       (math.inf, False), (10**400, False), (-(10**400), False), ([1], False)]
)  # fmt: skip
def test_a_figure_is_a_number_that_can_be_reckoned_with(value, can):
    assert compare.is_figure(value) is can
    assert can or value is True or not isinstance(value, int | float) or compare.number(value) == "not known"


# --- digits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(999.96, 3, "1,000"), (0.001, 3, "0.00100"), (0.00099, 3, "9.90e-04"), (123456.7, 7, "123,456.7"),
     (math.inf, 3, "not known"), (2.5, 1, "2")],
)  # fmt: skip
def test_digits_left_of_the_point_are_never_dropped(value, digits, text):
    assert compare.number(value, digits) == text


@pytest.mark.parametrize(
    ("taken", "kept", "latency", "wrong"),
    [
        (100, 100, 100.0, None), (100, 100, 101.0, "is not the median of its samples"),
        (None, 100, 101.0, None), (300, 100, 101.0, None), (60, 100, 100.0, "keeps more samples than it says"),
        ("many", 100, 101.0, None), (300, 100, 102.5, "outside its own samples"),
        (None, 100, 99.5, "outside its own samples"), (None, 50, 101.0, None),
        (None, 49, 101.0, "is not the median of its samples"), (None, 30, math.nan, "is not a number"),
        (30, 30, 101.0, "is not the median of its samples"),
    ],
)  # fmt: skip
def test_a_timing_that_says_how_many_samples_it_took_is_held_to_it(taken, kept, latency, wrong):
    samples = [100.0] * (kept - 10) + [102.0] * 10
    more = {} if taken is None else {"samples": taken}
    timing = Timing(method="graph_replay", latency_us=latency, samples_us=samples, **more)
    found = compare.contradiction(Trial(kind="attention_timing", backend="wmma", problem=REPORT, timing=timing))
    assert found is None if wrong is None else wrong in found
