"""Shared by the tests of backends: what a GPU says or does, without the GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.driver_memory import in_place_of_the_driver
from support.emulated_cublaslt import launch
from support.hopper_tiles import MULTIPROCESSORS

from flashcore.backends import cublaslt as module
from flashcore.backends import hopper


@pytest.fixture
def on_an_h200(monkeypatch):
    """As on a GPU of that many multiprocessors."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: MULTIPROCESSORS)


@pytest.fixture
def driver_memory(monkeypatch):
    """Room for kernels that lies on the CPU."""
    return in_place_of_the_driver(monkeypatch)


@pytest.fixture
def emulated(monkeypatch):
    """The cuBLASLt backends that `Emulated` is mixed into compute on the CPU."""
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(module, "_side_streams", lambda device, count: (stream,) * count)
    monkeypatch.setattr(module, "entry_point", lambda loaded, name, device: name)
    monkeypatch.setattr(module, "launch", launch)
