"""Shared by the tests of the command line: what a command sets for its process ends with the test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _debug_ends_with_the_test(monkeypatch):
    monkeypatch.setenv("FLASHCORE_DEBUG", "")  # so that it is put back, whatever a command sets
    monkeypatch.delenv("FLASHCORE_DEBUG")
