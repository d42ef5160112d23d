"""Lay the notebooks out to be worked in: copies that git ignores, so that an edit in JupyterLab reaches no report."""

from __future__ import annotations

from pathlib import Path

from flashcore.errors import FlashCoreError
from flashcore.paths import HOME, data_dir
from flashcore.records import write_whole

PRISTINE = ".as-shipped"
"""Folder beside the copies that keeps each as it was laid out: it tells whose version a copy is."""


def workbench_dir() -> Path:
    """The folder of the copies: ``lab/`` of the checkout, or of the current folder for an installed package."""
    return (HOME if (HOME / "pyproject.toml").is_file() else Path.cwd()) / "lab"


def lay_out(folder: Path | None = None, *, notebooks_dir: Path | None = None) -> tuple[Path, list[str]]:
    """Copy every notebook into a folder to work in; a copy that its user changed is never written over.

    Parameters
    ----------
    folder
        Where to; default `workbench_dir`.
    notebooks_dir
        Other notebooks than FlashCore's own.

    Returns
    -------
    folder, remarks
        Where they lie, and a sentence for each notebook of which a newer version lies beside the user's own.

    Raises
    ------
    FlashCoreError
        The folder cannot be written.
    """
    folder = (folder or workbench_dir()).absolute()
    remarks = []
    try:
        (folder / PRISTINE).mkdir(parents=True, exist_ok=True)
        for shipped in sorted((notebooks_dir or data_dir("notebooks")).glob("*.ipynb")):
            copy, pristine = folder / shipped.name, folder / PRISTINE / shipped.name
            ours, yours, before = (path.read_bytes() if path.is_file() else None for path in (shipped, copy, pristine))
            if before == ours and yours is not None:
                continue
            if yours in (None, before, ours):  # ours: another process is laying them out too
                write_whole(copy, ours)
            else:
                newer = copy.with_name(f"{copy.stem}.newer.ipynb")
                write_whole(newer, ours)
                remarks.append(f"{copy.name} is kept as you changed it; FlashCore's own is in {newer.name}.")
            write_whole(pristine, ours)
    except OSError as error:
        raise FlashCoreError(
            f"The notebooks cannot be laid out in {folder} ({error.strerror}); make the folder writable."
        ) from error
    return folder, remarks
