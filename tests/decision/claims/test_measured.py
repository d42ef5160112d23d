"""Claims against what a run measured of the same thing."""

from __future__ import annotations

import pytest
from support import synthetic_paging
from support import synthetic_records as synthetic
from support.made_up_claims import ENVIRONMENT, REPORT, TOY, TRIALS, WMMA, claim_text, one, outcomes

from flashcore.decision import claims as library
from flashcore.decision.claims import measured as measuring
from flashcore.records import Trial


def measured(*texts: str, trials=TRIALS, **environment) -> library.Audit:
    return one(*texts, trials=trials, environment={**ENVIRONMENT, **environment}, gpu="")


def test_measured_ceilings_refute_a_claim_about_the_same_gpu_and_stand_beside_others():
    environment = {**TOY, "id": "e"}
    data = {"name": "matmul_fp16", "value": 70.0, "unit": "TFLOPS"}
    trials = [Trial(kind="ceiling", environment="e", data=data)]
    fast = claim_text("a", "tflops", 90.0, "TFLOPS", workload="report")
    assert one(fast, trials=trials, environment=environment).verdict == "contradicted"
    elsewhere = one(fast, trials=trials, environment={"gpu": "another", "id": "e"})
    assert elsewhere.verdict == "not checkable" and outcomes(elsewhere, "physics") == ["possible", "beside"]
    near = claim_text("a", "tflops", 71.0, "TFLOPS", workload="report")
    assert outcomes(one(near, trials=trials, environment=environment), "physics") == ["possible"]
    empty = [Trial(kind="ceiling", environment="e", data={"name": "graph_node", "value": 3.0, "unit": "us"})]
    short = claim_text("a", "latency_us", 2.5, "us", workload="B=1,H=1,S=16,D=64")
    assert one(short, trials=empty, environment=environment).verdict == "contradicted"


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "confirmed"), (1.01, "confirmed"), (2.0, "contradicted"),
                                                 (0.5, "contradicted")])  # fmt: skip
@pytest.mark.parametrize("quantity", ["latency_us", "tflops"])
def test_a_claim_about_a_backend_of_this_run_is_decided_by_it(factor, verdict, quantity):
    value, unit = (WMMA.timing.latency_us, "µs") if quantity == "latency_us" else (WMMA.timing.tflops, "TFLOPS")
    found = measured(claim_text("a", quantity, round(value * factor, 3), unit, workload="report", backend="wmma"))
    assert found.verdict == verdict
    (finding,) = found.of("measurement")
    assert (
        finding.backend == "wmma" and finding.n == 30 and finding.interval[0] <= finding.against <= finding.interval[1]
    )
    assert finding.against == pytest.approx(value)


def test_a_counterpart_another_gpu_or_doubtful_records_only_stand_beside():
    half = round(WMMA.timing.latency_us / 2, 1)
    about = {"workload": "report"}
    found = measured(claim_text("a", "latency_us", half, "µs", backend="old", counterpart="wmma", **about))
    assert (found.verdict, outcomes(found, "measurement")) == ("not checkable", ["beside"])
    assert "2.00 times as slow as the claim" in found.reason and "SYNTHETIC H200" in found.reason
    own = claim_text("a", "latency_us", half, "µs", backend="wmma", **about)
    assert outcomes(measured(own + 'gpu = "Toy"\n'), "measurement") == ["beside"]
    stale = library.audit(library.parse_claims(own), TRIALS, environment=ENVIRONMENT, current_hashes={"wmma": "other"})
    assert outcomes(stale[0], "measurement") == ["beside"] and "other kernel source" in stale[0].reason
    wrong = [WMMA, synthetic.correctness("wmma", REPORT, status="failed")]
    found = measured(own, trials=wrong)
    assert outcomes(found, "measurement") == ["beside"] and "wrong results" in found.reason


def test_checks_are_read_once_and_not_for_each_timing_and_claim(monkeypatch):
    """Each claim of a speed looks at every timing of its dtype, and asks of each whether it is right."""
    asked, passed = [], measuring.compare.passed
    monkeypatch.setattr(measuring.compare, "passed", lambda trial: asked.append(trial) or passed(trial))
    timings, checks = 40 * [WMMA], 30 * [synthetic.correctness("wmma", REPORT)]
    fast = [claim_text(f"c{nth}", "tflops", 1e4, "TFLOPS", workload="report") for nth in range(5)]
    found = library.audit(
        library.parse_claims("".join(fast)), [*timings, *checks], environment=ENVIRONMENT, current_hashes=None
    )
    assert len(asked) == len(checks)
    assert [outcomes(one, "physics") for one in found] == 5 * [["missing", "contradicted"]]


