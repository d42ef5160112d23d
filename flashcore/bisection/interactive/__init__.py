"""Look at what goes wrong inside a notebook cell: the finding, maps of errors, and the numbers around one element.

`debug` takes any function or backend; what it returns shows itself, with sliders where ipywidgets is installed, and can
be printed anywhere. `load_magics` gives a notebook ``%diagnose`` and ``%bisect``, and `CellProgress` shows in a cell
how far a long question is.
"""

from __future__ import annotations

from flashcore.bisection.interactive.cells import CellProgress
from flashcore.bisection.interactive.debugging import Debugging, debug
from flashcore.bisection.interactive.magics import load_magics

__all__ = ["CellProgress", "Debugging", "debug", "load_magics"]
