"""Runs over time: two runs held against each other, the run before this one, and the trend of many.

`comparing` tests two runs on their samples and `interval` says what counts as a difference; `views` draws it all.
The records of finished runs are all that this folder reads: it needs neither torch nor a GPU.
"""

from __future__ import annotations

from flashcore.page.history.comparing import Comparison, compare_runs
from flashcore.page.history.runs import Snapshot, previous, read, runs_in

__all__ = [
    "Comparison",
    "Snapshot",
    "compare_runs",
    "comparing",
    "interval",
    "previous",
    "read",
    "runs_in",
    "since",
    "timings",
    "trend",
    "views",
]