def test_what_was_not_measured_names_the_command():
    found = measured(claim_text("a", "latency_us", 9, "µs", backend="old", counterpart="hopper", workload="tiny"))
    assert "'flashcore report --backend hopper --problem tiny' measures it" in found.reason
    found = measured(claim_text("a", "latency_us", 9, "µs", counterpart="fa3", workload="tiny"))
    assert "it is not installed" in found.reason
    share = {"workload": "report", "definition": "x", "measure": "make shares"}
    assert "'make shares' measures it" in measured(claim_text("a", "memory_share", 70, "%", **share)).reason
    assert outcomes(measured(claim_text("a", "latency_us", 9, "µs")), "measurement") == ["missing"]


def test_without_a_backend_the_fastest_of_ours_stands_beside():
    (finding,) = measured(claim_text("a", "latency_us", 5, "µs", workload="latency")).of("measurement")
    assert finding.backend == "wmma" and "the fastest of ours" in finding.sentence


def test_a_ratio_is_measured_within_a_round():
    scalar = next(t for t in TRIALS if t.kind == "attention_timing" and t.backend == "scalar" and t.problem == REPORT)
    truth = scalar.timing.latency_us / WMMA.timing.latency_us
    terms = claim_text("slow", "latency_us", 420, "ms", workload="report", backend="scalar")
    terms += claim_text("fast", "latency_us", 73, "ms", workload="report", backend="wmma")
    found = measured(claim_text("r", "speedup", round(truth, 1), "×", of="slow", over="fast"), terms)
    (finding,) = found.of("measurement")
    assert finding.outcome == "confirmed" and finding.against == pytest.approx(truth) and finding.n == 30
    assert found.verdict == "contradicted"  # by its own two terms


def test_the_machine_itself():
    (clock,) = measured(claim_text("a", "clock_ghz", 3.9, "GHz")).of("measurement")
    assert clock.against == pytest.approx(1.98) and clock.outcome == "beside"
    peak = measured(claim_text("a", "peak_tflops", 320, "TFLOPS"))
    assert outcomes(peak, "measurement") == ["contradicted"] and "758" in peak.reason
    assert outcomes(measured(claim_text("a", "sm_count", 132, "SMs")), "measurement") == ["beside"]


def test_records_of_another_kind_stand_beside_a_claim():
    records = '{ kind = "paging", key = "saved", where = { case = "prefix", share = 0.3 } }'
    text = claim_text("a", "memory_share", 70, "%") + f"records = {records}\n"
    data = {"saved": 70.3, "case": "prefix", "share": 0.3, "definition": "resident pages against dense caches."}
    trials = [Trial(kind="paging", environment=synthetic.ENV_ID, data={**data, "case": "mixed", "saved": 1.0}),
              Trial(kind="paging", environment=synthetic.ENV_ID, data=data)]  # fmt: skip
    (finding,) = measured(text, trials=trials).of("measurement")
    assert finding.against == 70.3 and "resident pages against dense caches" in finding.sentence
    assert outcomes(measured(text, trials=trials[:1]), "measurement") == ["missing"]


def test_each_definition_that_records_state_is_a_figure_of_its_own():
    found = shipped_with([*synthetic_paging.memory(), *synthetic_paging.tokens()])
    saved = found["memory-70"].of("measurement")
    assert [f.against for f in saved] == [70.3, 47.1, -0.8] and {f.outcome for f in saved} == {"beside"}
    assert "shared_prefix" in saved[0].sentence and "−0.800 %" in saved[2].sentence
    rates = found["tokens-25k"].of("measurement")
    assert len(rates) == 2 and all("attention only, batch" in f.sentence for f in rates)
    assert "32 layers" in rates[0].sentence and "1 layer, 16 query heads" in rates[1].sentence
    assert {found[name].verdict for name in ("memory-70", "tokens-25k")} == {"undefined"}, "a figure is no definition"


def test_what_was_not_measured_names_the_command_that_measures_it():
    found = shipped_with([])
    for name in ("memory-70", "tokens-25k"):
        (finding,) = found[name].of("measurement")
        assert finding.outcome == "missing" and "'flashcore paging' measures it" in finding.sentence


def shipped_with(trials: list[Trial]) -> dict[str, library.Audit]:
    audits = library.audit(library.load_claims(), trials, environment=synthetic.environment())
    return {audit.claim.id: audit for audit in audits}
