"""What the mode costs, on SYNTHETIC records: a table and a sentence; and a speed in the mode is no speed of others."""

from __future__ import annotations

import dataclasses
import math

from bs4 import BeautifulSoup
from support import synthetic_records as synthetic
from support.contradictions import contradictions
from support.decisions import GOOD, LATENCY, REPORT, decide

from flashcore import page
from flashcore.decision import compare
from flashcore.decision.evidence import Evidence, Recorded
from flashcore.measure import sweep, workloads
from flashcore.page.drawing import html_tables, invariance_views, plots
from flashcore.page.history import timings as history
from flashcore.problem import PRESETS, Problem
from flashcore.records import Timing, Trial

MICROS = {"hopper": 1000.0, "fa3": 1200.0, "sdpa-cudnn": 1300.0, "sdpa-flash": 2000.0}


def timing(backend: str, problem: Problem, micros: float, round_: str, **changes) -> Trial:
    """A timing with samples that lie apart by the same factors whatever the backend, as clock drift puts them."""
    drift = [1 + 0.01 * (i % 7 - 3) + 0.0002 * (len(backend) * i % 5 - 2) for i in range(31)]
    taken = [micros * factor for factor in drift]
    median = sorted(taken)[15]
    timed = Timing(method="graph_replay", latency_us=median, samples_us=taken, round=round_, l2="rotating",
                   tflops=problem.flops() / median / 1e6)  # fmt: skip
    return Trial(kind="attention_timing", backend=backend, problem=problem, timing=timed, environment=synthetic.ENV_ID,
                 **changes)  # fmt: skip


def mode(problem: Problem) -> Problem:
    return problem.with_(batch_invariant=True)


def measured(costs=(0.01, 0.02, 0.03)) -> list[Trial]:
    """Some of the listed prefills, each costing what `costs` says."""
    trials = []
    for number, (problem, cost) in enumerate(zip(workloads.COSTED, costs, strict=False)):
        trials += [timing(name, problem, micros, f"c{number}") for name, micros in MICROS.items()]
        trials.append(timing("hopper", mode(problem), MICROS["hopper"] * (1 + cost), f"c{number}"))
    return trials


TRIALS = measured()
GPU = Evidence(tuple(TRIALS), synthetic.environment(), {})


def rows(trials) -> dict[str, dict[str, str]]:
    table = BeautifulSoup(invariance_views.cost_table(trials), "html.parser").find("table")
    heads = [th.get_text() for th in table.select("thead th")]
    lines = [[cell.get_text() for cell in tr.find_all(["th", "td"])] for tr in table.select("tbody tr")]
    return {line[0]: dict(zip(heads, line, strict=True)) for line in lines}


def without(trials, backend, problem=None):
    return [t for t in trials if t.backend != backend or (problem is not None and t.problem != problem)]


def test_a_run_that_timed_nothing_in_the_mode_says_nothing():
    old = synthetic.gpu_trials(synthetic.FAST)
    plain = [t for t in TRIALS if not t.problem.batch_invariant]
    for trials in ([], old, plain):
        assert invariance_views.cost_table(trials) == ""
        assert invariance_views.cost_html(dataclasses.replace(GPU, trials=tuple(trials))) == ""


def test_each_problem_has_its_times_its_cost_and_how_the_mode_stands_to_peers():
    found = rows(TRIALS)
    assert list(found) == [html_tables.spaced(p) for p in workloads.COSTED[:3]]
    first = found[html_tables.spaced(workloads.COSTED[0])]
    assert first["Ordinary, µs"] == "1,000" and first["Batch-invariant, µs"] == "1,010" and first["Cost"] == "1.0 %"
    assert first["TFLOPS"] == compare.number(workloads.COSTED[0].flops() / 1000 / 1e6)
    assert first["Beside FlashAttention-3"].startswith("1.19 × (") and first["Beside cuDNN"].startswith("1.29 × (")
    low, high = (float(end.removesuffix(" %")) for end in first["Within"].split(" to "))
    assert low <= 1.0 <= high and high - low < 0.2, "drift that both share is no part of the cost"


def test_the_sentence_has_the_geometric_mean_the_range_and_the_ratio_to_a_peer():
    told = invariance_views.sentence(invariance_views.costs(measured((-0.01, 0.02, 0.30))))
    mean = 100 * ((0.99 * 1.02 * 1.30) ** (1 / 3) - 1)
    assert f"takes {mean:.1f} % more time in the geometric mean of 3 problems, between −1.0 % and 30.0 %" in told
    ratio = math.prod(1200 / 1000 / c for c in (0.99, 1.02, 1.30)) ** (1 / 3)
    assert f"{ratio:.2f} times as fast as FlashAttention-3 in the geometric mean of 3" in told and "cuDNN" in told
    assert told.count("in that mode ours is") == 1
    alone = [t for t in measured((0.02,)) if t.backend == "hopper"]
    assert invariance_views.sentence(invariance_views.costs(alone)).endswith("takes 2.0 % more time.")
    one = invariance_views.sentence(invariance_views.costs(measured((0.02,))))
    assert one.startswith("With batch_invariant=True a prefill takes 2.0 % more time; ") and "mean" not in one


