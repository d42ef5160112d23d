"""Bugs of the cpu backend: each is found at its stage."""

from __future__ import annotations

import pytest

from flashcore.bisection.bisecting import bisect
from flashcore.faults import catalogue
from flashcore.faults.catalogue import FAULTS

CPU = [f.id for f in FAULTS if "cpu" in f.plants]


@pytest.mark.parametrize("name", CPU)
def test_a_bug_of_the_cpu_backend_is_found_at_its_stage(name):
    fault = catalogue.get(name)
    assert bisect("cpu", fault.problem, pattern=fault.pattern).passed, "the clean run has to be silent"
    found = bisect(fault.plant("cpu"), fault.problem, pattern=fault.pattern)
    assert found.producers[:1] == [fault.stage], found.finding()
    first = found.first_row[1].first_bad
    assert first["stage"] == fault.stage and {"batch", "head", "row", "got", "expected"} <= set(first)
    assert found.window["stage"] == fault.stage and found.coverage["complete"]
