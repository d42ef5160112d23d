"""Queries, keys and values of the sequences of a setting, each from a seed of its own."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from flashcore.surveys.invariance.cases import Setting

RISES = (12.0, 25.0, 60.0)
"""How far scores rise along the keys, in units of the exponent: past the reach of a reference that stays put, by little
or far. Where it is little, more than the last keys still count, so that more of a difference shows."""
TEETH = (1 << 30, 1000, 320)
"""Keys along which they rise before they begin anew: all, or few enough that they rise within a part of the keys."""
LATES = (12.0, 40.0)
"""How far an outlier stands above the other scores."""
OUTLIERS = 3
HUGE = 12.0
"""What queries are multiplied by in a sequence of large scores."""
KEPT = 0.5
"""Share of rows that keep their query where others get one that outgrows its reference."""


@dataclass(frozen=True)
class Sequence:
    """The tensors of one sequence."""

    q: torch.Tensor
    """``[num_heads_q, rows, head_dim]``."""
    k: torch.Tensor
    """``[num_heads_kv, keys, head_dim]``."""
    v: torch.Tensor
    """As `k`."""


class Values:
    """The tensors of a setting, made when they are asked for; a sequence's are the same whatever others there are."""

    def __init__(self, setting: Setting, device: str):
        self.setting, self.device = setting, torch.device(device)
        self.dtype = getattr(torch, setting.dtype)
        self._made: dict[int, Sequence] = {}
        self._others: dict[int, tuple[Sequence, torch.Tensor]] = {}

    def _generator(self, index: int) -> torch.Generator:
        number = (self.setting.seed * 4099 + self.setting.first + index) % (1 << 62)
        return torch.Generator(self.device).manual_seed(number)

    @functools.cached_property
    def sink(self) -> torch.Tensor | None:
        """float32 ``[num_heads_q]``; numbers that bfloat16 has, since some peers take no other."""
        if not self.setting.sink:
            return None
        generator = torch.Generator(self.device).manual_seed(self.setting.seed)
        drawn = torch.randn(self.setting.heads_q, generator=generator, device=self.device)
        return (3 * drawn).bfloat16().float()

    def of(self, index: int) -> Sequence:
        """The tensors of sequence `index`."""
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def _make(self, index: int) -> Sequence:
        setting, generator = self.setting, self._generator(index)
        rows, keys = setting.lengths[index]
        pattern, number = setting.patterns[index], setting.first + index

        def normal(heads: int, length: int) -> torch.Tensor:
            return torch.randn(heads, length, setting.head_dim, generator=generator, device=self.device)

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator, device=self.device)

        q, k, v = normal(setting.heads_q, rows), normal(setting.heads_kv, keys), normal(setting.heads_kv, keys)
        if pattern == "huge":
            q *= HUGE
        elif pattern == "equal":
            k[:] = k[:, :1]
        elif pattern != "normal":
            # The first column carries a level of each key and a slope of each row, whose product joins the score.
            tooth = min(keys, TEETH[number // len(RISES) % len(TEETH)])
            along = torch.arange(keys, device=self.device) % tooth / tooth
            if pattern == "late":
                late = keys - 1 - (uniform(OUTLIERS) * max(1, keys // 3)).long()
                level = torch.zeros_like(along).index_fill_(0, late.clamp_min(0), LATES[number % len(LATES)])
                slope = torch.where(uniform(setting.heads_q, rows) < 0.5, -1.0, 1.0)
            else:
                level = RISES[number % len(RISES)] * along
                slope = torch.ones(setting.heads_q, rows, device=self.device)
                if pattern == "rows apart":
                    slope = 2 * uniform(setting.heads_q, rows) - 1
            q[..., 0] = slope
            k[..., 0] = level / self.scale
        return Sequence(q.to(self.dtype), k.to(self.dtype), v.to(self.dtype))

    @property
    def scale(self) -> float:
        """The softmax scale: that of the head_dim."""
        return self.setting.head_dim**-0.5

    def among_others(self, index: int) -> tuple[Sequence, torch.Tensor]:
        """The same sequence, about half of its rows with another query, and which rows kept theirs.

        The others get, for a key late in the sequence, a score far beyond all before it. They are rows of the same
        heads and rows of other heads of a group, so whatever is decided for several rows at once is decided anew.

        Returns
        -------
        sequence, kept
            ``kept`` is bool ``[num_heads_q, rows]``; the last row of some head is always kept.
        """
        if index not in self._others:
            mine, generator = self.of(index), self._generator(index + (1 << 20))
            heads, rows = mine.q.shape[:2]
            keys = mine.k.shape[1]
            kept = torch.rand(heads, rows, generator=generator, device=self.device) < KEPT
            kept[self.setting.seed % heads, -1] = True  # ways that have the last rows alone then have one to compare
            at = keys - 1 - (self.setting.seed // 7) % max(1, keys // 4)
            toward = mine.k[:, at].float()
            toward = toward * (
                LATES[index % len(LATES)] / self.scale / toward.square().sum(-1, keepdim=True).clamp_min(1.0)
            )
            other = toward.repeat_interleave(self.setting.group, 0)[:, None].to(self.dtype)
            q = torch.where(kept[..., None], mine.q, other)
            self._others[index] = Sequence(q, mine.k, mine.v), kept
        return self._others[index]
