"""Runs over time: the words are right where the truth is known, and nothing that a run may hold breaks them."""

from __future__ import annotations

import functools
import json
import math
import random
import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import synthetic_records as synthetic
from typer.testing import CliRunner

from flashcore import history
from flashcore.cli.program import app
from flashcore.decision.gates import load_gates
from flashcore.errors import RecordsError, RecordsTooNew
from flashcore.history import changes, interval, timings, views
from flashcore.history.runs import Snapshot
from flashcore.history.since import since
from flashcore.history.trend import FIRST, trend
from flashcore.problem import PRESETS
from flashcore.records import Trial

runner = CliRunner()
REPORT = PRESETS["report"]
OURS_US, PEER_US = 500.0, 600.0
KEPT = [p for p in synthetic.problems() if p.seqlen_q <= 2048][:12]


def timing(backend, us, noise, *, seed, problem=REPORT, samples=30, **changes):
    """A SYNTHETIC timing: the latency, and how much its samples scatter."""
    rng = random.Random(f"{seed} {backend} {problem.label()}")
    taken = [us * max(0.05, rng.gauss(1.0, noise)) for _ in range(samples)]
    trial = synthetic.timing(backend, problem, us, round_=f"round {problem.label()}", **changes)
    return trial.model_copy(update={"timing": trial.timing.model_copy(update={"samples_us": taken, "latency_us": us})})


def snapshot(name="now", *, faster=1.0, noise=0.005, samples=30, peers=True, clock=1.0, trials=None, **environment):
    """A SYNTHETIC run: wmma beside two peers at twelve problems; `clock` scales all of it alike."""
    if trials is None:
        trials = []
        for problem in [REPORT, *(p for p in KEPT if p != REPORT)]:
            common = {"seed": name, "problem": problem, "samples": samples}
            trials.append(timing("wmma", OURS_US / faster / clock, noise, **common))
            if peers:
                trials.append(timing("sdpa-cudnn", PEER_US / clock, noise, **common))
                trials.append(timing("sdpa-flash", 1.5 * PEER_US / clock, noise, **common))
    return Snapshot(name, tuple(trials), synthetic.environment(**environment))


def words(before, now, backend="wmma"):
    return Counter(row.word for row in history.compare_runs(before, now).rows if row.backend == backend)


def at_report(comparison, backend="wmma"):
    return next(r for r in comparison.rows if r.backend == backend and r.problem == REPORT.label())


# --- the test on samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("faster", "word"), [(1.05, "faster"), (0.95, "slower"), (1.0, "same")])
def test_five_percent_with_little_noise_is_seen_everywhere(faster, word):
    found = words(snapshot("before"), snapshot(faster=faster))
    assert found[word] == found.total() == 12


def test_under_one_percent_is_no_change_however_narrow_the_interval():
    found = words(snapshot("before", noise=0.0), snapshot(faster=1.009, noise=0.0))
    assert found == {"same": 12}
    assert words(snapshot("before", noise=0.0), snapshot(faster=1.02, noise=0.0)) == {"faster": 12}


@pytest.mark.parametrize("faster", [1.01, 0.99, 1.0])
def test_one_percent_with_five_percent_of_noise_is_never_called_a_change(faster):
    found = words(snapshot("before", noise=0.05), snapshot(faster=faster, noise=0.05))
    assert found["too noisy to say"] + found["same"] == found.total() == 12
    assert found["too noisy to say"] >= 8


def test_unchanged_code_is_hardly_ever_called_changed():
    wrong = total = 0
    for seed in range(20):
        found = words(snapshot(f"before {seed}", noise=0.02), snapshot(f"now {seed}", noise=0.02))
        wrong += found["faster"] + found["slower"]
        total += found.total()
    assert total == 240 and wrong <= 1


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


def test_an_interval_holds_the_median_about_as_often_as_it_says():
    rng, held = random.Random(1), 0
    for _ in range(400):
        found = interval.figure([rng.gauss(10, 1) for _ in range(30)], side="now")
        held += found.low <= 10 <= found.high
    assert 0.97 <= held / 400


@pytest.mark.parametrize("samples", [[], [1.0] * 6, [1.0] * 30 + [math.nan], [1.0] * 30 + [0.0], [1.0, math.inf] * 9])
def test_samples_that_cannot_say_give_no_interval(samples):
    assert interval.figure(samples, side="now") is None


