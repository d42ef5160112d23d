"""Diagnose any attention function, of whatever origin, from its inputs and outputs alone.

`diagnose` compares it with float64, probes it with inputs made so that an output reveals one step, and names the bug
that explains the wrong elements; `diagnose_apart` does so in a process of its own. `load` finds a function by file and
name, `see` shows a wrong answer element by element, and `write_test` keeps the smallest failing case as a test.
`conform` asks for the promises of attention, one by one: memory past the end, empty rows, odd strides, graphs and the
like. `adopt` makes a backend of a function.
"""

from __future__ import annotations

from flashcore.bisection.diagnosis.adopting import adopt, write_plugin
from flashcore.bisection.diagnosis.apart import diagnose_apart
from flashcore.bisection.diagnosis.calling import Answer, Candidate, candidate_of, load
from flashcore.bisection.diagnosis.conforming import Conformance, conform, conform_all, conform_apart, conform_tasks
from flashcore.bisection.diagnosis.diagnosing import Diagnosis, diagnose
from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.promises.asking import Promise
from flashcore.bisection.diagnosis.promises.registry import PROMISES
from flashcore.bisection.diagnosis.seeing import Seen, see
from flashcore.bisection.diagnosis.writing import write_test

__all__ = [
    "PROMISES", "Answer", "Candidate", "Conformance", "Diagnosis", "Hypothesis", "Promise", "Seen", "adopt",
    "candidate_of", "conform", "conform_all", "conform_apart", "conform_tasks", "diagnose", "diagnose_apart", "load",
    "see", "write_plugin", "write_test",
]  # fmt: skip
