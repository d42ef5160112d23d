"""Steps are taken in each mode, timed next to each other, and what fails is its own result."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import PLAIN, made

from flashcore.errors import InvalidTiming, Unsupported
from flashcore.records import Timing
from flashcore.surveys.models import stepping
from flashcore.surveys.models.attending import Attention
from flashcore.surveys.models.plan import Work
from flashcore.surveys.models.stepping import Step, steps_of, time_steps

PROBLEM = Work(PLAIN, "prefill", 2, 13).problem("bfloat16")


def some(way: str, run) -> Step:
    return Step(way, "eager", run)


@torch.no_grad()
def test_a_step_reads_its_tokens_anew(tokens):
    model = made(PLAIN)
    found = steps_of(model, Attention("sdpa", PLAIN, None), tokens, ("eager",))
    assert list(found) == ["eager"] and found["eager"].name == "sdpa, eager"
    before = found["eager"].run()
    tokens.copy_(tokens.flip(0))
    assert torch.equal(found["eager"].run(), before.flip(0)) and before.shape == (2, 13, 97)


@torch.no_grad()
def test_what_keeps_a_way_from_a_mode_is_its_result(tokens):
    def refuses(layer, q, k, v):
        raise ValueError("no such layer")

    attention = Attention("sdpa", PLAIN, None)
    attention.__class__ = type("Refusing", (Attention,), {"__call__": lambda self, *given: refuses(*given)})
    found = steps_of(made(PLAIN), attention, tokens, ("eager",))
    assert isinstance(found["eager"], ValueError)


@torch.no_grad()
def test_what_a_way_refuses_is_not_given_to_the_compiler(tokens, monkeypatch):
    """The compiler follows the call up to the refusal, and then says something about its own limits."""

    def refuses(self, *given):
        raise Unsupported("sdpa", "it takes no window")

    monkeypatch.setattr(torch, "compile", lambda *a, **b: lambda: pytest.fail("it was refused before"))
    attention = Attention("sdpa", PLAIN, None)
    attention.__class__ = type("Refusing", (Attention,), {"__call__": refuses})
    found = steps_of(made(PLAIN), attention, tokens, ("eager", "compiled"))
    assert found["compiled"] is found["eager"] and found["eager"].reason == "it takes no window"


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_step_is_one_graph(tokens, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **b: compiled(*a, backend="aot_eager", **b))
    model = made(PLAIN)
    found = steps_of(model, Attention("flashcore", PLAIN, None), tokens, ("eager", "compiled"))
    torch.testing.assert_close(found["compiled"].run(), found["eager"].run(), rtol=0.02, atol=0.02)
    torch.compiler.reset()


def test_steps_are_timed_in_turn_and_share_a_round(monkeypatch):
    taken = []
    steps = [some(way, lambda way=way: taken.append(way)) for way in "abc"]
    found = time_steps(steps, PROBLEM, rounds=3, most_rounds=3, gpu=False)
    assert taken == [*"abc", *"bca", *"cab"], "nobody is always first"
    assert len({timing.round for timing in found.values()}) == 1
    for timing in found.values():
        assert isinstance(timing, Timing) and timing.method == "host" and len(timing.samples_us) == 3
        assert timing.tflops is None, "operations of attention alone over a whole step are no rate"


def test_rounds_go_on_until_the_medians_are_narrow(monkeypatch):
    asked = []
    monkeypatch.setattr(stepping, "is_narrow", lambda samples: asked.append(len(samples)) or len(samples) >= 5)
    found = time_steps([some("a", lambda: None)], PROBLEM, rounds=2, most_rounds=9, gpu=False)
    assert len(found["a, eager"].samples_us) == 5 and asked == [2, 3, 4, 5]
    monkeypatch.setattr(stepping, "is_narrow", lambda samples: False)
    assert (
        len(time_steps([some("a", lambda: None)], PROBLEM, rounds=2, most_rounds=4, gpu=False)["a, eager"].samples_us)
        == 4
    )


def test_rounds_end_when_their_time_is_up(monkeypatch):
    monkeypatch.setattr(stepping, "is_narrow", lambda samples: False)
    monkeypatch.setattr(stepping, "MORE_S", 0.0)
    found = time_steps([some("a", lambda: None)], PROBLEM, rounds=3, most_rounds=50, gpu=False)
    assert len(found["a, eager"].samples_us) == 3, "the first rounds are always taken"


def test_a_step_that_fails_or_takes_no_time_is_no_timing(monkeypatch):
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    found = time_steps([some("a", fails), some("b", lambda: None)], PROBLEM, rounds=3, most_rounds=3, gpu=False)
    assert isinstance(found["a, eager"], RuntimeError) and len(found["b, eager"].samples_us) == 3 and len(calls) == 2
    monkeypatch.setattr(stepping, "_sample_us", lambda step, gpu: 0.0)
    assert isinstance(time_steps([some("b", lambda: None)], PROBLEM, rounds=1, most_rounds=1, gpu=False)["b, eager"],
                      InvalidTiming)  # fmt: skip