def test_too_few_peers_leave_the_usual_drift():
    found = interval.change(*[interval.Figure(1.0, 0.99, 1.01, 30)] * 2, drift=0.0)
    assert interval.drift([found] * 3) == interval.USUAL_DRIFT
    assert interval.drift([found] * interval.FEWEST_CONTROLS) == 0.0


def test_the_same_runs_give_the_same_figures_in_any_company():
    before, now = snapshot("before"), snapshot(faster=1.02)
    whole = history.compare_runs(before, now)
    assert whole.as_dict() == history.compare_runs(before, now).as_dict()
    few = tuple(t for t in now.trials if t.problem == REPORT)
    alone = timings.rows(timings.Pair(before, Snapshot("now", few, now.environment)))[0]
    row = next(r for r in alone.values() if r.backend == "wmma")
    assert row.percent == at_report(whole).percent


# --- what may be compared ------------------------------------------------------------------------------------------


def test_other_gpus_compare_by_ratio_only_and_make_no_regression():
    found = history.compare_runs(snapshot("before"), snapshot(faster=0.8, gpu="SYNTHETIC H100"))
    row = at_report(found)
    assert (row.word, row.basis, row.regression, row.absolute_percent) == ("slower", "relative", False, None)
    assert not found.regressions and found.judged == 0 and "not known to be alike" in found.limits[0]
    found = history.compare_runs(snapshot("before", peers=False), snapshot(peers=False, gpu="SYNTHETIC H100"))
    assert at_report(found).word == "not compared" and "machines are not the same" in at_report(found).note


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


def one(**changes):
    return snapshot(trials=[timing("wmma", OURS_US, 0.005, seed="now", **changes)])


def retimed(**changes):
    trial = timing("wmma", OURS_US, 0.005, seed="now")
    return snapshot(trials=[trial.model_copy(update={"timing": trial.timing.model_copy(update=changes)})])


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


def test_a_kernel_with_other_source_is_a_comparison_of_kernels():
    now = snapshot(trials=[timing("wmma", OURS_US, 0.005, seed="now", source_hash="other")])
    now = Snapshot(now.name, now.trials, now.environment | {"kernels": {"attention_wmma": "other"}})
    found = history.compare_runs(snapshot("before"), now)
    assert at_report(found).other_source and any("two kernels" in limit for limit in found.limits)
    said = [d.sentence for d in found.differences if d.topic == "kernel"]
    assert any("attention_wmma has other source" in s for s in said) and any("is gone" in s for s in said)


def test_a_peer_that_slows_down_is_no_regression_of_ours():
    before, now = snapshot("before"), snapshot()
    slow = [t.model_copy(update={"timing": t.timing.model_copy(update={
        "samples_us": [2 * s for s in t.timing.samples_us], "latency_us": 2 * t.timing.latency_us})})
        if t.backend == "sdpa-flash" else t for t in now.trials]  # fmt: skip
    found = history.compare_runs(before, Snapshot("now", tuple(slow), now.environment))
    assert at_report(found, "sdpa-flash").role == "peer" and not found.regressions


def test_a_ratio_that_moved_while_the_call_did_not_is_marked():
    before, now = snapshot("before"), snapshot()
    quick = [t.model_copy(update={"timing": t.timing.model_copy(update={
        "samples_us": [s / 1.2 for s in t.timing.samples_us], "latency_us": t.timing.latency_us / 1.2})})
        if t.backend == "sdpa-cudnn" and t.problem == REPORT else t for t in now.trials]  # fmt: skip
    row = at_report(history.compare_runs(before, Snapshot("now", tuple(quick), now.environment)))
    assert row.word == "slower" and "may be the peer" in row.note


# --- what else changed ---------------------------------------------------------------------------------------------


def differences(before, now):
    return changes.differences(timings.Pair(snapshot("before", trials=before), snapshot("now", trials=now)))


