"""Ways to compute a model's attention: FlashCore's, torch's, FlashAttention's, and none at all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from flashcore import ops
from flashcore.backends.others import masked
from flashcore.errors import Unsupported
from flashcore.paged_ops import paged_attention
from flashcore.surveys.models.caches import Dense, Pages
from flashcore.surveys.models.plan import ModelShape

OURS, LEFT_OUT, EXACT = "flashcore", "left out", "exact"
"""Ways that every step has: ours; a model without attention, whose time is that of all else; and attention with its
scores in float32, which the others' results are held against: torch's SDPBackend.MATH, or with a window or a sink our
own operations of torch (`flashcore.backends.others.masked`)."""
PEERS = ("fa3", "fa4")
"""Backends that `flashcore.attention` calls for us; torch's own are called as a model calls them."""
PINNED = {EXACT: SDPBackend.MATH, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}


def causal_attention(q, k, v, *, window_left: int = -1, sink: torch.Tensor | None = None, backend: str = "auto"):
    """Causal attention of ours, or of a peer that our registry calls, with a window and a sink.

    Parameters
    ----------
    window_left
        Keys before its own position that a query sees; -1 for all.
    sink
        float32 ``[Hq]``: a score a head of one more key, whose value is 0.
    """
    if backend == "auto":
        return ops.attention(q, k, v, causal=True, window_left=window_left, sink=sink, batch_invariant=False)
    # Of the peers only fa4 takes a sink, and rounds it to bfloat16: each gets it afterwards, in float32.
    return _sink_afterwards(q, k, v, sink, causal=True, window_left=window_left, backend=backend)


def with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Attention with a sink, from attention without one: ``out * exp(lse) / (exp(lse) + exp(sink))``."""
    return out if sink is None else (out * torch.sigmoid(lse - sink[:, None])[..., None]).to(out.dtype)


def _sink_afterwards(q, k, v, sink: torch.Tensor | None, **options) -> torch.Tensor:
    """A call of ours whose backend is told of no sink, and which gets it by `lse`."""
    if sink is None:
        return ops.attention(q, k, v, batch_invariant=False, **options)
    return with_sink(*ops.attention(q, k, v, return_lse=True, batch_invariant=False, **options), sink)


def by_torch(q, k, v, *, causal: bool, window_left: int, sink: torch.Tensor | None) -> torch.Tensor:
    """Torch's attention with a window and a sink, which its function does not know.

    On a GPU by FlashAttention-2 through the op beneath, which takes a window and gives `lse` for the sink; on a CPU by
    a mask, with the sink as a key that is 0.
    """
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, q.shape[2], k.shape[2], 0.0, causal,
            False, window_size_left=window_left, window_size_right=0 if causal else -1,
        )  # fmt: skip
        return with_sink(out.transpose(1, 2), lse, sink)
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    behind = torch.arange(rows)[:, None] - torch.arange(keys)
    mask = torch.zeros(1, heads, rows, keys + 1, dtype=q.dtype)
    if causal:
        hidden = (behind < 0) | (behind > window_left if window_left >= 0 else behind < 0)
        mask[..., :keys].masked_fill_(hidden, -torch.inf)
    mask[..., keys] = -torch.inf if sink is None else sink[:, None]
    k, v = (pad(t.repeat_interleave(heads // t.shape[1], 1), (0, 0, 0, 1)) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass
class Keeping:
    """What the layers of a decoding model read from and write into."""

    dense: Dense
    pages: Pages | None = None
    """Of the layers without a window, for whoever reads pages."""


class Attention:
    """Attention of every layer of a model in one way: the `Attend` that a model calls.

    Parameters
    ----------
    way
        `OURS`, `LEFT_OUT`, `EXACT`, ``sdpa``, ``sdpa-cudnn``, or one of `PEERS`.
    sinks
        float32 ``[layers, Hq]``, or None.
    keeping
        None for a forward pass over a prompt that keeps nothing.
    """

    def __init__(self, way: str, shape: ModelShape, sinks: torch.Tensor | None, keeping: Keeping | None = None):
        self.way, self.shape, self.sinks, self.keeping = way, shape, sinks, keeping
        self.pages = keeping.pages if keeping is not None and way == OURS else None
        self.position = 0
        """Of the first new token; a number that a compiled or captured step holds fast."""

    def around(self) -> AbstractContextManager:
        """What a step has to be called in, and compiled: it holds torch to one implementation."""
        return sdpa_kernel(PINNED[self.way]) if self.way in PINNED else nullcontext()

    def begin(self) -> None:
        """Before a step is taken at `position`: pages count their tokens on the device."""
        if self.pages is not None:
            self.pages.cache.lengths.fill_(self.position)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.way == LEFT_OUT:
            return q
        if self.keeping is not None:
            if self.pages is not None and layer in self.pages.place:
                self.pages.cache.write(self.pages.place[layer], k, v)
            else:
                self.keeping.dense.write(layer, k, v, self.position)
        one = self.keeping is not None and q.shape[2] == 1
        sink = None if self.sinks is None else self.sinks[layer]
        return self._over_cache(layer, q, sink) if one else self._over_prompt(layer, q, k, v, sink)

    def _over_prompt(self, layer, q, k, v, sink) -> torch.Tensor:
        window_left = self.shape.window - 1 if self.shape.windowed(layer) else -1
        if self.way in (OURS, *PEERS):
            backend = "auto" if self.way == OURS else self.way
            return causal_attention(q, k, v, window_left=window_left, sink=sink, backend=backend)
        if window_left < 0 and sink is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if self.way == EXACT:
            return masked.attention(q, k, v, masked.Masking(True, window_left, sink=sink))[0]
        self._refuse_cudnn()
        return by_torch(q, k, v, causal=True, window_left=window_left, sink=sink)

    def _over_cache(self, layer, q, sink) -> torch.Tensor:
        """One query a sequence, which sees all that its layer keeps: there is nothing to mask."""
        if self.pages is not None and layer in self.pages.place:
            pages = self.pages.cache.layers[self.pages.place[layer]]
            return paged_attention(q, pages, sink=sink, batch_invariant=False)
        k, v = self.keeping.dense.read(layer, self.position + 1)
        if self.way in (OURS, *PEERS):
            backend = "auto" if self.way == OURS else self.way
            # Afterwards for ours too: the kernel that splits the keys of one query takes no sink (`Hopper.entry`).
            return _sink_afterwards(q, k, v, sink, backend=backend)
        if sink is None:  # the heads of a group as rows of one: the same numbers, and quicker than groups
            rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            return scaled_dot_product_attention(rows, k, v).reshape(q.shape)
        if self.way == EXACT:
            return masked.attention(q, k, v, masked.Masking(sink=sink))[0]
        self._refuse_cudnn()
        return by_torch(q, k, v, causal=False, window_left=-1, sink=sink)

    def _refuse_cudnn(self) -> None:
        if self.way == "sdpa-cudnn":
            raise Unsupported(self.way, "torch gives cuDNN no window and no sink")
