"""What three ranks on CPUs got: they work once, for all files of this folder and all workers of pytest."""

from __future__ import annotations

import pytest
import torch
from support.ranks import WORLD, results
from support.sharing import made_once


@pytest.fixture(scope="session")
def ranks(shared_folder) -> list[dict]:
    folder = made_once(shared_folder / "gloo ranks", results)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]
