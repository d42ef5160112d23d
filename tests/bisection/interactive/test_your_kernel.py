"""`notebooks/your_kernel.ipynb`: from a wrong kernel to its cause to a green check, and no part of a report."""

from __future__ import annotations

import json

import nbformat
import pytest

from flashcore.paths import HOME, data_dir
from flashcore.pipeline import reporting, workbench

NAME = "your_kernel"
PATH = data_dir("notebooks") / f"{NAME}.ipynb"


def data_of(cell) -> list[dict]:
    """What each output of a cell shows, by MIME type."""
    return [output.get("data", {}) for output in cell.outputs]


@pytest.mark.notebook
def test_it_names_the_bug_of_its_kernel_and_then_finds_it_right(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(HOME))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(PATH, as_version=4)
    patience = {"timeout": None, "startup_timeout": 600}  # of a busy machine; nothing is judged by it
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": tmp_path}}, **patience).execute()
    cells = {cell.id: cell for cell in notebook.cells}
    shown = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    finding = data_of(shown[0])[0]["text/markdown"]
    assert "**Finding:** attention is wrong: the accumulator is not rescaled when the maximum moves" in finding
    assert "**After the line was mended:** attention is right: " in finding, "the first output is written last"
    first, checked, bisected = (data_of(cells[f"cell-{n:02}"])[-1] for n in (7, 13, 15))
    assert first["text/plain"].startswith("attention is wrong") and "This explains all" in first["text/plain"]
    assert "FAIL" in first["text/html"] and "<svg" in first["text/html"]
    assert checked["text/html"].startswith('<div style="line-height:1.4"><b>PASS:</b> attention is right')
    assert "cpu on B=1,H=2,S=256,D=64,page=64: every stage is right" in bisected["text/plain"]
    assert "Probe" in data_of(cells["cell-09"])[-1]["text/html"]


def test_a_report_does_not_run_it():
    planned = reporting.measuring_notebooks(data_dir("notebooks"))
    assert "02_correctness_bisection" in planned and NAME not in planned


def test_jupyterlab_shows_it(tmp_path):
    folder, _ = workbench.lay_out(tmp_path / "lab")
    assert json.loads((folder / f"{NAME}.ipynb").read_text()) == json.loads(PATH.read_text())
