"""What a decoding model keeps: dense tensors of a fixed size, and pages of ours; filled with the same numbers."""

from __future__ import annotations

import torch

from flashcore.paging import LayeredKVCache
from flashcore.surveys.models.plan import ModelShape


class Dense:
    """Keys and values of every layer in tensors of a fixed size, as a static cache has them.

    A layer with a window keeps as many tokens as that lets be seen, in a ring: their order means nothing, since
    positions are in the keys already.
    """

    def __init__(self, shape: ModelShape, batch: int, room: int, *, dtype: torch.dtype, device: str):
        kept = [min(room, shape.window) if shape.windowed(layer) else room for layer in range(shape.layers)]
        self.k, self.v = (
            [torch.zeros(batch, shape.heads_kv, n, shape.head_dim, dtype=dtype, device=device) for n in kept]
            for _ in range(2)
        )

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, position: int) -> None:
        """Keep tokens ``[B, Hkv, S, D]`` at positions `position` and on; of a prompt what the layer has room for."""
        slots, tokens = self.k[layer].shape[2], k.shape[2]
        first = max(0, tokens - slots)
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            if tokens == 1:
                kept[:, :, position % slots] = new[:, :, 0]
            else:
                places = (position + torch.arange(first, tokens, device=k.device)) % slots
                kept[:, :, places] = new[:, :, first:]

    def read(self, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values that a query sees whose sequence has `length` tokens, its own counted."""
        return self.k[layer][:, :, :length], self.v[layer][:, :, :length]

    def fill(self, length: int, seed: int) -> None:
        """Random tokens, `length` of them in every sequence."""
        for layer, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            generator = torch.Generator(device=k.device).manual_seed(seed + layer)
            for kept in (k, v):
                held = kept[:, :, :length]
                held.copy_(torch.randn(held.shape, generator=generator, dtype=k.dtype, device=k.device))


class Pages:
    """The layers that see all keys, in one `LayeredKVCache`; a layer with a window stays in a ring of `Dense`."""

    def __init__(
        self, shape: ModelShape, batch: int, room: int, *, page_size: int, dtype: torch.dtype, device: str
    ):  # fmt: skip
        whole = [layer for layer in range(shape.layers) if not shape.windowed(layer)]
        columns = -(-room // page_size)
        self.place = {layer: number for number, layer in enumerate(whole)}
        """Of each layer in pages, which one it is of the cache."""
        self.cache = LayeredKVCache(
            len(whole), num_pages=columns * batch, batch=batch, max_pages=columns, page_size=page_size,
            num_heads_kv=shape.heads_kv, head_dim=shape.head_dim, dtype=dtype, device=device,
        )  # fmt: skip
        for _ in range(batch):
            self.cache.add()

    def fill(self, dense: Dense, length: int) -> None:
        """The tokens that `dense` holds."""
        self.cache.reserve(length)
        for layer, number in self.place.items():
            self.cache.write(number, *dense.read(layer, length))
        self.cache.advance(length)
