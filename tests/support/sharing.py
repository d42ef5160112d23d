"""What is dear to make is made once, by whichever worker of pytest-xdist needs it first."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, filled by ``make(folder)`` unless a worker did so before; others wait until it is whole.

    What a broken ``make`` left behind stays, and the next worker tries again in the same folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the end of the process frees it as well
        done = folder.with_name(f"{folder.name}.made")
        if not done.exists():
            make(folder)
            done.touch()
    return folder
