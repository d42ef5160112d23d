"""The survey: its records, how it resumes, and what it says when something fails; cuBLASLt itself is a stand-in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import synthetic_survey as synthetic

from flashcore.errors import ToolMissing
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Product
from flashcore.surveys.cublaslt import measuring
from flashcore.surveys.cublaslt.grid import (
    candidates_of,
    measured_us,
    peers_of,
    product_of,
    survey_grid,
    whole,
)  # fmt: skip

QK = Product(2048, 128, 64, transpose_b=True)


def test_every_candidate_of_the_reports_cases_is_a_record_with_every_attribute(run, stand_in):
    trials = measuring.survey(run, survey_grid("quick")[:2])
    qk = [t for t in trials if t.variant == "report-qk" and t.backend == "cublaslt"]
    assert [t.data["rank"] for t in qk] == [0, 1, 2, 3] and run.trials() == trials
    wanted = {
        "algo_id", "tile", "stages", "split_k", "reduction_scheme", "cta_swizzling", "custom_option", "inner_shape",
        "cluster_shape", "workspace_bytes", "waves_count", "rank", "kernel", "tensor_core", "compute_share",
        "memory_share", "product", "limit_mb",
    }  # fmt: skip
    assert all(wanted <= set(whole(t).data) for t in qk)
    first = whole(qk[0])
    latency_us = synthetic.times_of(QK, synthetic.offered(QK))[0]
    assert measured_us(first) == pytest.approx(latency_us, rel=1e-3) and first.timing.method == "graph_replay"
    assert first.timing.tflops == pytest.approx(QK.flops() / latency_us / 1e6, rel=1e-3)
    assert first.data["compute_share"] == pytest.approx(first.timing.tflops / 700.0, rel=1e-2)
    assert first.data["memory_share"] == pytest.approx(QK.bytes() / latency_us / 1e6 / 4.0, rel=1e-2)
    assert first.data["tile"] == "64x48" and first.data["tensor_core"] is True
    assert first.data["case"]["offered"] == 4 and product_of(first) == QK
    assert measured_us(peers_of(trials)["report-qk"]) == 3.25


def test_an_interrupted_survey_goes_on_where_it_was(run, stand_in, monkeypatch):
    cases = survey_grid("quick")[:6]
    monkeypatch.setattr(measuring, "CASES_A_PASS", 2)
    measuring.survey(run, cases[:4])
    complete = run.records_path.read_text().splitlines(keepends=True)
    run.records_path.write_text("".join(complete[:-1]))  # the last case lost a record, as when the process is killed
    stand_in.clear()
    said = []
    measuring.survey(run, cases, progress=said.append)
    assert stand_in == [c.product for c in cases[3:]]
    assert said[0] == "3 of 6 cases are in the records already" and said[1].startswith("1 of 3: row-pv")
    found = candidates_of(run.trials())
    assert len(found) == len({(t.variant, t.data["rank"]) for t in found}), "a case measured twice counts once"
    stand_in.clear()
    assert measuring.survey(run, cases) == [] and stand_in == []
    measuring.survey(run, cases[:1], resume=False)
    assert stand_in == [cases[0].product]


def test_what_fails_is_a_record_and_the_survey_goes_on(run, stand_in, monkeypatch):
    cases = [c for c in survey_grid("quick") if c.id in ("smallest-1x1x16", "report-qk", "smallest-8x8x16")]

    def measure(product, offered, **_):
        return [None if a.rank == 1 else 2.0 + a.rank for a in offered]

    monkeypatch.setattr(cublaslt, "measure", measure)
    monkeypatch.setattr(
        measuring, "measure_peer", lambda p: (_ for _ in ()).throw(ToolMissing("cuBLAS", "pip install"))
    )
    trials = measuring.survey(run, cases)
    refused = next(t for t in trials if t.variant == "smallest-1x1x16")
    assert refused.status == "error" and "CUBLAS_STATUS_NOT_SUPPORTED" in refused.reason
    assert product_of(refused) == Product(1, 1, 16)
    failed = next(t for t in trials if t.variant == "report-qk" and t.data.get("rank") == 1)
    assert failed.status == "error" and failed.reason and failed.timing is None
    peer = next(t for t in trials if t.backend == "cublas")
    assert peer.status == "error" and "cuBLAS" in peer.reason
    assert {t.variant for t in candidates_of(trials)} == {"report-qk", "smallest-8x8x16"}
    assert measuring.finished_cases(trials) == {c.id for c in cases}, "a failure is not measured again"


def test_an_exploratory_case_keeps_the_first_the_fastest_and_the_largest_workspace():
    case = next(c for c in survey_grid("full") if c.id == "batch-qk-4")
    one = synthetic.measured(case)
    one.offered[3] = replace(one.offered[3], workspace_bytes=4096)
    assert [t.data["rank"] for t in measuring.trials_of(one, None)] == [0, 1, 3]


def test_the_records_stay_small():
    trials = synthetic.survey_trials("full")
    lines = [t.model_dump_json() for t in trials]
    assert max(map(len, lines)) < 1000 and sum(map(len, lines)) < 270_000
    predicted = [t for t in trials if "prediction" in t.data.get("case", {})]
    assert {t.data["group"] for t in predicted} == {"report", "row", "deep"}


def test_without_cublaslt_a_survey_says_what_to_install(run, monkeypatch):
    def missing():
        raise ToolMissing("cuBLASLt (through nvmath-python)", "pip install 'flashcore[gpu]'")

    monkeypatch.setattr(cublaslt, "library", missing)
    with pytest.raises(ToolMissing, match="cuBLASLt"):
        measuring.survey(run, survey_grid("quick"))
    assert run.trials() == []
