"""Do the bits of a row depend on anything but its own query, its keys, its mask and the options? Random cases.

A case is one sequence and two ways to compute it: alone, among others, in pieces, in pages. `cases` draws settings,
`ways` the ways, `computing` computes them, `judging` compares bits, `measuring` makes the records, and `facts` reads
those. `compare` asks one case again, as the line does that stands with a break.
"""

from __future__ import annotations

from importlib import import_module

__all__ = ["Setting", "Way", "compare", "facts", "measuring"]

_PLACES = {"Setting": "cases", "Way": "ways", "compare": "judging"}


def __getattr__(name: str):
    if name in _PLACES:  # what computes loads torch, which reading records does without
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
