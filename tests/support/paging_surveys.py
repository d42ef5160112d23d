"""The survey of paging at the sizes of a CPU, and its records by what was measured."""

from __future__ import annotations

from flashcore.surveys.paging import facts
from flashcore.surveys.paging.plan import plan_for

PLAN = plan_for("quick", False)


def records(run, what):
    return facts.paging_trials(run.trials(), what)