def test_a_check_that_fails_anew_is_a_regression_and_a_mended_one_is_not():
    good, bad = synthetic.correctness("wmma", REPORT), synthetic.correctness("wmma", REPORT, status="failed")
    broken = synthetic.correctness("wmma", REPORT, status="error", correctness=None, reason="it crashed")
    (found,) = differences([good], [bad])
    assert found.regression and found.topic == "newly failing" and "passed and now fails: 17 elements" in found.sentence
    (found,) = differences([good], [broken])
    assert found.regression and "does not finish: it crashed" in found.sentence
    (found,) = differences([bad], [good])
    assert not found.regression and found.sentence.endswith("failed and now passes.")
    assert differences([good, bad], [bad]) == []  # asked twice, the worse outcome counts


def test_lost_and_gained_coverage_is_counted_in_words():
    checks = [synthetic.correctness("wmma", p) for p in KEPT]
    (found,) = differences(checks, checks[:3])
    assert found.topic == "coverage lost" and "made 3 of the 12 checks of wmma" in found.sentence
    (found,) = differences(checks[:3], checks)
    assert (found.topic, found.sentence) == ("coverage gained", "New checks: wmma 9.")
    (found,) = differences(checks, [t.model_copy(update={"status": "unavailable"}) for t in checks])
    assert "made none of the 12 checks of wmma" in found.sentence


def test_a_planted_bug_that_is_no_longer_found_is_a_regression():
    found = Trial(kind="fault", backend="wmma", variant="F8", problem=REPORT, data={"fault": "F8", "outcome": "found"})
    (change,) = differences([found], [found.model_copy(update={"status": "failed", "reason": "found elsewhere"})])
    assert change.regression and "Planted bug F8 of wmma" in change.sentence


def test_gates_and_verdicts_that_changed():
    def verdict(word, state, threshold=1):
        gate = {"id": "a", "title": "A", "state": state, "threshold": threshold, "unit": "µs"}
        return Trial(kind="verdict", data={"verdict": word, "gates": [gate, "junk"]})

    said = [d.sentence for d in differences([verdict("GO", "PASS")], [verdict("NO-GO", "FAIL", 2)])]
    assert said == [
        "The verdict was GO and is NO-GO.", "Gate 'A' was PASS and is FAIL.",
        "The threshold of gate 'A' moved from 1 to 2 µs.",
    ]  # fmt: skip
    assert differences([verdict("GO", "PASS")], []) == []


# --- junk ----------------------------------------------------------------------------------------------------------


@functools.cache
def pool():
    trials = [t for t in synthetic.gpu_trials() if t.problem is None or t.problem in KEPT[:3]]
    extreme = [5e-324, 1e308, math.inf, -1.0, 0.0, math.nan]
    for latency in extreme:
        trial = timing("wmma", OURS_US, 0.01, seed="junk")
        changed = {"latency_us": latency, "samples_us": [latency] * 9, "round": None if latency < 0 else "round-2"}
        trials.append(trial.model_copy(update={"timing": trial.timing.model_copy(update=changed)}))
        del changed["latency_us"]
        trials.append(trial.model_copy(update={"timing": trial.timing.model_copy(update=changed)}))
    trials += [
        Trial(kind="attention_timing"), Trial(kind="attention_timing", backend="wmma", problem=REPORT),
        Trial(kind="correctness"), Trial(kind="verdict", data={"gates": 3}), Trial(kind="fault", data={"fault": None}),
        synthetic.correctness("wmma", REPORT, status="failed"), synthetic.correctness("wmma", REPORT, correctness=None),
    ]  # fmt: skip
    return [*trials, *synthetic.cpu_trials()]


ENVIRONMENTS = [synthetic.environment(), synthetic.environment(gpu="SYNTHETIC H100"), synthetic.environment(gpu=None),
                {}, {"before": 3, "kernels": [], "parameters": "x", "date": "yesterday", "gpu": 7}]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_two_sets_of_records_compare_without_an_error(data):
    runs = []
    for name in ("before", "now"):
        size = st.integers(0, len(pool()) - 1)
        chosen = data.draw(st.lists(size, max_size=40))
        runs.append(Snapshot(name, tuple(pool()[i] for i in chosen), data.draw(st.sampled_from(ENVIRONMENTS))))
    found = history.compare_runs(*runs)
    assert all(row.word in interval.WORDS for row in found.rows) and found.summary.endswith(".")
    json.dumps(found.as_dict())
    views.since_html(since(runs[1], runs[0], gates=load_gates()))
    views.trend_html(trend(runs))


