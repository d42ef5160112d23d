"""An inquiry into a function, for tests that ask one probe alone."""

from __future__ import annotations

from collections.abc import Callable

from flashcore.bisection.diagnosis.behaviour import RIGHT, Behaviour
from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.bisection.diagnosis.screening import Inputs, screen_one
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=40, seqlen_k=100, head_dim=32)
CAUSAL = PROBLEM.with_(causal=True)


def inquiry_of(
    function: Callable, problem: Problem = PROBLEM, patterns: tuple[str, ...] = ("normal",), *,
    known: Behaviour = RIGHT, strided: bool = False, lse: str | None = None,
) -> Inquiry:  # fmt: skip
    """An inquiry with those calls of these patterns that are wrong."""
    candidate = candidate_of(function, device="cpu", lse=lse)
    asked = [screen_one(candidate, Inputs(problem, pattern, strided=strided), again=True) for pattern in patterns]
    return Inquiry(candidate, problem, [one for one in asked if one.wrong], known)
