"""Tiny models that several files of this folder take steps of."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import MIXED, PLAIN

from flashcore.surveys.models.plan import ModelShape


@pytest.fixture(params=[PLAIN, MIXED], ids=lambda shape: shape.id)
def shape(request) -> ModelShape:
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(2))
