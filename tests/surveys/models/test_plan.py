"""What a survey of models measures: the shapes that people run, and on a CPU a smoke test that says so."""

from __future__ import annotations

import pytest

from flashcore.errors import UnknownName
from flashcore.problem import Problem
from flashcore.surveys.models.plan import ALTERNATING, MODES, WAYS, Work, plan_for


def test_a_gpu_measures_three_shapes_in_every_mode():
    plan = plan_for("full", True)
    assert not plan.smoke and plan.modes == MODES and plan.ways == WAYS and plan.device == "cuda"
    assert [(w.shape.id, w.phase) for w in plan.works] == [
        (shape, phase) for shape in ("llama-64", "llama-128", "alternating-64") for phase in ("prefill", "decode")
    ]
    assert {s.head_dim for s in plan.shapes()} == {64, 128} and all(s.heads_q > s.heads_kv for s in plan.shapes())
    assert (ALTERNATING.window, ALTERNATING.sink, ALTERNATING.heads_q, ALTERNATING.heads_kv) == (1024, True, 64, 8)
    assert [ALTERNATING.windowed(layer) for layer in range(3)] == [True, False, True]
    assert plan.prompts[1] > ALTERNATING.window, "or the window hides nothing from the tokens that are compared"
    quick = plan_for("quick", True)
    assert {s.layers for s in quick.shapes()} == {2}, "one with a window and one without"
    assert quick.rounds < plan.rounds


def test_a_cpu_takes_a_smoke_test():
    plan = plan_for("quick", False)
    assert plan.smoke and plan.modes == ("eager",) and plan.device == "cpu"
    assert max(w.tokens for w in plan.works) < 200 and max(s.hidden for s in plan.shapes()) == 128
    assert plan.prompts[1] > plan.shapes()[1].window


def test_a_step_says_what_attention_it_holds():
    work = Work(ALTERNATING, "decode", 3, 100)
    assert work.tokens == 3
    assert work.problem("bfloat16") == Problem(batch=3, num_heads_q=64, num_heads_kv=8, seqlen_q=1, seqlen_k=101,
                                               head_dim=64, dtype="bfloat16")  # fmt: skip
    prompt = Work(ALTERNATING, "prefill", 3, 100)
    assert prompt.tokens == 300 and prompt.problem("bfloat16").causal and prompt.problem("bfloat16").seqlen_k == 100
    assert ALTERNATING.words().endswith("head_dim 64, window 1024 in every second layer, sinks")


def test_some_of_the_models():
    plan = plan_for("full", True)
    assert plan.of_shapes("all") is plan
    assert {w.shape.id for w in plan.of_shapes("llama-128, alternating-64").works} == {"llama-128", "alternating-64"}
    for wrong in ("llama", "", "all, llama-64"):
        with pytest.raises(UnknownName, match="There is no model"):
            plan.of_shapes(wrong)
    with pytest.raises(UnknownName, match="There is no profile 'fast'"):
        plan_for("fast", True)
