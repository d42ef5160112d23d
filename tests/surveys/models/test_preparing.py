"""What a step needs is the same in every process, and steps are compiled ahead where there are processes for that."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from support.tiny_models import MIXED, PLAIN

from flashcore.surveys.models import preparing, stepping
from flashcore.surveys.models.plan import MODES, Plan, Work

PLAN = Plan(
    gpu=False, profile="quick", works=(Work(MIXED, "prefill", 2, 12), Work(MIXED, "decode", 2, 17)),
    ways=("flashcore", "sdpa"), modes=("eager",), rounds=2, most_rounds=2, page_size=16, generated=5, prompts=(2, 9),
)  # fmt: skip
ON_GPU = dataclasses.replace(PLAN, gpu=True, modes=MODES)


class Told:
    """Processes that end as told."""

    def __init__(self, ends):
        self.ends, self.closed = ends, False

    def perform(self, works, record, progress=None):
        self.tasks = works[0].tasks
        found = []
        for task in self.tasks:
            reason, crashed = self.ends.get(task.arguments[2], ("it raised", False))
            found += task.failed(reason, crashed=crashed)
        return [found]

    def close(self):
        self.closed = True


@torch.no_grad()
def test_a_process_that_is_told_of_one_step_has_the_model_and_caches_of_the_whole_plan():
    more = dataclasses.replace(PLAN, works=(*PLAN.works, Work(PLAIN, "prefill", 1, 99)))
    whole, alone = (preparing.model_of(plan, MIXED, 3) for plan in (more, PLAN))
    assert whole.cos.shape == alone.cos.shape == (18, MIXED.head_dim // 2), "positions for the longest of its own steps"
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), alone.parameters(), strict=True))
    assert torch.equal(preparing.step_tokens(PLAN, PLAN.works[0], 3), preparing.step_tokens(more, PLAN.works[0], 3))
    assert preparing.step_tokens(PLAN, PLAN.works[1], 3).shape == (2, 1)
    assert preparing.kept(PLAN, PLAN.works[0], 3) is None and preparing.kept(PLAN, PLAN.works[1], 3).pages is not None


@pytest.mark.slow
def test_steps_are_compiled_in_processes_that_may_die_and_only_what_died_is_barred(monkeypatch, tmp_path):
    pool, said = Told({"fa4": ("It exceeded 150 s and was ended.", True)}), []
    asked = {}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    noted, older, other = (tmp_path / "ab" / name for name in ("x.best_config", "y.best_config", "x.py"))
    for file in (noted, older, other):
        file.write_text("{}")
    os.utime(older, (1e9, 1e9))
    monkeypatch.setattr(preparing, "crew", lambda here, most: asked.update(most=most) or pool)
    monkeypatch.setattr(preparing.device, "memory_bytes", lambda: 80 << 30)
    barred = preparing.compile_ahead(ON_GPU, ("flashcore", "fa4"), seed=3, progress=said.append)
    assert set(barred) == {(work, "fa4") for work in PLAN.works} and asked["most"] == 8
    assert "did not survive: It exceeded 150 s" in barred[PLAN.works[0], "fa4"]
    assert pool.closed, "the memory of the card is free again before anything is timed"
    left = sorted(file.name for file in (tmp_path / "ab").iterdir())
    assert left == ["x.py", "y.best_config"], "what was quicker beside others is found out again"
    assert len(pool.tasks) == 4 and said == ["compiling 4 steps ahead"]


def test_nothing_is_compiled_ahead_without_processes_or_without_a_compiled_mode(monkeypatch):
    monkeypatch.setattr(preparing, "crew", lambda here, most: here)
    monkeypatch.setattr(preparing.device, "memory_bytes", lambda: 80 << 30)
    assert preparing.compile_ahead(ON_GPU, ("flashcore",)) == {}
    monkeypatch.setattr(preparing, "crew", lambda here, most: pytest.fail("there is nothing to compile"))
    assert preparing.compile_ahead(PLAN, ("flashcore",)) == {}
    assert preparing.compile_ahead(dataclasses.replace(ON_GPU, modes=("eager",)), ("flashcore",)) == {}


@pytest.mark.slow
def test_a_step_is_compiled_on_one_core_and_its_failure_is_told(monkeypatch):
    import torch._inductor.config as inductor

    seen = []

    def steps(model, attention, tokens, modes):
        seen.append((attention.way, attention.position, tuple(tokens.shape), list(modes), inductor.compile_threads))
        return {"compiled": ValueError("no such kernel") if attention.way == "fa4" else stepping.Step("", "", None)}

    monkeypatch.setattr(preparing, "steps_of", steps)
    monkeypatch.setattr(inductor, "compile_threads", 7)
    (fine,) = preparing._compiled(PLAN, PLAN.works[0], "sdpa", 3)
    (failed,) = preparing._compiled(PLAN, PLAN.works[1], "fa4", 3)
    assert seen == [("sdpa", 0, (2, 12), ["compiled"], 1), ("fa4", 17, (2, 1), ["compiled"], 1)]
    assert fine.status == "ok" and failed.reason == "ValueError: no such kernel" and not failed.data
