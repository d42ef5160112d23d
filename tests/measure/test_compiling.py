"""Forms of kernels that are compiled ahead: those that the checks launch, each once, and none that nobody asks for."""

from __future__ import annotations

import pytest

from flashcore import backends
from flashcore.backends import CudaBackend, hopper
from flashcore.backends._contract import AVAILABLE
from flashcore.errors import CompileError
from flashcore.gpu import build
from flashcore.measure import check, compiling
from flashcore.problem import square

PLAIN = square(2, 8, 2048, 64)
SMALL = square(1, 2, 64, 64)


@pytest.fixture
def h200(monkeypatch):
    """A GPU, as far as the backends say."""
    monkeypatch.setattr(compiling.device, "has_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(hopper, "multiprocessors", lambda number: 132)
    monkeypatch.setattr(CudaBackend, "availability", lambda self: AVAILABLE)


def test_each_form_is_there_once_with_what_the_launch_would_compile(h200):
    ours = [backends.get(name) for name in ("hopper", "hopper-unsplit", "cpu", "sdpa-math")]
    masked = PLAIN.with_(causal=True, window_left=40)
    found = compiling.forms([(p, one) for p in (PLAIN, SMALL, masked, masked.with_(sink=True)) for one in ours], 0)
    small = (("FLASHCORE_NUM_CONSUMERS", 2), ("FLASHCORE_TILE_N", 64))
    assert [(form[0], form[3]) for form in found] == [
        ("attention_hopper", ()), ("attention_hopper", small), ("attention_hopper", (("FLASHCORE_MASKS", 1),)),
        ("attention_hopper", (("FLASHCORE_MASKS", 5),)),
    ]  # fmt: skip
    assert {form[1:3] for form in found} == {(64, "float16")} and {form[4] for form in found} == {None}


def test_what_a_backend_does_not_take_or_cannot_run_is_not_compiled(h200, monkeypatch):
    wide, one = PLAIN.with_(head_dim=96), backends.get("hopper")
    assert compiling.forms([(wide, one)], 0) == []
    monkeypatch.undo()
    assert one.availability().ok or compiling.forms([(PLAIN, one)], 0) == []


def test_the_forms_of_a_full_report_are_bounded(h200):
    problems, _ = check.named_problems("default", "full", gpu=True)
    found = compiling.tasks(check.pairs(problems, list(backends.all_backends())))
    assert 60 < len(found) < 160 and len({task.arguments for task in found}) == len(found)
    assert all(task.cost_s > 10 and task.owed[0]["kind"] == "build" and not task.timing for task in found)


def test_without_a_gpu_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiling.device, "has_gpu", lambda: False)
    assert compiling.tasks([(PLAIN, backends.get("hopper"))]) == []


def test_a_task_compiles_into_the_cache_and_leaves_what_does_not_compile_to_the_check(h200, monkeypatch):
    asked = []

    def compile_kernel(kernel, **given):
        asked.append((kernel, given))
        raise CompileError(kernel, "no")

    monkeypatch.setattr(compiling, "compile_kernel", compile_kernel)
    [task] = compiling.tasks([(PLAIN.with_(softcap=30.0), backends.get("hopper"))])
    assert list(task.trials()) == []
    given = {"head_dim": 64, "dtype": "float16", "source": None, "defines": {"FLASHCORE_MASKS": 2}}
    assert asked == [("attention_hopper", given)]
    assert task.owed[0]["source_hash"] == build.source_hash("attention_hopper", options=True)
    [trial] = task.failed("it hung")
    assert (trial.kind, trial.status, trial.data["defines"]) == ("build", "error", {"FLASHCORE_MASKS": 2})
