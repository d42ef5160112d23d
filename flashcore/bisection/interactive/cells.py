"""Show how far a question is, inside the cell that asked it, once it takes longer than a second."""

from __future__ import annotations

import sys
import time
from html import escape
from typing import Any

AFTER_S, EVERY_S = 1.0, 0.2
"""Seconds before anything is shown, and from one change of it to the next."""


def in_kernel() -> bool:
    """Whether this code runs in a kernel of Jupyter, whose cells show HTML."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


class CellProgress:
    """What `diagnose` and `bisect` take as `progress`: a bar in the cell, a line on a terminal, gone at the end.

    Use it as a context: ``with CellProgress() as progress: diagnose(fn, progress=progress)``.

    Parameters
    ----------
    after_s, every_s
        Seconds before anything is shown, and from one change to the next.
    """

    def __init__(self, *, after_s: float = AFTER_S, every_s: float = EVERY_S):
        self._next, self._every = time.monotonic() + after_s, every_s
        self._handle: Any = None
        self._written = 0

    def __enter__(self) -> CellProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._show_html("")
        if self._written:
            self._write("")

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say what is being done, and how many of `total` such steps are done."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        far = f"{done} of {total}"
        if in_kernel():
            self._show_html(f'<progress value="{done}" max="{total}">{far}</progress> {escape(what)}: {far}')
        elif sys.stderr.isatty():
            self._write(f"{what}: {far}")

    def _show_html(self, html: str) -> None:
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(html), display_id=True)
        else:
            self._handle.update(HTML(html))

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r{line.ljust(self._written)}\r")
        sys.stderr.flush()
        self._written = len(line)