# --- run folders, since, trend -------------------------------------------------------------------------------------


def write(folder, run, date, **environment):
    env = synthetic.environment(**{"date": date, **environment})
    trials = [*run.trials, *(synthetic.finished(n) for n in synthetic.NOTEBOOKS)]
    return synthetic.write_run(folder / run.name, trials, env)


def test_the_run_before_is_the_newest_older_finished_one_of_this_gpu(tmp_path):
    now = write(tmp_path, snapshot("now"), "2001-02-05T00:00:00+00:00")
    assert history.previous(now) is None and views.history_html(now) == ""
    write(tmp_path, snapshot("oldest"), "2001-02-01T00:00:00+00:00")
    write(tmp_path, snapshot("older"), "2001-02-02T01:00:00+02:00")
    write(tmp_path, snapshot("newer"), "2001-02-06T00:00:00+00:00")
    write(tmp_path, snapshot("other"), "2001-02-04T00:00:00+00:00", gpu="SYNTHETIC H100")
    synthetic.write_run(tmp_path / "dead", [Trial(kind="ceiling")],
                        synthetic.environment(date="2001-02-04T00:00:00+00:00"))  # fmt: skip
    (tmp_path / "latest").symlink_to("now")
    assert history.previous(now).name == "older"
    assert [run.name for run in history.runs_in(tmp_path)[0]][:2] == ["oldest", "older"]


def test_a_page_without_a_readable_run_before_goes_without_its_history(tmp_path):
    old = write(tmp_path, snapshot("old"), "2001-02-01T00:00:00+00:00")
    now = write(tmp_path, snapshot("now"), "2001-02-05T00:00:00+00:00")
    with old.records_path.open("a") as file:
        file.write('{"schema_version": 99, "kind": "ceiling"}\n')
    assert views.history_html(now) == ""
    found, left_out = history.runs_in(tmp_path)
    assert [run.name for run in found] == ["now"] and "install a newer FlashCore" in left_out[0]
    with pytest.raises(RecordsTooNew):
        history.read(old)
    with pytest.raises(RecordsError, match="no folder"):
        history.runs_in(tmp_path / "nowhere")


def test_the_headline_figures_change_in_words(tmp_path):
    before = Snapshot("before", tuple(synthetic.gpu_trials()), synthetic.environment())
    now = Snapshot("now", tuple(synthetic.gpu_trials(synthetic.FAST)), synthetic.environment())
    found = since(now, before, gates=load_gates())
    assert set(found.deltas) == {"tflops", "ratio_to_best_peer", "latency_us", "correct_percent"}
    speed, latency = found.deltas["tflops"], found.deltas["latency_us"]
    assert speed.percent == pytest.approx(100 * (512 / 131 - 1), rel=0.01) and speed.word == "faster"
    assert "relative to sdpa-cudnn" in speed.sentence and "since 2001-02-03" in speed.sentence
    assert latency.percent < 0 and latency.word == "faster"
    assert found.deltas["correct_percent"].word == "same"
    html = views.since_html(found)
    assert '<section id="since">' in html and "Best speed of ours" in html and "Nothing: no timing" in html


