"""What is read from records of served models and of decode against dense attention: invented ones, whose answer is
known."""

from __future__ import annotations

import pytest
from support import synthetic_paging as synthetic

from flashcore.surveys.paging import serving_facts as facts
from flashcore.surveys.paging.serving_facts import INVARIANT, LENGTHS, OURS, PREFIX, SHAPES, TOKENS

SERVING = synthetic.serving()
PLAIN = synthetic.shapes()


def changed(trials, variant, **fields):
    return [t.model_copy(update=fields) if t.variant == variant else t for t in trials]


def test_models_by_batch_with_every_way():
    found = facts.served(SERVING)
    assert len(found) == 12 and [one.batch for one in found[:4]] == [1, 16, 64, 256]
    one = found[2]
    assert one.model == "Llama-3.1-8B" and set(one.ways) >= {OURS, INVARIANT, "dense"}
    assert facts.rate(one.ours) == pytest.approx(64 / (32 * one.ours.timing.latency_us * 1e-6))
    assert facts.cost_of_invariance(one) == pytest.approx(0.1)
    assert facts.share_of_sheet(one.ours) == pytest.approx(one.ours.data["tbs"] / 4.8)
    assert one.good("FlashInfer, tensor cores", "FlashInfer, CUDA cores").variant == "FlashInfer, tensor cores"


def test_a_model_whose_step_is_wrong_or_of_the_cpu_has_no_rate():
    slow = synthetic.timing(9.0, method="host")
    assert facts.served(changed(SERVING, OURS, status="failed")) == []
    assert (
        facts.served(changed(SERVING, OURS, timing=slow))
        == []
        == facts.shapes([t.model_copy(update={"timing": slow}) for t in PLAIN])
    )


def test_what_a_refused_mode_costs_is_not_known_and_the_reason_is():
    refused = {"status": "unsupported", "reason": "it does not promise them", "timing": None, "data": {
        "what": "serving", "shape": "Llama-3.1-8B", "batch": 64}}  # fmt: skip
    trials = changed(SERVING, INVARIANT, **refused)
    assert all(facts.cost_of_invariance(one) is None for one in facts.served(trials))
    assert facts.refusals(trials, "serving") == {INVARIANT: "it does not promise them"}


def test_the_best_read_is_of_whoever_read_fastest():
    best = facts.best_read([*SERVING, *PLAIN])
    assert best.data["tbs"] == max(t.data["tbs"] for t in [*SERVING, *PLAIN]) and facts.best_read([]) is None
    wrong = [t.model_copy(update={"status": "failed"}) if t.data["tbs"] == best.data["tbs"] else t for t in PLAIN]
    assert facts.best_read([*SERVING, *wrong]).data["tbs"] < best.data["tbs"]


def test_shapes_by_dtype_with_their_pages_and_the_fastest_dense_step():
    found = facts.shapes(PLAIN)
    assert len(found) == 10 and {one.problem.dtype for one in found} == {"float16", "bfloat16"}
    assert all(list(one.pages) == [16, 64, 128] and one.dense.variant == "dense" for one in found)
    rows = PLAIN[0].model_copy(update={"variant": "dense, group as rows", "timing": synthetic.timing(1.0)})
    assert facts.shapes([*PLAIN, rows])[0].dense.variant == "dense, group as rows"


def test_further_cases_by_the_way():
    assert set(facts.further(PLAIN, TOKENS)) == {"1 query token", "2 query tokens", "4 query tokens"}
    assert set(facts.further(PLAIN, PREFIX)) == {"prefix shared", "nothing shared"}
    assert facts.further(PLAIN, LENGTHS)[OURS].data["tokens"] == 500_000


def test_who_is_not_here_is_named():
    gone = synthetic.trial(SHAPES, "flashinfer", status="unavailable", reason="not installed")
    assert facts.absent([*PLAIN, gone], SHAPES) == {"flashinfer": "not installed"} and facts.absent([gone], "x") == {}
