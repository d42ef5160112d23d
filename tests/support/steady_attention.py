"""Attention on the CPU whose bits are the same in every batch, by elementwise steps; and some that break that."""

from __future__ import annotations

import math

import torch

from flashcore.backends.cpu import CpuBackend
from flashcore.numerics import reference

TILE = 64


class Steady(CpuBackend):
    """Keys in tiles of 64, and sums that go one term after the other, so that no shape decides on an order."""

    id = "steady"
    batch_invariant = True
    paged = True
    paged_masks = ("window", "softcap", "sink")

    def tile(self, problem) -> int:
        return TILE

    def run(self, q, k, v, problem, masks=None):
        return super().run(q, k, v, problem.with_(page_size=self.tile(problem)), masks)

    def run_paged(self, q, cache, problem, selection=None, masks=None):
        outs, lses = [], []
        for row, length in enumerate(cache.lengths.tolist()):
            k, v = (dense_of(pool, cache.page_table[row], length) for pool in (cache.k_pool, cache.v_pool))
            one = problem.with_(batch=1, seqlen_k=length)
            out, lse = self.run(q[row : row + 1], k[None], v[None], one, masks)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def scores(self, q, k, problem, page):
        scores = q.new_zeros(*q.shape[:3], k.shape[2])
        for column in range(q.shape[3]):
            scores += q[..., column, None] * k[:, :, None, :, column]
        scores = reference.capped(scores * problem.scale, problem)
        mask = reference.visible(problem, slice(0, problem.seqlen_q), page, q.device)
        return scores if mask is None else scores.masked_fill(~mask, -math.inf)

    def row_sum(self, row_sum, rescale, probs):
        found = rescale * row_sum
        for column in range(probs.shape[-1]):
            found = found + probs[..., column]
        return found

    def accum(self, accum, rescale, probs, v):
        found = rescale[..., None] * accum
        for key in range(v.shape[2]):
            found = found + probs[..., key, None].float() * v[:, :, None, key]
        return found


def dense_of(pool, table, length):
    """``[heads, length, head_dim]``: the keys or values of one row of a page table."""
    pages = pool[table[: -(-length // pool.shape[2])].long()]
    return pages.transpose(0, 1).flatten(1, 2)[:, :length]


class TileByBatch(Steady):
    """Its tile depends on how many sequences there are."""

    def tile(self, problem) -> int:
        return 64 if problem.batch < 3 else 32


class TileByPage(Steady):
    """Over pages it takes a page at a time."""

    def tile(self, problem) -> int:
        return problem.page_size


class Votes(Steady):
    """Sixteen rows raise their reference together."""

    def row_max(self, scores, row_max):
        found = super().row_max(scores, row_max)
        for at in range(0, found.shape[-1], 16):
            group = found[..., at : at + 16]
            highest = group.amax(-1, keepdim=True)
            found[..., at : at + 16] = torch.where(
                group.isinf(), group, torch.where(highest > group + 8, highest, group)
            )
        return found


class SplitsByOccupancy(Steady):
    """It splits the keys where the call has few rows."""

    def _loop(self, q, k, v, problem, kept, masks=None):
        few = q.shape[0] * q.shape[1] * q.shape[2] < 64
        if not few or problem.masks or problem.causal or problem.seqlen_k < 2:
            return super()._loop(q, k, v, problem, kept, masks)
        half = problem.seqlen_k // 2
        parts = [
            super(SplitsByOccupancy, self)._loop(q, k[:, :, keys], v[:, :, keys], problem.with_(seqlen_k=size), kept)
            for keys, size in ((slice(0, half), half), (slice(half, None), problem.seqlen_k - half))
        ]  # fmt: skip
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        out = sum(out.float() * (one - lse).exp()[..., None] for out, one in parts)
        return out.to(q.dtype), lse


class VotesInGroups(Steady):
    """The heads of a group raise their reference together, as rows of one tile of a decode kernel might."""

    def _loop(self, q, k, v, problem, kept, masks=None):
        self._group = problem.num_heads_q // problem.num_heads_kv
        return super()._loop(q, k, v, problem, kept, masks)

    def row_max(self, scores, row_max):
        found = super().row_max(scores, row_max)
        groups = found.unflatten(1, (-1, self._group))
        highest = groups.amax(2, keepdim=True)
        raised = torch.where(groups.isinf() | (highest <= groups + 8), groups, highest)
        return raised.flatten(1, 2)
