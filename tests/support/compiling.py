"""torch's compiler in tests: it loads in two seconds, so tests that compile load it, and collecting tests does not."""

from __future__ import annotations

import sys
from typing import Any

import torch


def counter() -> Any:
    """A backend of ``torch.compile`` that runs a graph as it is, and counts graphs (`frame_count`) and nodes."""
    from torch._dynamo.testing import CompileCounter

    return CompileCounter()


def forget() -> None:
    """What was compiled so far is compiled anew when it is called again."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