def test_a_trend_by_date_with_a_figure_that_says_its_message():
    runs = [
        Snapshot(name, snapshot(name, faster=faster).trials, synthetic.environment(date=f"2001-02-0{day}T00:00:00"))
        for name, faster, day in (("c", 1.2, 3), ("a", 1.0, 1), ("b", 1.0, 2))
    ]
    machines = trend([*runs, snapshot("elsewhere", gpu="SYNTHETIC H100")])
    points = [p for p in machines["SYNTHETIC H200"] if p.backend == "wmma"]
    assert [(p.run, p.word) for p in points] == [("a", FIRST), ("b", "same"), ("c", "faster")]
    assert points[-1].ratio.value == pytest.approx(1.2 * PEER_US / OURS_US) and points[-1].peer == "sdpa-cudnn"
    html = views.trend_html(machines)
    assert html.count("<svg") == 1, "one run is no trend"
    figure = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    assert figure.get("role") == "img" and "wmma 550, then 660 TFLOPS (faster" in figure.get("aria-label")
    assert "no trend" in views.trend_html(trend(runs[:1]))


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, snapshot("a"), "2001-02-01T00:00:00+00:00")
    write(tmp_path, snapshot("same"), "2001-02-02T00:00:00+00:00")
    write(tmp_path, snapshot("slow", faster=0.9), "2001-02-03T00:00:00+00:00")
    write(tmp_path, snapshot("slightly", faster=0.98, noise=0.001), "2001-02-03T00:00:00+00:00")
    write(tmp_path, snapshot("noisy", faster=0.99, noise=0.3), "2001-02-03T00:00:00+00:00")
    write(tmp_path, snapshot("other", faster=0.5), "2001-02-04T00:00:00+00:00", gpu="SYNTHETIC H100")
    write(tmp_path, snapshot("nothing", trials=[]), "2001-02-05T00:00:00+00:00")
    wrong = [synthetic.correctness("wmma", REPORT, status=s) for s in ("ok", "failed")]
    write(tmp_path, snapshot("right", trials=[*snapshot("a").trials, wrong[0]]), "2001-02-05T00:00:00+00:00")
    write(tmp_path, snapshot("wrong", trials=[*snapshot("a").trials, wrong[1]]), "2001-02-05T00:00:00+00:00")
    (tmp_path / "latest").symlink_to("slow")
    return tmp_path


@pytest.mark.parametrize(
    ("before", "now", "code"),
    [
        ("a", "same", 0), ("a", "slow", 3), ("slow", "a", 0), ("a", "slightly", 0), ("a", "noisy", 0),
        ("a", "other", 4), ("a", "nothing", 4), ("right", "wrong", 3), ("wrong", "right", 0),
    ],
)  # fmt: skip
def test_strict_by_exit_code(folder, before, now, code):
    arguments = ["compare", before, now, "--out", str(folder)]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0 and "Traceback" not in done.output
    strict = runner.invoke(app, [*arguments, "--strict"])
    assert strict.exit_code == code, strict.output
    assert ("Regression: " in done.stdout) == (code == 3) == ("No regression" not in done.stdout)
    assert ("settles nothing" in strict.stdout) == (code == 4)


def test_runs_by_name_folder_file_and_latest(folder):
    for name in ("slow", str(folder / "slow"), str(folder / "slow" / "records.jsonl"), "latest"):
        done = runner.invoke(app, ["compare", "a", name, "--out", str(folder), "--json"])
        assert done.exit_code == 0 and json.loads(done.stdout)["now"]["name"] == "slow"
    done = runner.invoke(app, ["compare", "a", "no-such-run", "--out", str(folder)])
    assert done.exit_code == 2 and "no-such-run" in done.stderr


def test_json_for_machines(folder):
    done = runner.invoke(app, ["compare", "a", "slow", "--out", str(folder), "--json", "--strict"])
    found = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert done.exit_code == 3 and len(found["regressions"]) == 12
    row = next(r for r in found["rows"] if r["backend"] == "wmma")
    assert row["word"] == "slower" and row["basis"] == "relative" and row["regression"]
    assert row["interval_percent"][0] < row["percent"] < row["interval_percent"][1] < 0


def test_the_table_says_it_in_words(folder):
    done = runner.invoke(app, ["compare", "a", "slow", "--out", str(folder)])
    text = " ".join(done.stdout.split())
    assert "Of 12 timings of ours in both runs: 12 slower." in text and "relative to sdpa-cudnn" in text
    assert "Intervals are widened by how far unchanged code moved" in text


def test_the_trend_of_a_folder(folder):
    done = runner.invoke(app, ["trend", str(folder)])
    assert done.exit_code == 0 and "first measured" in done.stdout and "SYNTHETIC H100" in done.stdout
    done = runner.invoke(app, ["trend", str(folder), "--json"])
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert {p["run"] for p in points} >= {"a", "slow", "other"} and points[0]["word"] == FIRST
    done = runner.invoke(app, ["trend", str(folder), "--problem", "B=1,H=2,S=77,D=64"])
    assert done.exit_code == 0 and "there is no trend" in done.stdout
    assert runner.invoke(app, ["trend", str(folder / "nowhere")]).exit_code == 2
    assert runner.invoke(app, ["trend", str(folder), "--problem", "reprot"]).exit_code == 2
