"""Planted bugs on a GPU: run all of some backends, and the backends clean where they are planted."""

from __future__ import annotations

import difflib

from flashcore import backends
from flashcore.bisection.bisecting import bisect
from flashcore.bisection.faults import catalogue
from flashcore.bisection.faults.planting import Source


def run_and_find_all(names, plants):
    """Every bug of these backends, each found at its stage; the trials."""
    from flashcore.bisection.faults.proving import run_faults

    trials = run_faults(None, backends.select(names))
    planted = [t for t in trials if t.data["outcome"] != "not applicable"]
    assert len(planted) == len(plants) + 1, "F13 is planted whichever the backends are"
    wrong = [(t.variant, t.backend, t.data["outcome"], t.reason) for t in planted if t.status != "ok"]
    assert wrong == []
    return trials


def assert_clean_where_bugs_are_planted(backend):
    """Every problem and pattern of the bugs that are planted there."""
    planted = [fault for fault in catalogue.planted_in(backend.id) if fault.stage != "survey"]
    for problem, pattern in {(f.problem_in(backend.id), f.pattern) for f in planted}:
        found = bisect(backend, problem, pattern=pattern)
        assert found.passed, f"{problem.label()}, {pattern}: {found.finding()}"


def code_lines(text: str) -> list[str]:
    """Lines of a kernel's source without comments and the spaces around them."""
    return [line for raw in text.splitlines() if (line := raw.partition("//")[0].strip())]


def instructions_apart(kernel: str, plant: Source) -> list[str]:
    """What a patch takes out (`-`) of a kernel and puts in (`+`), line by line."""
    before, after = (code_lines(text) for text in (plant.unpatched(kernel), plant.text(kernel)))
    return [
        line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")
    ]
