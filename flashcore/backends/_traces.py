"""Give a traced kernel memory for its stages, and read them back as a `Trace`."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from flashcore.numerics import masking
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.reference import Trace, links
from flashcore.problem import Problem

TRACE = struct.Struct("6Q 2i")
"""`TraceBuffers` of kernels/include/trace.cuh."""
NOT_WRITTEN = 0x7FC0_DEAD
"""A NaN that no arithmetic makes: trace buffers start out full of it, so that a page a kernel skipped can be told."""


@dataclass(frozen=True)
class TraceBuffers:
    """Where a kernel stores its stages; shapes as in `Trace`, `accum` with rows rounded up to whole tiles.

    Where sequences have lengths, rows and keys count from the first real one of their sequence, as in `Trace`.
    """

    scores: torch.Tensor
    row_max: torch.Tensor
    rescale: torch.Tensor
    probs: torch.Tensor
    row_sum: torch.Tensor
    accum: torch.Tensor

    @classmethod
    def make(cls, problem: Problem, page_size: int, tile_m: int, device: torch.device) -> TraceBuffers:
        """Buffers full of `NOT_WRITTEN` for pages of `page_size` keys and query tiles of `tile_m` rows."""

        def room(*shape: int) -> torch.Tensor:
            return torch.full(shape, NOT_WRITTEN, dtype=torch.int32, device=device).view(torch.float32)

        heads = (problem.batch, problem.num_heads_q)
        square = (*heads, problem.seqlen_q, problem.seqlen_k)
        paged = (*heads, -(-problem.seqlen_k // page_size), problem.seqlen_q)
        padded_rows = -(-problem.seqlen_q // tile_m) * tile_m
        accum = room(*paged[:3], padded_rows, problem.head_dim)
        return cls(room(*square), room(*paged), room(*paged), room(*square), room(*paged), accum)

    def packed(self) -> bytes:
        """The struct that the kernel takes."""
        stages = (self.scores, self.row_max, self.rescale, self.probs, self.row_sum, self.accum)
        return TRACE.pack(*(stage.data_ptr() for stage in stages), self.row_max.shape[2], self.accum.shape[3])

    def trace(
        self, problem: Problem, page_size: int, out: torch.Tensor, lse: torch.Tensor,
        previous: tuple[int, ...] | None = None, masks: MaskTensors | None = None,
    ) -> Trace:  # fmt: skip
        """What the kernel stored, its rightly skipped pages filled in.

        `out` and `lse` lie as the problem says; `previous` says which page continues which, and `masks` are those of
        the call.
        """
        out, lse = masking.aligned_results(out, lse, problem, masks)
        trace = Trace(
            page_size=page_size, scores=self.scores, row_max=self.row_max, rescale=self.rescale, probs=self.probs,
            row_sum=self.row_sum, accum=self.accum[:, :, :, : problem.seqlen_q], out=out, lse=lse,
            previous=previous,
        )  # fmt: skip
        fill_skipped_pages(trace, problem, masks)
        return trace


def fill_skipped_pages(trace: Trace, problem: Problem, masks: MaskTensors | None = None) -> None:
    """Give the pages that a kernel rightly never visits the values of an update that changes nothing.

    A page may be skipped for a row that sees none of its keys: all lie after those that it sees, or before them, or its
    sequence has no such row. Only there, and only where the kernel wrote nothing, the trace is filled in, from the page
    that this one continues; a page skipped wrongly stays NaN and is found.
    """
    if problem.window == (-1, -1) and not problem.lengths:
        return
    first_seen, end_seen = seen_keys(problem, masks, trace.scores.device)

    def not_written(stage: torch.Tensor) -> torch.Tensor:
        return stage.view(torch.int32) == NOT_WRITTEN

    for page, before in enumerate(links(trace.previous, trace.row_max.shape[2])):
        first, last = page * trace.page_size, min((page + 1) * trace.page_size, problem.seqlen_k)
        skippable = (end_seen <= first) | (first_seen >= last) | (end_seen <= first_seen)  # [B or 1, 1, seqlen_q]
        for stage, value in ((trace.scores, float("-inf")), (trace.probs, 0.0)):
            part = stage[:, :, :, first:last]
            part.masked_fill_(not_written(part) & skippable[..., None], value)
        for stage, before_any in ((trace.row_max, float("-inf")), (trace.row_sum, 0.0), (trace.accum, 0.0)):
            part = stage[:, :, page]
            carried = stage[:, :, before] if before >= 0 else torch.full_like(part, before_any)
            mask = skippable if part.dim() == 3 else skippable[..., None]
            part.copy_(torch.where(not_written(part) & mask, carried, part))
        part = trace.rescale[:, :, page]
        part.masked_fill_(not_written(part) & skippable, 1.0)


def seen_keys(problem: Problem, masks: MaskTensors | None, device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first key that each row sees and the one after its last, ``[B or 1, 1, seqlen_q]``; none where they meet."""
    rows = torch.arange(problem.seqlen_q, device=device).view(1, 1, -1)
    num_q, num_k = problem.seqlen_q, problem.seqlen_k
    if problem.lengths:
        num_q, num_k = (masking.rows_of(problem, masks, name, device).count.view(-1, 1, 1) for name in "qk")
    position = rows + (num_k - num_q)
    left, right = problem.window
    first = (position - left).clamp(min=0) if left >= 0 else torch.zeros_like(position)
    end = torch.zeros_like(position) + num_k
    if right >= 0:
        end = end.minimum(position + right + 1)
    return first, end.masked_fill(rows >= num_q, 0) if problem.lengths else end
