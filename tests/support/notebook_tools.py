"""Small notebooks for tests: written, run and killed in seconds, where FlashCore's own would take minutes."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat

PARAMETERS = (
    'run_dir: str = ""\nprofile: str = "quick"\nsizes: list[int] = [1]\nscale: float | None = None\nseed: int = 0'
)
OPEN_RUN = "from flashcore.records import RunFolder, Trial\nrun = RunFolder(run_dir)"
KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


def measure(value: int) -> str:
    """A cell that writes one record."""
    return f'run.append(Trial(kind="ceiling", data={{"name": "toy", "value": {value}}}))'


def final(name: str) -> str:
    """The last cell of every notebook."""
    return f'run.append(Trial(kind="notebook", data={{"name": "{name}"}}))'


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook with a parameters cell, one that opens the run, and `cells`."""
    first = nbformat.v4.new_code_cell(parameters, id="cell-01")
    first.metadata["tags"] = ["parameters"]
    rest = [nbformat.v4.new_code_cell(text, id=f"cell-{n:02}") for n, text in enumerate((OPEN_RUN, *cells), start=2)]
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *rest], metadata=metadata), path)
    return path


def finishing_notebook(folder: Path, name: str, *cells: str) -> Path:
    """A notebook that also writes its final record."""
    return write_notebook(folder, name, *cells, final(name))


def values(lines) -> list:
    """The values that cells of `measure` wrote, out of lines of records."""
    return [json.loads(x)["data"]["value"] for x in lines if '"ceiling"' in x]
