"""Runs over time: two runs compared by a test on their samples, the run before this one, and the trend of many."""

from __future__ import annotations

from flashcore.history.comparing import Comparison, compare_runs
from flashcore.history.runs import Snapshot, previous, read, runs_in

__all__ = ["Comparison", "Snapshot", "compare_runs", "previous", "read", "runs_in"]
