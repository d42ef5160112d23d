"""Diagnose in a process of its own: a function that crashes or never returns is a finding, and the caller goes on."""

from __future__ import annotations

import math
from typing import Any

from flashcore.bisection.diagnosis.calling import TIME_LIMIT_S, Broken, refuse_limit
from flashcore.bisection.diagnosis.diagnosing import Diagnosis, diagnose
from flashcore.bisection.diagnosis.screening import HOME, Inputs, Screened
from flashcore.errors import FlashCoreError, OutOfTime
from flashcore.gpu.isolation import Worker
from flashcore.numerics.inputs import refuse_seed
from flashcore.problem import Problem, parse_problem

WHOLE_LIMIT_S = 300.0
"""Seconds that a whole diagnosis may take."""


def diagnose_apart(
    place: str, problem: Problem | str | None = None, *, within_s: float = math.inf, **options: Any
) -> Diagnosis:
    """`diagnose` in a process of its own.

    Parameters
    ----------
    place
        ``FILE.py:function``, ``MODULE:function`` or the id of a backend: what another process can find too.
    problem, options
        As in `diagnose`, without `progress`.
    within_s
        Seconds for all of it, where there are fewer than a diagnosis may take.

    Returns
    -------
    Diagnosis
        Without tensors. A process that dies or hangs is a finding.

    Raises
    ------
    OutOfTime
        It did not end `within_s`, which says nothing of the function.
    """
    call_limit = options.get("time_limit_s", TIME_LIMIT_S)
    refuse_limit(call_limit)
    refuse_seed(options.get("seed", 0))
    limit = WHOLE_LIMIT_S + 2 * call_limit
    with Worker() as worker:
        outcome = worker.call(_bare, place, problem, options, timeout_s=min(limit, within_s))
    if outcome.how == "timeout" and within_s < limit:
        raise OutOfTime(place, within_s)
    if outcome.ok:
        found = outcome.value
        if isinstance(found, Diagnosis):
            return found
        kind, sentence = found
        error = kind.__new__(kind)  # its fields did not travel; its sentence did
        Exception.__init__(error, sentence)
        raise error
    asked = parse_problem(problem) if isinstance(problem, str) else problem or HOME
    kind = "hang" if outcome.how == "timeout" else "crash"
    broken = Broken(kind, f"It took its process with it: {outcome.reason.rstrip('.')}.")
    return Diagnosis(place, False, (Screened(Inputs(asked), None, broken=broken),), asked, seconds=outcome.seconds)


def _bare(
    place: str, problem: Problem | str | None, options: dict[str, Any]
) -> Diagnosis | tuple[type[FlashCoreError], str]:
    try:
        return diagnose(place, problem, **options).without_tensors()
    except FlashCoreError as error:
        return type(error), str(error)
