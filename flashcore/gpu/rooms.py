"""Memory for kernels to work in, kept by stream and used again: never in a memory pool that torch has for CUDA graphs.

Torch counts what is left in such a pool, refuses what it does not know, and hands out the rest again. Its warm-up
before a graph (``torch.compile(mode="reduce-overhead")``) takes all memory of torch's from there, and a caller cannot
tell a warm-up from any other call. So what is kept comes from the driver, and stays for good: a stream has one room, at
most twice as large as its largest call asked for, and those that it outgrew.

While a graph is captured, a call gets memory of torch's that it holds no longer than it lasts, as any tensor in it.
Counters, which kernels find at 0 and leave at 0, could not be handed on so: a graph gets some that were put by.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from flashcore.gpu.launching import capture_id

INT_BYTES = FLOAT_BYTES = 4
LEAST_BYTES = 1 << 20
"""Of a stream's room: smaller ones would only be outgrown."""
LEAST_COUNTERS = 1 << 13
"""Of a stream: as many as any call of ours asks for."""
STOCK_BYTES = 1 << 22
"""Counters that a GPU puts by for graphs at a time. A call in a graph takes some hundred bytes."""
APART = 128
"""Bytes from one graph's counters to the next one's, at least: they share no line of the cache."""


class Room(NamedTuple):
    """Memory for one launch."""

    address: int
    """Of as many bytes as were asked for. What lies there may be anything."""
    counters: int
    """Address of as many ints as were asked for, all 0; the kernel has to leave them so."""
    keeps: tuple[torch.Tensor, ...] = ()
    """To be held until the launch is in its stream. Whatever else holds them keeps a graph's memory."""


class _Lasting(NamedTuple):
    size: int
    address: int


_lock = threading.Lock()
_rooms: dict[tuple[int, int], _Lasting] = {}
"""By GPU and stream; in bytes, as all sizes here."""
_counters: dict[tuple[int, int], _Lasting] = {}
_stock: dict[int, range] = {}
"""By GPU, addresses of counters that no graph has."""
_of_graphs: dict[tuple[int, int, int, int], int] = {}
"""Addresses of a graph's counters, by GPU, stream, capture and size. A graph may be replayed at any time, beside any
other call, and nobody hears of its end: so they are its own for good."""


def room_for(size: int, device: torch.device, stream: int, *, counters: int = 0, own: bool = False) -> Room:
    """Memory for a launch on torch's current stream.

    Parameters
    ----------
    size
        In bytes.
    stream
        Its address.
    counters
        Ints that have to be 0.
    own
        Nobody else shall have this memory, whatever the kernel leaves there. It goes with `Room.keeps`, as it does
        while a graph is captured, so that a launch on it cannot be kept.

    Raises
    ------
    torch.OutOfMemoryError
        The GPU has too little memory left.
    """
    index, capture = device.index or 0, capture_id(stream)
    if own or capture:
        room = torch.empty(size, dtype=torch.uint8, device=device)
        zeros = 0 if own or not counters else _graphs_counters(index, stream, capture, counters)
        if zeros or not counters:
            return Room(room.data_ptr(), zeros, (room,))
        fresh = torch.zeros(counters, dtype=torch.int32, device=device)
        return Room(room.data_ptr(), fresh.data_ptr(), (room, fresh))
    with _lock:
        address = _lasting(_rooms, index, stream, max(size, LEAST_BYTES), zero=False)
        if not counters:
            return Room(address, 0)
        zeros = _lasting(_counters, index, stream, INT_BYTES * max(counters, LEAST_COUNTERS), zero=True)
        if len(_stock.get(index, ())) < STOCK_BYTES // 2:
            begin = _zeros(STOCK_BYTES, index, stream)
            _wait_for(stream)  # a graph on any other stream may use them next
            _stock[index] = range(begin, begin + STOCK_BYTES)
        return Room(address, zeros)


def _lasting(kept: dict[tuple[int, int], _Lasting], index: int, stream: int, size: int, *, zero: bool) -> int:
    """Address of at least `size` bytes that a stream has; kept launches may still use what it had before."""
    found = kept.get((index, stream))
    if found is None or found.size < size:
        size = 1 << (size - 1).bit_length()
        address = _zeros(size, index, stream) if zero else _allocate(size, index)
        found = kept[index, stream] = _Lasting(size, address)
    return found.address


def _graphs_counters(index: int, stream: int, capture: int, counters: int) -> int:
    """Address of counters of a graph that is being captured; 0 where too few were put by."""
    size = -(-counters * INT_BYTES // APART) * APART
    key = index, stream, capture, size
    with _lock:
        if key not in _of_graphs:
            stock = _stock.get(index, range(0))
            if len(stock) < size:
                return 0
            _of_graphs[key], _stock[index] = stock.start, stock[size:]
        return _of_graphs[key]


# ---------------------------------------------------------------------------------------------------------- the driver


def _allocate(size: int, index: int) -> int:
    """Address of `size` bytes on a GPU that torch's allocator knows nothing of, at a multiple of 256."""
    from cupy.cuda import Device, runtime

    with Device(index):
        try:
            return runtime.malloc(size)
        except runtime.CUDARuntimeError:
            torch.cuda.empty_cache()  # torch may hold all that is left, and use none of it
        try:
            return runtime.malloc(size)
        except runtime.CUDARuntimeError as error:
            # The class that torch raises for its own tensors, since that is what callers near the limit look for.
            raise torch.cuda.OutOfMemoryError(
                f"GPU {index} has no {size / 2**20:.0f} MiB left for a kernel of FlashCore to work in ({error}); free "
                "tensors, or pass fewer sequences at once."
            ) from error


def _zeros(size: int, index: int, stream: int) -> int:
    """The same, all 0 for whatever comes next on the stream."""
    from cupy.cuda import Device, runtime

    address = _allocate(size, index)
    with Device(index):
        runtime.memsetAsync(address, 0, size, stream)
    return address


def _wait_for(stream: int) -> None:
    """Wait until all that is in the stream is done."""
    from cupy.cuda import runtime

    runtime.streamSynchronize(stream)
