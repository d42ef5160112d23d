"""Chance is found at the stage where it comes in, with the element and both its values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flashcore import backends
from flashcore.backends.cpu import CpuBackend
from flashcore.bisection.faults.catalogue import get
from flashcore.errors import InvalidProblem
from flashcore.measure import determinism
from flashcore.measure.determinism import check_determinism
from flashcore.problem import square
from flashcore.records import Trial

PAGES = square(2, 2, 96, 16, page_size=32)


def test_a_right_backend_gives_the_same_bits():
    trial = check_determinism("cpu", PAGES, runs=4)
    assert (trial.kind, trial.variant, trial.status, trial.reason) == ("bisection", "determinism", "ok", None)
    assert trial.data["identical"] and trial.data["runs"] == 4 and trial.data["traced"]


def chancy(stage: str):
    """The cpu backend whose page 2 of one stage changes by the smallest amount from call to call."""
    calls = itertools.count()

    class Chancy(CpuBackend):
        id = "chancy"

    def method(self, *arguments):
        result = getattr(CpuBackend, stage)(self, *arguments)
        number = next(calls)
        if number % 3 == 2:  # page 2; traced and production calls follow one another
            result[1, 0, 5] = result[1, 0, 5] * (1 + number * 2.0**-20)
        return result

    setattr(Chancy, stage, method)
    return Chancy()


@pytest.mark.parametrize("stage", ["scores", "row_max", "rescale", "probs", "row_sum", "accum"])
def test_chance_is_found_at_the_stage_where_it_comes_in(stage):
    trial = check_determinism(chancy(stage), PAGES, runs=3)
    assert trial.status == "failed" and trial.data["first_stage"] == stage, trial.reason
    element = trial.data["element"]
    assert (element["batch"], element["head"], element["row"]) == (1, 0, 5)
    assert element.get("page", 2) == 2 and element.get("column", 64) // 32 in (0, 2)
    assert element["got"] != element["expected"] and trial.data["runs_that_differ"] == 2
    assert f"first in {stage}" in trial.reason and "row 5" in trial.reason
    assert Trial.model_validate_json(trial.model_dump_json()).data["first_stage"] == stage


def test_a_difference_in_production_alone_is_seen_and_a_constant_nan_is_none():
    class Different(CpuBackend):
        id = "different"
        calls = itertools.count()

        def run(self, q, k, v, problem):
            out, lse = super().run(q, k, v, problem)
            out[0, 0, 0, 0] = math.nan
            out[1, 1, 3, 2] += next(self.calls)
            return out, lse

    trial = check_determinism(Different(), PAGES, runs=2)
    assert trial.data["first_stage"] == "production out"
    assert trial.data["element"]["row"] == 3 and trial.data["differing"] == {"production out": 1}


def test_a_difference_in_lse_alone_is_seen():
    class Different(CpuBackend):
        id, traceable, calls = "different", False, itertools.count()

        def run(self, q, k, v, problem):
            out, lse = super().run(q, k, v, problem)
            lse[1, 0, 7] += next(self.calls)
            return out, lse

    trial = check_determinism(Different(), PAGES, runs=3)
    assert trial.status == "failed" and trial.data["first_stage"] == "production lse" and not trial.data["traced"]
    element = trial.data["element"]
    assert (element["batch"], element["head"], element["row"]) == (1, 0, 7) and trial.data["runs_that_differ"] == 2
    assert element["got"] == pytest.approx(element["expected"] + 1), "what came later beside what came first"


def test_of_a_stage_with_pages_the_first_page_is_named_wherever_it_lies():
    before, mask = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4, dtype=torch.bool)
    mask[0, 0, 2, 1] = mask[1, 0, 1, 3] = True
    found = determinism._element("row_max", mask, before, before + mask)
    assert found == {"batch": 1, "head": 0, "page": 1, "row": 3, "got": 1.0, "expected": 0.0}


def test_backends_without_stages_are_compared_by_their_results():
    trial = check_determinism("sdpa-math", PAGES, runs=2, device="cpu")
    assert trial.status == "ok" and not trial.data["traced"]


def test_the_planted_race_is_found_where_it_is():
    fault = get("G1")
    trial = check_determinism(fault.plant("cpu"), fault.problem, runs=2)
    assert trial.status == "failed" and trial.data["first_stage"] == "scores"


def test_errors():
    with pytest.raises(InvalidProblem, match="at least 2"):
        check_determinism("cpu", PAGES, runs=1)
    assert check_determinism("cpu", square(1, 1, 8, 64, dtype="float32"), runs=2).status == "ok"


@pytest.mark.gpu
def test_every_kernel_of_ours_gives_the_same_bits():
    for backend in backends.select("all", device="cuda"):
        if backend.role == "ours" and backend.availability().ok:
            for problem in (square(2, 16, 777, 64, causal=True), square(1, 16, 500, 128)):
                trial = check_determinism(backend, backend.suits(problem), runs=5)
                assert trial.status == "ok", trial.reason


def test_masked_problems_are_repeated_with_their_tensors():
    masked = square(3, 2, 40, 16).with_(sink=True, lengths="left", causal=True, window_left=5)
    trial = check_determinism("cpu", masked, runs=3)
    assert trial.status == "ok" and trial.data["identical"] and trial.problem == masked
