"""Shared by the tests of the pipeline: small notebooks that run in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.notebook_tools import finishing_notebook, measure, write_notebook
from support.sharing import made_once

from flashcore.pipeline import reporting
from flashcore.records import RunFolder


@pytest.fixture
def toys(tmp_path) -> Path:
    """Two small notebooks and a status report."""
    folder = tmp_path / "toys"
    finishing_notebook(folder, "01_first", measure(1))
    finishing_notebook(folder, "02_second", measure(2))
    write_notebook(folder, "06_status_report", "print('read', len(run.trials()), 'records')")
    return folder


@pytest.fixture
def reported(tmp_path, toys, shared_folder) -> RunFolder:
    """The run of a report of the toys: made once for all tests, and copied into `runs`, to be changed."""

    def report(folder: Path) -> None:
        reporting.report(notebooks_dir=toys, out=folder, pdf=False)

    name = "-".join(path.stem for path in sorted(toys.iterdir()))
    made = (made_once(shared_folder / f"report of {name}", report) / "latest").resolve()
    run = RunFolder(shutil.copytree(made, tmp_path / "runs" / made.name))
    reporting.point_latest_at(run)
    return run
