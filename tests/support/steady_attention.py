"""Attention on the CPU whose bits are the same in every batch, also over pages; and some that break that."""

from __future__ import annotations

import torch

from flashcore.backends.cpu import CpuBackend


class Steady(CpuBackend):
    """The backend `cpu`, which reads pages too."""

    id = "steady"
    paged = True
    paged_masks = ("window", "softcap", "sink")

    def tile(self, problem) -> int:
        """Keys that are taken at a time."""
        return 64

    def for_problem(self, problem):
        ordered, tiled = super().for_problem(problem)
        return ordered, tiled.with_(page_size=self.tile(problem))

    def run_paged(self, q, cache, problem, selection=None, masks=None):
        outs, lses = [], []
        for row, length in enumerate(cache.lengths.tolist()):
            k, v = (dense_of(pool, cache.page_table[row], length) for pool in (cache.k_pool, cache.v_pool))
            one = problem.with_(batch=1, seqlen_k=length)
            out, lse = self.run(q[row : row + 1], k[None], v[None], one, masks)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)


def dense_of(pool, table, length):
    """``[heads, length, head_dim]``: the keys or values of one row of a page table."""
    pages = pool[table[: -(-length // pool.shape[2])].long()]
    return pages.transpose(0, 1).flatten(1, 2)[:, :length]


class TileByBatch(Steady):
    """Its tile depends on how many sequences there are."""

    def tile(self, problem) -> int:
        return 64 if problem.batch < 3 else 32


class TileByPage(Steady):
    """Over pages it takes a page at a time, as far as that is no more than a tile."""

    def tile(self, problem) -> int:
        return min(problem.page_size, 64)


class Votes(Steady):
    """Sixteen rows raise their reference together."""

    def row_max(self, scores, row_max):
        found = super().row_max(scores, row_max)
        for at in range(0, found.shape[-1], 16):
            found[..., at : at + 16] = raised(found[..., at : at + 16], -1)
        return found


class VotesInGroups(Steady):
    """The heads of a group raise their reference together, as rows of one tile of a decode kernel might."""

    def _loop(self, q, k, v, problem, kept, masks=None):
        self._group = problem.num_heads_q // problem.num_heads_kv
        return super()._loop(q, k, v, problem, kept, masks)

    def row_max(self, scores, row_max):
        return raised(super().row_max(scores, row_max).unflatten(1, (-1, self._group)), 2).flatten(1, 2)


def raised(row_max, dim: int):
    """The highest of a group for every row in it that sees a key and lies far below."""
    highest = row_max.amax(dim, keepdim=True)
    return torch.where(row_max.isinf() | (highest <= row_max + 8), row_max, highest)


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
