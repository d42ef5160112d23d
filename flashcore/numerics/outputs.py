"""Allocate the tensors a backend writes; poisoned with NaN while a check runs, so an element never written is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_poison: ContextVar[bool] = ContextVar("flashcore_poison_outputs", default=False)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Inside this context every tensor from `new_output` starts out full of NaN."""
    token = _poison.set(True)
    try:
        yield
    finally:
        _poison.reset(token)


poisoning = _poison.get
"""Whether outputs are poisoned now; asked at every call."""


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, just allocated: full of NaN while outputs are poisoned, else as it is."""
    return tensor.fill_(float("nan")) if _poison.get() else tensor


def new_output(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor for a backend to fill completely."""
    return poisoned(torch.empty(shape, dtype=dtype, device=device))
