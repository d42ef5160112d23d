"""The survey, on a smoke test: tokens before times, a wrong kernel found out, and every failure a record."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from support.tiny_models import MIXED, PLAIN, made

from flashcore.errors import BackendUnavailable, Unsupported
from flashcore.surveys.models import measuring, stepping
from flashcore.surveys.models.attending import EXACT, OURS, Attention
from flashcore.surveys.models.measuring import generated_logits, measure
from flashcore.surveys.models.plan import Plan, Work, plan_for

PLAN = Plan(
    gpu=False, profile="quick", works=(Work(MIXED, "prefill", 2, 12), Work(MIXED, "decode", 2, 17)),
    ways=("flashcore", "sdpa"), modes=("eager",), rounds=2, most_rounds=2, page_size=16, generated=5, prompts=(2, 9),
    checks=2,
)  # fmt: skip


def by_name(trials):
    return {(t.data["what"], t.backend): t for t in trials}


def test_tokens_come_first_and_then_times_with_the_share_of_attention(run):
    trials = measure(run, PLAN, seed=4)
    assert [t.model_dump() for t in run.trials(kind="model")] == [t.model_dump() for t in trials]
    assert [t.data["what"] for t in trials] == ["tokens"] * 2 + ["prefill"] * 3 + ["decode"] * 3
    assert {t.status for t in trials} == {"ok"} and all(t.data["smoke"] for t in trials)
    roles = {t.backend: t.data.get("role") for t in trials}
    assert roles == {"flashcore": None, "sdpa": "peer", "left out": "peer"}, "what they lose is no regression of ours"
    found = by_name(trials)
    assert found["tokens", "flashcore"].data["positions"] == 5 * 2 and found["tokens", "flashcore"].timing is None
    for what, positions in (("prefill", 24), ("decode", 4)):
        ours, without = found[what, "flashcore"], found[what, "left out"]
        assert ours.data["positions"] == positions and ours.data["agreed"] == ours.data["decided"] > 0
        assert ours.timing.round == without.timing.round and "decided" not in without.data
        pairs = zip(ours.timing.samples_us, without.timing.samples_us, strict=True)
        share = statistics.median(1 - other / mine for mine, other in pairs)
        assert ours.data["attention_share"] == pytest.approx(share, abs=1e-3) and share < 1
        assert ours.problem == PLAN.works[what == "decode"].problem("bfloat16")
        rate = ours.data["tokens"] / ours.timing.latency_us * 1e6
        assert ours.data["tokens_per_s"] == pytest.approx(rate, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("shape", [PLAIN, MIXED], ids=lambda shape: shape.id)
def test_a_cache_that_grows_gives_what_a_whole_forward_pass_gives(shape, tokens):
    model = made(shape)
    logits = generated_logits(model, OURS, tokens, 20, page_size=16)
    later = logits[:-1].argmax(-1).mT
    whole = model(torch.cat([tokens, later], 1), 0, Attention(EXACT, shape, model.sinks))[:, 12:]
    torch.testing.assert_close(logits.transpose(0, 1), whole, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("work", PLAN.works, ids=lambda work: work.phase)
def test_a_wrong_kernel_is_wrong_whatever_its_speed(run, monkeypatch, work):
    """One that gives each head, in the second layer, what belongs to its neighbour."""
    right = Attention.__call__

    def wrong(self, layer, q, k, v):
        out = right(self, layer, q, k, v)
        return out if self.way != OURS or layer == 0 else torch.cat([out[:, 1:], out[:, :1]], 1)

    monkeypatch.setattr(Attention, "__call__", wrong)
    found = by_name(measure(run, dataclasses.replace(PLAN, works=(work,))))
    assert found["tokens", "flashcore"].status == found[work.phase, "flashcore"].status == "failed"
    assert "decided tokens are others" in found[work.phase, "flashcore"].reason
    assert found[work.phase, "sdpa"].status == "ok" and found[work.phase, "flashcore"].timing is not None


def test_what_is_not_here_or_not_taken_is_a_record(run, monkeypatch):
    class Missing:
        def require(self):
            raise BackendUnavailable("fa3", "it is not installed", "pip install it")

    monkeypatch.setattr(measuring.backends, "get", lambda name: Missing())
    plan = dataclasses.replace(PLAN, ways=("flashcore", "sdpa", "sdpa-cudnn", "fa3"), works=PLAN.works[:1])
    found = by_name(measure(run, plan))
    assert found["tokens", "fa3"].status == "unavailable" and ("prefill", "fa3") not in found
    assert found["tokens", "fa3"].reason == "it is not installed; to mend it: pip install it"
    assert found["prefill", "sdpa-cudnn"].status == "unsupported"
    assert found["prefill", "sdpa-cudnn"].reason == "torch gives cuDNN no window and no sink"
    assert found["prefill", "flashcore"].status == "ok"


def test_a_step_that_fails_costs_no_other(run, monkeypatch):
    sample = stepping._sample_us

    def fails(step, gpu):
        if step.way == "flashcore":
            raise MemoryError("full")
        return sample(step, gpu)

    monkeypatch.setattr(stepping, "_sample_us", fails)
    found = by_name(measure(run, PLAN))
    assert found["prefill", "flashcore"].status == found["decode", "flashcore"].status == "error"
    assert found["prefill", "flashcore"].reason == "MemoryError: full" and found["decode", "sdpa"].status == "ok"


def test_the_reason_is_found_inside_of_what_torchs_compiler_raises():
    def raised(inner):
        try:
            raise RuntimeError("a graph of many lines") from inner
        except RuntimeError as error:
            return measuring._outcome(error)

    assert raised(Unsupported("fa4", "it takes no window")) == ("unsupported", "it takes no window")
    assert raised(RuntimeError("No available kernel. Aborting execution."))[0] == "unsupported"
    assert raised(None) == ("error", "RuntimeError: a graph of many lines")


@pytest.mark.gpu
def test_every_mode_on_a_gpu(run):
    works = plan_for("quick", False).works
    plan = dataclasses.replace(
        plan_for("full", True), page_size=128, rounds=3, most_rounds=3, generated=4, prompts=(2, 40),
        works=tuple(dataclasses.replace(work, length=300) for work in works),
    )  # fmt: skip
    trials = measure(run, plan)
    ours = [t for t in trials if t.backend in ("flashcore", "sdpa")]
    assert {t.status for t in ours} == {"ok"}, [(t.variant, t.reason) for t in ours if t.status != "ok"]
    assert {t.data["mode"] for t in ours if t.data["what"] != "tokens"} == {"eager", "compiled", "graph"}
    bad = [t for t in trials if t.status not in ("ok", "unsupported", "unavailable")]
    assert not bad, [(t.backend, t.variant, t.reason) for t in bad]


def test_a_step_that_took_its_process_with_it_is_not_taken_here(run, monkeypatch):
    died = {(PLAN.works[0], "sdpa"): "it did not survive"}
    monkeypatch.setattr(measuring, "compile_ahead", lambda plan, ways, **more: died)
    found = by_name(measure(run, PLAN))
    assert [found[what, "sdpa"].status for what in ("tokens", "prefill", "decode")] == ["error", "error", "ok"]
    assert found["tokens", "sdpa"].reason == found["prefill", "sdpa"].reason == "it did not survive"
    assert found["prefill", "flashcore"].status == "ok"
