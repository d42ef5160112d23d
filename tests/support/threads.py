"""How many threads torch computes with while a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside this context torch computes in one thread.

    The tensors of these tests are small. Handing such work to several threads takes longer than the work, and many
    times as long where several test processes share the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
