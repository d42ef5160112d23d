"""Pages of the status report drawn in this process: its own cells and template, without starting a Jupyter kernel."""

from __future__ import annotations

import functools
import unittest.mock
import warnings
from pathlib import Path
from types import CodeType

import nbformat

from flashcore.page import Variant
from flashcore.paths import data_dir
from flashcore.pipeline import notebooks, rendering
from flashcore.records import RunFolder


@functools.cache
def _cells() -> tuple[nbformat.NotebookNode, tuple[CodeType | None, ...]]:
    """The status report's notebook, and what each of its cells runs."""
    notebook = nbformat.read(data_dir("notebooks") / f"{rendering.STATUS_NOTEBOOK}.ipynb", as_version=4)
    programs = [compile(c.source, c.id, "exec") if c.cell_type == "code" else None for c in notebook.cells]
    return notebook, tuple(programs)


def page_text(run: RunFolder, variant: Variant | None = None) -> str:
    """The page of a run as `rendering.render` makes it, but for the policy that is written into the file.

    A kernel takes two seconds to start and to import what a test has imported already. That a kernel shows the same is
    held by `tests/page/test_random_runs.py`.
    """
    import IPython.display

    kept, programs = _cells()
    notebook, shown, space = nbformat.from_dict(kept), [], {}
    with (
        warnings.catch_warnings(),
        unittest.mock.patch.object(IPython.display, "display", lambda html: shown.append(html.data)),
    ):
        warnings.simplefilter("ignore")  # a kernel prints them, and no page shows what was printed there
        for cell, program in zip(notebook.cells, programs, strict=True):
            if program is None:
                continue
            shown.clear()
            exec(program, space)
            if "parameters" in cell.metadata.get("tags", []):
                space["run_dir"] = str(run.path)
            cell.outputs = [nbformat.v4.new_output("display_data", data={"text/html": text}) for text in shown]
        folder = run.path / notebooks.FOLDER
        folder.mkdir(exist_ok=True)
        executed = folder / f"{rendering.STATUS_NOTEBOOK}.ipynb"
        nbformat.write(notebook, executed)
        return rendering._to_html(executed, run, variant or Variant())


def draw_here(run: RunFolder, variant: Variant | None = None) -> Path:
    """``report.html`` of a run, drawn by `page_text`."""
    return rendering._write_page(run, page_text(run, variant))
