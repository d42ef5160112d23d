"""Shared by the tests of the survey: a cuBLASLt whose answers are invented."""

from __future__ import annotations

import pytest
from support import synthetic_survey as synthetic


@pytest.fixture(name="stand_in")
def _stand_in(monkeypatch):
    """A cuBLASLt whose answers are invented, at the calls that need a GPU; gives the log of what was asked."""
    return synthetic.stand_in(monkeypatch)
