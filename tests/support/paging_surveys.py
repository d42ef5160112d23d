"""The survey of paging at the sizes of a CPU, and its records by what was measured."""

from __future__ import annotations

from flashcore.paging_survey import facts
from flashcore.paging_survey.plan import plan_for

PLAN = plan_for("quick", False)


def records(run, what):
    return facts.paging_trials(run.trials(), what)
