"""Find where a kernel goes wrong: each stage judged by itself and from the start, down to the first bad element.

`bisect` takes a backend that exposes its stages and names the stage, page and element that went wrong first.
`traced` keeps the stages to be looked at. `stagewise` holds what each may be off by, and `zoom` cuts out the
surroundings of a bad element.

Three rooms lie within: `diagnosis` does without stages, from the outputs of any function; `faults` plants bugs, to
prove that both find them; `interactive` shows a finding in a notebook. Each loads when it is asked for.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = dict.fromkeys(
    ("Bisection", "StageRow", "Traced", "bisect", "bisect_trial", "judge", "tasks", "traced"), "bisecting"
)

__all__ = [*_HOMES, "diagnosis", "faults", "interactive"]


def __getattr__(name: str):
    if name in _HOMES:  # loads torch, which the list of planted bugs does without
        return getattr(import_module(f"flashcore.bisection.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
