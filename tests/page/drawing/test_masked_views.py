"""The table of problems with masks, on SYNTHETIC records: ours, peers, what each is held against; else silence."""

from __future__ import annotations

import dataclasses

from bs4 import BeautifulSoup
from support import synthetic_records as synthetic
from support.contradictions import contradictions

from flashcore.decision.evidence import Evidence, Recorded
from flashcore.measure import workloads
from flashcore.page.drawing import masked_views
from flashcore.records import Trial

SPEED = {"hopper": 600.0, "fa3": 500.0, "fa4": 400.0}
"""TFLOPS of a problem, whatever its masks; ours is 1 % slower with one."""
REFUSED = "the package says: This flash attention build does not support local attention"


def timing(backend: str, problem, round_: str) -> Trial:
    kind = workloads.kind_of_lengths(problem)
    flops = problem.flops() // 2 if kind == "uniform" else problem.flops()
    slower = 1.01 if backend == "hopper" and problem.masks else 1.0
    trial = synthetic.timing(backend, problem, 0.5 * flops / SPEED[backend] / 1e6 * 2 * slower, round_=round_)
    if not problem.lengths:
        return trial
    timing = trial.timing.model_copy(update={"flops": flops, "tflops": flops / trial.timing.latency_us / 1e6})
    return trial.model_copy(update={"timing": timing, "data": {"lengths": kind}})


def measured() -> list[Trial]:
    """All workloads, with FlashAttention where it takes them."""
    trials = []
    for number, group in enumerate(workloads.grouped(workloads.problems("full"))):
        for problem in group:
            trials.append(timing("hopper", problem, f"m{number}"))
            if not problem.sink:
                trials.append(timing("fa4", problem, f"m{number}"))
            if "window" in problem.masks:
                trials.append(Trial(kind="attention_timing", backend="fa3", problem=problem, status="unsupported",
                                    reason=REFUSED, environment=synthetic.ENV_ID))  # fmt: skip
            elif not problem.sink:
                trials.append(timing("fa3", problem, f"m{number}"))
    return trials


TRIALS = measured()
GPU = Evidence(tuple(TRIALS), synthetic.environment(), {})


def rows(trials) -> dict[str, dict[str, str]]:
    table = BeautifulSoup(masked_views.masked_table(trials), "html.parser").find("table")
    heads = [th.get_text() for th in table.select("thead th")]
    lines = [[cell.get_text() for cell in tr.find_all(["th", "td"])] for tr in table.select("tbody tr")]
    return {line[0]: dict(zip(heads, line, strict=True)) for line in lines}


def only(trials, *workload):
    wanted = {p for w in workload for p in (w.problem, w.beside)}
    return [t for t in trials if t.problem in wanted]


def test_a_run_that_timed_none_says_nothing():
    old = synthetic.gpu_trials(synthetic.FAST)
    assert masked_views.masked_table(old) == "" == masked_views.masked_table([])
    assert masked_views.masked_html(dataclasses.replace(GPU, trials=tuple(old))) == ""
    dense = [t for t in TRIALS if not t.problem.masks]
    assert dense and masked_views.masked_table(dense) == "", "a problem beside others is no workload"


def test_every_workload_has_a_row_with_ours_the_peers_and_the_aim():
    found = rows(TRIALS)
    assert list(found) == [w.words for w in workloads.WORKLOADS]
    ragged = found[workloads.RAGGED.words]
    assert ragged["TFLOPS"] in ("592", "593", "594", "595", "596") and ragged["Held against"] == "FlashAttention-3"
    assert ragged["Best peer"].startswith("1.19 × (1.1") and ragged["Best peer"].endswith("), FlashAttention-3")
    assert ragged["Speed beside it"].startswith("1.19 × (") and ragged["Speed beside it"].endswith(") [aim 1.15]")
    window = found[workloads.WINDOW.words]
    assert window["FlashAttention-3, µs"] == "not taken" and float(window["FlashAttention-4, µs"].replace(",", "")) > 0
    assert window["Speed beside it"].endswith("[aim 1.3]") and window["Held against"] == "FlashAttention-4"
    for workload in workloads.WORKLOADS:
        row = found[workload.words]
        assert (row["Held against"] == "–") == (workload.beside is None and not workload.against)
        if workload.beside is not None:
            value = float(row["Speed beside it"].split(" ×")[0])
            assert row["Held against"] == workload.beside_words and 0.97 < value < 1.02, row
        assert ("[" in row["Speed beside it"]) == (workload.aim is not None)
    table = masked_views.masked_table(TRIALS)
    assert f"FlashAttention-3 at {workloads.WINDOW.words}: {REFUSED}" in table and "No gate depends on them" in table


def test_time_in_proportion_to_the_window_is_one_whatever_the_time():
    (narrow,) = [w for w in workloads.WORKLOADS if w.beside == workloads.WIDE]
    times = {t.problem: t.timing.latency_us for t in TRIALS if t.backend == "hopper"}
    assert times[narrow.beside] / times[narrow.problem] > 1.8, "the wider window takes longer"
    assert rows(TRIALS)[narrow.words]["Speed beside it"].split(" ")[0] in ("0.997", "0.998", "0.999", "1.00")


def test_what_was_not_timed_or_is_wrong_is_said():
    sink = next(w for w in workloads.WORKLOADS if w.problem.sink)
    alone = [t for t in only(TRIALS, sink) if t.problem == sink.problem]
    assert rows(alone)[sink.words]["Speed beside it"] == "not measured [aim 0.99]"
    assert not any("FlashAttention" in name for name in rows(alone)[sink.words]), "a column of dashes says nothing"
    wrong = [t.model_copy(update={"status": "failed", "reason": "wrong"}) for t in alone]
    assert rows(wrong)[sink.words]["Ours, µs"] == "WRONG"
    gone = Trial(kind="attention_timing", backend="fa4", status="unavailable", reason="it is not installed")
    assert rows([*alone, gone])[sink.words]["FlashAttention-4, µs"] == "not installed"
    other = [t.model_copy(update={"data": {"lengths": "mixed"}}) for t in only(TRIALS, workloads.RAGGED)]
    assert masked_views.masked_table(other) == "", "sequences of other lengths are another measurement"
    unsupported = [t.model_copy(update={"status": "unsupported", "reason": "no"}) for t in alone]
    assert masked_views.masked_table(unsupported) == ""


def test_a_machine_without_a_gpu_shows_the_recorded_run_and_nothing_contradicts_it():
    recorded = Recorded(tuple(TRIALS), synthetic.environment())
    html = masked_views.masked_html(dataclasses.replace(GPU, trials=(), environment={}, recorded=recorded))
    assert html == masked_views.masked_html(GPU) and html.startswith("<h3>Masks that models use</h3>")
    assert contradictions(html, TRIALS) == []
