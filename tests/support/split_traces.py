"""The cpu backend in chains, combined as a split-KV kernel does, and problems for it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from flashcore.backends.cpu import CpuBackend
from flashcore.numerics import reference
from flashcore.numerics.reference import contiguous, interleaved
from flashcore.problem import square

SIX_PAGES = square(2, 2, 96, 32, page_size=16)
CAUSAL = SIX_PAGES.with_(causal=True)
EMPTY_ROWS = CAUSAL.with_(seqlen_q=128)
DTYPES = ("float16", "bfloat16", "float32")
THIRDS = [lambda n: interleaved(n, 3), lambda n: contiguous(n, 2)]


class SplitCpu(CpuBackend):
    """The page loop of the cpu backend in chains, combined as a split-KV kernel does."""

    id = "split"

    def __init__(self, make_chains=lambda num_pages: interleaved(num_pages, 2)):
        self.make_chains = make_chains

    def previous(self, problem):
        return self.make_chains(len(reference.pages(problem, problem.page_size)))

    def continued(self, stage: str, page: int, before: int) -> int:
        """The page whose `stage` this page starts from, or -1."""
        return before

    def weights(self, row_max):
        """``[C, B, Hq, Sq]`` and the reference that they are taken against."""
        shared = row_max.amax(dim=0)
        return (row_max - reference.safe(shared)).exp(), shared

    def combine(self, row_max, row_sum, accum):
        """`out` and `lse` from what every chain holds after its last page; tensors ``[C, B, Hq, Sq, ...]``."""
        weights, shared = self.weights(row_max)
        total = (weights * row_sum).sum(dim=0)
        out = (weights[..., None] * accum).sum(dim=0) / total.masked_fill(total == 0, 1.0)[..., None]
        return out, shared + total.log()

    def _loop(self, q, k, v, problem, kept):
        dtype = q.dtype
        q, k, v = q.float(), self.kv_of_head(k, problem), self.kv_of_head(v, problem)
        zeros = q.new_zeros(q.shape[:-1])
        nothing = {"row_max": zeros - math.inf, "row_sum": zeros, "accum": self.initial_accum(q)}
        columns, chain = reference.pages(problem, problem.page_size), self.previous(problem)
        states: list[dict] = []
        for j, page in enumerate(columns):
            before = {}
            for stage, value in nothing.items():
                p = self.continued(stage, j, chain[j])
                before[stage] = value if p < 0 else states[p][stage]
            scores = self.scores(q, k[..., page, :], problem, page)
            row_max = self.row_max(scores, before["row_max"])
            rescale = self.rescale(before["row_max"], row_max)
            probs = self.probs(scores, row_max)
            row_sum = self.row_sum(before["row_sum"], rescale, probs)
            rounded = probs.to(dtype)
            accum = self.accum(before["accum"], rescale, rounded, self.page_of_v(v, columns, j))
            states.append({"row_max": row_max, "row_sum": row_sum, "accum": accum})
            if kept is not None:
                kept.append((scores, row_max, rescale, rounded, row_sum, accum))
        last = [states[p] for p in reference.ends(chain)]
        out, lse = self.combine(*(torch.stack([state[stage] for state in last]) for stage in nothing))
        return out.to(dtype), lse

    def trace(self, q, k, v, problem):
        return replace(super().trace(q, k, v, problem), previous=self.previous(problem))


class Continues(SplitCpu):
    """From its third page on, takes these stages from the page just before, which belongs to another chain."""

    stages: tuple[str, ...] = ()

    def continued(self, stage, page, before):
        return page - 1 if stage in self.stages and page >= 3 else before
