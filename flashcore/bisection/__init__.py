"""Find where a kernel goes wrong: each stage judged by itself and from the start, down to the first bad element.

`bisect` takes a backend that exposes its stages and names the stage, page and element that went wrong first.
`traced` keeps the stages to be looked at. `stagewise` holds what each may be off by, and `zoom` cuts out the
surroundings of a bad element.
"""

from __future__ import annotations

from flashcore.bisection.bisecting import Bisection, StageRow, Traced, bisect, bisect_trial, judge, tasks, traced

__all__ = ["Bisection", "StageRow", "Traced", "bisect", "bisect_trial", "judge", "tasks", "traced"]
