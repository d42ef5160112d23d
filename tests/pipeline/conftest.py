"""Shared by the tests of the pipeline: small notebooks that run in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.notebook_tools import finishing_notebook, measure, write_notebook


@pytest.fixture
def toys(tmp_path) -> Path:
    """Two small notebooks and a status report."""
    folder = tmp_path / "toys"
    finishing_notebook(folder, "01_first", measure(1))
    finishing_notebook(folder, "02_second", measure(2))
    write_notebook(folder, "06_status_report", "print('read', len(run.trials()), 'records')")
    return folder
