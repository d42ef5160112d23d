"""The audit of claims: the verdicts on the shipped file, for the right reasons, and on whatever else may be written."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.made_up_claims import ENVIRONMENT, GPU, REPORT, TOY, TRIALS, WMMA, claim_text, outcomes

from flashcore.decision import claims as library
from flashcore.decision.claims.file import UNITS
from flashcore.errors import ClaimsError
from flashcore.paths import data_dir
from flashcore.records import RunFolder, Trial, read_trials

# ------------------------------------------------------------------------------------------------ the shipped file

SHIPPED = {
    "cublaslt-tflops": ("confirmed", "arithmetic", "615 ms"),
    "cublaslt-latency": ("confirmed", "arithmetic", "0.45 TFLOPS"),
    "gap-to-target": ("confirmed", "arithmetic", "711.1"),
    "qk-rate": ("contradicted", "arithmetic", "2.75 s"),
    "launches": ("confirmed", "arithmetic", "8,192"),
    "wmma-tflops": ("confirmed", "arithmetic", "73 ms"),
    "wmma-latency": ("confirmed", "arithmetic", "3.75 TFLOPS"),
    "scalar-latency": ("not checkable", None, "No second figure"),
    "wmma-speedup": ("confirmed", "arithmetic", "5.753"),
    "call-270us": ("impossible", "physics", "1,018 TFLOPS"),
    "memory-70": ("undefined", "definition", "no workload and no definition"),
    "tokens-25k": ("undefined", "definition", "which model"),
    "call-5us": ("undefined", "definition", "names no workload"),
    "fa3-450": ("undefined", "definition", "names no workload"),
    "peak": ("contradicted", "physics", "989.4 TFLOPS"),
    "boost-clock": ("impossible", "physics", "1.98 GHz"),
    "sm-count": ("confirmed", "physics", "132"),
    "work": ("confirmed", "arithmetic", "275 GFLOP"),
    "work-total": ("contradicted", "arithmetic", "10.2 times"),
    "work-head": ("confirmed", "arithmetic", "1.07 GFLOP"),
    "work-page": ("confirmed", "arithmetic", "33.55 MFLOP"),
}
RECORDED = data_dir("reports") / "recorded" / "h200"


def shipped(with_records: bool) -> dict[str, library.Audit]:
    if not with_records:
        return {a.claim.id: a for a in library.audit(library.load_claims())}
    environment = RunFolder(RECORDED).environment()
    trials = read_trials(RECORDED / "records.jsonl")
    return {a.claim.id: a for a in library.audit(library.load_claims(), trials, environment=environment)}


@pytest.mark.parametrize("with_records", [False, True], ids=["alone", "with the recorded run"])
@pytest.mark.slow
def test_the_shipped_claims_fall_or_stand_for_the_right_reason(with_records):
    found = shipped(with_records)
    assert {id_: a.verdict for id_, a in found.items()} == {id_: verdict for id_, (verdict, _, _) in SHIPPED.items()}
    for id_, (verdict, check, words) in SHIPPED.items():
        assert words in found[id_].reason, id_
        if check:
            assert verdict in outcomes(found[id_], check), id_
    assert "256 heads" in found["call-270us"].reason
    assert "73 ms" in found["call-270us"].of("contradiction")[0].sentence
    assert "54,976 TFLOPS" in found["call-5us"].reason


@pytest.mark.slow
def test_the_shipped_claims_beside_the_recorded_run():
    found = shipped(True)
    assert found["call-270us"].of("measurement")[0].backend == "wmma"
    assert found["wmma-speedup"].of("measurement")[0].against > 5.7
    assert len(found["call-5us"].of("measurement")) == 2
    assert any("The fastest kernel measured" in f.sentence for f in found["call-270us"].of("physics"))


# ------------------------------------------------------------------------------------------------ data out


@pytest.mark.slow
def test_an_audit_is_frozen_plain_data_and_a_record():
    found = shipped(True)["call-270us"]
    with pytest.raises(FrozenInstanceError):
        found.verdict = "confirmed"
    trial = found.to_trial()
    again = Trial.model_validate_json(trial.model_dump_json())
    assert again.kind == "claim" and again.problem == REPORT and again.data == trial.data
    assert again.data["verdict"] == "impossible" and again.data["findings"][0]["check"] == "physics"
    assert set(library.VERDICTS) >= {a.verdict for a in shipped(False).values()}


# ------------------------------------------------------------------------------------------------ whatever comes

_numbers = st.one_of(
    st.integers(1, 10**25).map(str),
    st.floats(1e-300, 1e300).map(repr),
    st.sampled_from(["0.45", "270", "1e-9", "989.4", "1.98", "3.90", "1e200"]),
)
_workloads = st.sampled_from(["report", "latency", "report-causal", "B=1,H=1,Sq=1,Sk=1,D=1",
                              "B=9,H=4,Hkv=2,S=7,D=64,fp32",
                              f"B={10**40},H={10**40},S={10**200},D={10**60}"])  # fmt: skip
_names = st.sampled_from(["wmma", "scalar", "cublaslt-loop", "fa3", "nobody"])


@st.composite
def _claims(draw) -> str:
    texts = []
    for index in range(draw(st.integers(1, 5))):
        quantity = draw(st.sampled_from(sorted(UNITS)))
        unit = draw(st.sampled_from(sorted(UNITS[quantity] or ["things"])))
        keys = {}
        optional = {"workload": _workloads, "backend": _names, "counterpart": _names, "definition": st.just("words"),
                    "bound": st.sampled_from(["at least", "at most"]), "plus_minus": st.sampled_from([0, 0.5, 1e9]),
                    "gpu": st.sampled_from(["Toy"]), "may_mean": st.lists(_workloads, max_size=2),
                    "dtype": st.sampled_from(["float16", "bfloat16", "float32"]), "share": st.sampled_from([0.5, 1.0]),
                    "factors": st.lists(st.floats(1e-9, 1e300), max_size=4)}  # fmt: skip
        for key, values in optional.items():
            if draw(st.booleans()):
                keys[key] = draw(values)
        links = st.sampled_from([f"c{i}" for i in range(5)])
        for group in (["same_as"], ["of", "over"], ["part_of"]):
            if draw(st.integers(0, 2)) == 0:
                keys |= {key: draw(links) for key in group}
        texts.append(claim_text(f"c{index}", quantity, draw(_numbers), unit, **keys))
    return "".join(texts) + GPU


def _some_trials() -> list[Trial]:
    broken = [WMMA.model_copy(update={"timing": WMMA.timing.model_copy(update={"latency_us": v})})
              for v in (math.nan, math.inf, 0.0, -1.0)]  # fmt: skip
    odd = [Trial(kind="ceiling", data={"name": "matmul_fp16", "value": v}) for v in (None, "x", math.nan, True)]
    return [*broken, *odd, Trial(kind="attention_timing"), Trial(kind="paging"), *TRIALS[:60]]


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_claims(), st.sampled_from([(), tuple(_some_trials())]), st.sampled_from([{}, ENVIRONMENT, TOY]))
def test_any_claims_are_audited_or_refused_in_words(text, trials, environment):
    try:
        found = library.parse_claims(text)
    except ClaimsError as error:
        assert error.reason.endswith(".") and error.line
        return
    audits = library.audit(found, trials, environment=environment)
    assert [a.claim for a in audits] == list(found)
    for audit in audits:
        assert audit.verdict in library.VERDICTS and audit.reason.endswith((".", ")"))
        json.loads(audit.to_trial().model_dump_json())
        settled = {f.outcome for f in audit.findings} & {"impossible", "contradicted", "undefined", "confirmed"}
        assert (audit.verdict == "not checkable") == (not settled)


@given(st.floats(1e-3, 1e4), st.floats(1.3, 100), st.booleans())
def test_a_planted_contradiction_is_found_and_a_sound_pair_is_not_flagged(rate, factor, planted):
    """A rate, and the time that follows from it or one that is wrong by more than the digits allow."""
    time = REPORT.flops() / rate / 1e12 * (factor if planted else 1.0)
    a = claim_text("a", "tflops", f"{rate:.3e}", "TFLOPS", workload="report")  # four digits, zeros too
    b = claim_text("b", "latency_us", f"{time:.4e}", "s", workload="report", same_as=["a"])
    found = library.audit(library.parse_claims(a + b))
    assert {f.verdict for f in found} == {"contradicted" if planted else "confirmed"}


# ------------------------------------------------------------------------------------------------ the command


def test_ids_in_the_shipped_file_are_all_expected():
    assert list(SHIPPED) == [claim.id for claim in library.load_claims()]
    assert all(a.id != b.id for a, b in itertools.combinations(library.load_claims(), 2))
