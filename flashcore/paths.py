"""Where the project's own files lie: kernels, notebooks and report files, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The folder of the package itself."""
HOME = PACKAGE.parent
"""What the package lies in: the root of a checkout, or the folder of installed packages."""


def data_dir(name: str) -> Path:
    """The folder `kernels`, `notebooks` or `reports`: beside the package in a checkout, inside it once installed."""
    checkout = HOME / name
    packaged = PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else checkout
