"""A stand-in for the driver's memory that kernels work in: it lies on the CPU, where a test can look at it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from flashcore.gpu import rooms

UNWRITTEN = 0x55
"""What every byte of new memory holds."""


@dataclass
class DriverMemory:
    """All that was allocated, by address; `capture` is the graph that is being captured, 0 for none."""

    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    capture: int = 0
    waited_for: list[int] = field(default_factory=list)
    """Streams, in the order in which the host waited for them."""

    def allocate(self, size: int, index: int) -> int:
        block = torch.full((size,), UNWRITTEN, dtype=torch.uint8)
        self.blocks[block.data_ptr()] = block
        return block.data_ptr()

    def zeros(self, size: int, index: int, stream: int) -> int:
        address = self.allocate(size, index)
        self.blocks[address].zero_()
        return address

    def at(self, address: int, size: int) -> torch.Tensor:
        """`size` bytes from an address on; all of them have to be the driver's."""
        for begin, block in self.blocks.items():
            if begin <= address and address + size <= begin + block.numel():
                return block[address - begin : address - begin + size]
        raise AssertionError(f"{size} bytes at {address} are none of the driver's")

    def holds(self, address: int) -> bool:
        return any(begin <= address < begin + block.numel() for begin, block in self.blocks.items())


def in_place_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> DriverMemory:
    """Memory that `flashcore.gpu.rooms` takes from now on; nothing is left of what it had, and afterwards it has it."""
    memory = DriverMemory()
    for table in ("_rooms", "_counters", "_stock", "_of_graphs"):
        monkeypatch.setattr(rooms, table, {})
    monkeypatch.setattr(rooms, "capture_id", lambda stream: memory.capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: memory.capture != 0)
    monkeypatch.setattr(rooms, "_allocate", memory.allocate)
    monkeypatch.setattr(rooms, "_zeros", memory.zeros)
    monkeypatch.setattr(rooms, "_wait_for", memory.waited_for.append)
    return memory
