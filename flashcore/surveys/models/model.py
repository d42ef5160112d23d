"""A decoder with random weights: RMSNorm, rotary positions, SwiGLU, and attention by whoever is asked for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from flashcore.surveys.models.plan import ModelShape

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of layer i: q ``[B, Hq, S, D]``, k and v ``[B, Hkv, S, D]`` of the new tokens in; ``[B, Hq, S, D]`` out."""
ROTARY_BASE = 10_000.0
SPREAD = 0.02
"""Standard deviation of the weights."""
SHARPER = 2.0
"""Of queries and keys: as much wider, so that attention is not the same for all keys."""


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich, Root Mean Square Layer Normalization)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, GLU Variants Improve Transformer)."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def rotary(positions: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[positions, head_dim // 2]`` (Su et al., RoFormer), in float32."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[B, S, H, D]`` with each pair ``(x[i], x[i + D/2])`` turned by its position's angle."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each on normalised input and added to it."""

    def __init__(self, shape: ModelShape, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, shape.head_dim
        self.heads = (shape.heads_q, shape.heads_kv, shape.heads_kv)
        self.before_attention, self.before_mlp = RMSNorm(shape.hidden), RMSNorm(shape.hidden)
        self.qkv = nn.Linear(shape.hidden, sum(self.heads) * shape.head_dim, bias=False)
        self.out = nn.Linear(shape.heads_q * shape.head_dim, shape.hidden, bias=False)
        self.mlp = SwiGLU(shape.hidden, shape.mlp)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split(self.heads, 2)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        out = attend(self.layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Model(nn.Module):
    """A decoder of a shape, its weights drawn by a seed.

    Parameters
    ----------
    positions
        The longest sequence that it takes.
    """

    def __init__(self, shape: ModelShape, *, positions: int, seed: int, dtype: torch.dtype, device: str):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        for name, table in zip(("cos", "sin"), rotary(positions, shape.head_dim), strict=True):
            self.register_buffer(name, table, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() == 2:
                    deeper = math.sqrt(2 * shape.layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                    weight.normal_(0.0, SPREAD / deeper, generator=generator)
            for block in self.blocks:  # after all else, rows of q and k: those that make the scores
                block.qkv.weight[: (shape.heads_q + shape.heads_kv) * shape.head_dim] *= SHARPER
            sinks = torch.randn(shape.layers, shape.heads_q, generator=generator)
        self.to(device=device, dtype=dtype).requires_grad_(False)
        self.sinks = sinks.to(device) if shape.sink else None
        """float32 ``[layers, heads_q]``: scores of the sinks."""

    def forward(self, tokens: torch.Tensor, start: int, attend: Attend) -> torch.Tensor:
        """Logits ``[B, S, vocab]`` of tokens ``[B, S]`` at positions `start` and on."""
        x = self.embedding(tokens)
        places = slice(start, start + tokens.shape[1])
        cos, sin = self.cos[places], self.sin[places]
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        return self.head(self.norm(x))
