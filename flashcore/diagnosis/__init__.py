"""Diagnose any attention function, of whatever origin, from its inputs and outputs alone.

`diagnose` compares it with float64, probes it with inputs made so that an output reveals one step, and names the bug
that explains the wrong elements. `load` finds a function by file and name.
"""

from __future__ import annotations

from flashcore.diagnosis.calling import Answer, Candidate, candidate_of, load
from flashcore.diagnosis.diagnosing import Diagnosis, diagnose
from flashcore.diagnosis.naming import Hypothesis

__all__ = ["Answer", "Candidate", "Diagnosis", "Hypothesis", "candidate_of", "diagnose", "load"]