def test_what_stands_in_another_round_or_is_wrong_or_missing_has_no_figure():
    problem = workloads.COSTED[0]
    trials = measured((0.02,))
    apart = [*without(trials, "hopper", mode(problem)), timing("hopper", mode(problem), 1020.0, "another")]
    (row,) = rows(apart).values()
    assert row["Cost"] == "not measured" and "no time without it" in invariance_views.cost_table(apart)
    (row,) = rows(without(trials, "hopper", problem)).values()
    assert row["Cost"] == "not measured" and row["Beside cuDNN"].startswith("1.27 ×"), "peers are there all the same"
    wrong = [t.model_copy(update={"status": "failed", "reason": "wrong"}) if t.problem == mode(problem) else t
             for t in trials]  # fmt: skip
    (row,) = rows(wrong).values()
    assert (row["Batch-invariant, µs"], row["Cost"]) == ("WRONG", "not measured")
    gone = Trial(kind="attention_timing", backend="fa3", status="unavailable", reason="not here")
    (row,) = rows([*without(trials, "fa3"), gone]).values()
    assert row["Beside FlashAttention-3"] == "not installed"
    refused = Trial(kind="attention_timing", backend="wmma", problem=mode(problem), status="unsupported", reason="no")
    assert len(rows([*trials, refused])) == 1, "who promises nothing has no row"
    ragged = problem.with_(lengths="ragged")
    two = [timing("hopper", p, 900.0, "r", data={"lengths": kind}) for p, kind in
           ((ragged, "equal"), (mode(ragged), "mixed"))]  # fmt: skip
    assert invariance_views.costs(two)[0].share is None, "other lengths are another measurement"


def test_the_two_parts_on_the_mode_lead_to_each_other():
    data = {"mode": "invariant", "cases": 100, "kept": 100, "broken": 0, "subjects": 7, "role": "ours"}
    asked = Trial(kind="invariance", backend="hopper", variant="invariant", data=data)
    both = dataclasses.replace(GPU, trials=(*TRIALS, asked))
    told = invariance_views.sentence(invariance_views.costs(TRIALS))
    speed, proof = invariance_views.cost_html(both), page.proof_html(both)
    assert '<a href="#correctness">' in speed and told in speed
    assert "was not asked in this run" in invariance_views.cost_html(GPU)
    assert told in proof and '<a href="#speed" data-row="' in proof
    whole = page.anchored(speed + proof)
    row = BeautifulSoup(whole, "html.parser").find("table").select_one("tbody tr")
    assert row["id"] and f'<a href="#{row["id"]}">What each problem costs</a>' in whole
    alone = page.proof_html(dataclasses.replace(GPU, trials=(asked,)))
    assert "bits in every batch" in alone and "#speed" not in alone, "a run that timed none has nothing to lead to"


def test_a_machine_without_a_gpu_shows_the_recorded_run_and_nothing_contradicts_it():
    recorded = Recorded(tuple(TRIALS), synthetic.environment())
    html = invariance_views.cost_html(dataclasses.replace(GPU, trials=(), environment={}, recorded=recorded))
    assert html == invariance_views.cost_html(GPU) and html.startswith("<h3>")
    assert contradictions(html, TRIALS) == []


def test_a_speed_in_the_mode_settles_nothing_else_and_stands_in_no_other_view():
    """Made-up timings in the mode, faster than anything, of the very problems that gates and cards are about."""
    fast = []
    for problem in (REPORT, PRESETS["report-causal"], LATENCY, REPORT.with_(batch=64)):
        like = next((t for t in GOOD if t.kind == "attention_timing" and t.problem == problem), None)
        for backend in ("hopper", "wmma"):
            made = timing(backend, mode(problem), problem.flops() / 9000 / 1e6, like.timing.round if like else "x")
            l2 = like.timing.l2 if like else "rotating"
            fast.append(made.model_copy(update={"timing": made.timing.model_copy(update={"l2": l2})}))
    before, after = decide(GOOD), decide([*GOOD, *fast])
    assert after == before and any(g.state == "PASS" for g in before.gates)
    views = []
    for decision, trials in ((before, GOOD), (after, [*GOOD, *fast])):
        evidence = Evidence(tuple(trials), synthetic.environment(), synthetic.HASHES)
        views.append([page.headline_html(decision, evidence), plots.panels(trials), html_tables.times_table(trials),
                      plots.small_trials(trials)])  # fmt: skip
    assert views[0] == views[1]
    assert len(invariance_views.costs(fast)) == 8, "each has a row of its own instead"
    for one in fast:
        for other in GOOD:
            assert compare.ratio(one, other) is None
    assert history.problem_key(REPORT) != history.problem_key(mode(REPORT))


def test_the_problems_that_say_what_it_costs_add_no_panel_to_the_plots():
    def lines(problems):
        timed = [timing(name, p, 1000.0, p.label()) for p in problems for name in ("hopper", "fa3") if not p.masks]
        return set(plots.panels(timed))

    every = sweep.sweep_problems("full", True)
    assert lines(every) == lines([p for p in every if p not in sweep.COSTED_ALONE])
