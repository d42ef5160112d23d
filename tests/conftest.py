"""Shared by all tests: the `gpu` marker, fixed seeds, and caches and run folders that belong to the test alone."""

from __future__ import annotations

import os
import random

import pytest

from flashcore.gpu import device
from flashcore.records import RunFolder

os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run the complete form of the tests that are sampled")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--exhaustive") and "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]

    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not device.has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="this machine has no NVIDIA GPU that torch can use"))


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state."""
    random.seed(0)
    import numpy
    import torch

    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """An empty run folder."""
    return RunFolder.create(tmp_path / "run")
