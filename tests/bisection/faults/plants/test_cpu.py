"""Bugs of the cpu backend: each is found at its stage."""

from __future__ import annotations

import functools

import pytest

from flashcore import backends
from flashcore.bisection.bisecting import bisect
from flashcore.bisection.faults import catalogue, planting
from flashcore.bisection.faults.catalogue import FAULTS
from flashcore.bisection.faults.plants import cpu
from flashcore.problem import Problem

CPU = [f.id for f in FAULTS if "cpu" in f.plants]


@functools.cache
def clean_run(problem: Problem, pattern: str):
    """What is right, beside which several bugs are planted."""
    return bisect("cpu", problem, pattern=pattern)


@pytest.mark.parametrize("name", CPU)
@pytest.mark.slow
def test_a_bug_of_the_cpu_backend_is_found_at_its_stage(name):
    fault = catalogue.get(name)
    assert clean_run(fault.problem, fault.pattern).passed, "the clean run has to be silent"
    found = bisect(fault.plant("cpu"), fault.problem, pattern=fault.pattern)
    assert found.producers[:1] == [fault.stage], found.finding()
    first = found.first_row[1].first_bad
    assert first["stage"] == fault.stage and {"batch", "head", "row", "got", "expected"} <= set(first)
    assert found.window["stage"] == fault.stage and found.coverage["complete"]


def test_every_wrong_method_is_one_of_the_backends_own():
    for name, plant in cpu.CPU.items():
        assert plant.methods and all(hasattr(type(backends.get("cpu")), method) for method in plant.methods), name


def test_a_page_that_comes_too_early_is_unlike_the_run_before():
    import torch

    planted = cpu.CPU["G1"].apply(backends.get("cpu"))
    q = k = torch.ones(1, 1, 64, 64)
    first, again = (planted.scores(q, k, planting.PLAIN, slice(0, 64)) for _ in range(2))
    assert not torch.equal(first, again)


def test_a_change_of_a_result_gets_what_the_method_gave_and_was_given():
    planted = cpu._after("row_sum", lambda total, *given: (total, len(given))).apply(backends.get("cpu"))
    import torch

    ones = torch.ones(1, 1, 2)
    total, given = planted.row_sum(ones, ones, torch.ones(1, 1, 2, 64))
    assert total.tolist() == [[[65.0, 65.0]]] and given == 3
