"""Tiny models that several files of tests take steps of."""

from __future__ import annotations

import torch

from flashcore.surveys.models.model import Model
from flashcore.surveys.models.plan import ModelShape

PLAIN = ModelShape("plain", "plain", 2, 32, 4, 2, 16, 48, vocab=97)
MIXED = ModelShape("mixed", "window and full in turn, sinks", 2, 32, 4, 2, 16, 48, vocab=97, window=5, sink=True)


def made(shape: ModelShape, dtype: torch.dtype = torch.bfloat16) -> Model:
    return Model(shape, positions=64, seed=1, dtype=dtype, device="cpu")
