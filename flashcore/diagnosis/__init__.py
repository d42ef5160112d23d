"""Diagnose any attention function, of whatever origin, from its inputs and outputs alone.

`diagnose` compares it with float64, probes it with inputs made so that an output reveals one step, and names the bug
that explains the wrong elements; `diagnose_apart` does so in a process of its own. `load` finds a function by file and
name, and `write_test` keeps the smallest failing case as a test.
"""

from __future__ import annotations

from flashcore.diagnosis.apart import diagnose_apart
from flashcore.diagnosis.calling import Answer, Candidate, candidate_of, load
from flashcore.diagnosis.diagnosing import Diagnosis, diagnose
from flashcore.diagnosis.naming import Hypothesis
from flashcore.diagnosis.writing import write_test

__all__ = [
    "Answer", "Candidate", "Diagnosis", "Hypothesis", "candidate_of", "diagnose", "diagnose_apart", "load",
    "write_test",
]  # fmt: skip
