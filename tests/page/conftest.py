"""Shared by the tests of the page: a run on a GPU whose kernel of ours meets every target."""

from __future__ import annotations

import pytest
from support import synthetic_records as synthetic

from flashcore.records import RunFolder


@pytest.fixture
def gpu_run(tmp_path) -> RunFolder:
    return synthetic.write_run(tmp_path / "gpu", synthetic.gpu_trials(synthetic.FAST), synthetic.environment())
