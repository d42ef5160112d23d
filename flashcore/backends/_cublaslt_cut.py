"""How the cuBLASLt backends cut their work: into groups of heads, pages of keys and rows, and the memory for these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from flashcore.backends._cuda import CudaBackend
from flashcore.numerics.outputs import new_output
from flashcore.problem import Problem

LARGEST_PAGE = 2048
"""A row of a page has to fit the registers of one warp."""
RESIDENT_SHARE = 0.55
"""Share of the L2 cache that a group's scores may take under `resident`; Q, K, V and accum want some too."""
ROW_PADDING = 8
"""Rows of scores start at multiples of 16 bytes."""


@dataclass(frozen=True)
class Span:
    """Neighbouring K/V heads whose matrices lie at equal distances, so that one strided batch covers them."""

    batch: int
    head_kv: int
    count: int


@dataclass(frozen=True)
class Workspace:
    """What a call needs besides its outputs, for one lane: the groups of heads that run on one stream."""

    scores: torch.Tensor
    probs: torch.Tensor
    row_max: torch.Tensor
    row_sum: torch.Tensor
    accum: torch.Tensor
    row_stride: int
    rooms: list[torch.Tensor] = field(default_factory=list)
    """For the algorithms' own use; all of them live until the call ends, since kernels under way may use them."""

    def room(self, size: int) -> int:
        """Address of at least `size` bytes for a product's algorithm, never shared with another lane."""
        if not size:
            return 0
        if not self.rooms or self.rooms[-1].numel() < size:
            self.rooms.append(torch.empty(size, dtype=torch.uint8, device=self.scores.device))
        return self.rooms[-1].data_ptr()


class Cut(CudaBackend):
    """The part of a cuBLASLt backend that says what one launch covers; variants differ in the attributes."""

    wide_scores: bool = False
    """Scores in float32; otherwise in the problem's 16 bits, and probabilities are written over them."""
    rounds_scores = True
    pages_of: int | None = 1024
    """Keys in a page; None takes the problem's own page_size."""
    lanes: int = 2
    """Groups under way at once, each on a stream of its own: one's products run under another's softmax."""
    heads_at_once: int | None = 0
    """Query heads in one group; None for all, 0 for as many as keep their scores in L2."""

    def page_size(self, problem: Problem) -> int:
        """Keys in a page, when no table names pages."""
        return min(self.pages_of or problem.page_size, LARGEST_PAGE, -(-problem.seqlen_k // ROW_PADDING) * ROW_PADDING)

    def num_pages(self, problem: Problem, page_size: int) -> int:
        """Pages that hold all keys; the last may be a short one."""
        return -(-problem.seqlen_k // page_size)

    def group_of(self, problem: Problem, device: torch.device, page_size: int) -> int:
        """K/V heads in one group."""
        group = problem.num_heads_q // problem.num_heads_kv
        total = problem.batch * problem.num_heads_kv
        if self.heads_at_once is None:
            return total
        if self.heads_at_once:
            return max(1, self.heads_at_once // group)
        a_head = problem.seqlen_q * page_size * (6 if self.wide_scores else 2)
        room = RESIDENT_SHARE * torch.cuda.get_device_properties(device).L2_cache_size / self.lanes
        return max(1, min(total, int(room / (a_head * group))))

    def spans(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page_size: int
    ) -> Iterator[Span]:
        """All K/V heads, cut into groups that one strided batch covers."""
        most = self.group_of(problem, q.device, page_size)
        regular = all(t.stride(0) == t.shape[1] * t.stride(1) or problem.batch == 1 for t in (q, k, v))
        heads = problem.batch * problem.num_heads_kv if regular else problem.num_heads_kv
        for batch in range(1 if regular else problem.batch):
            for first in range(0, heads, most):
                yield Span(batch, first, min(most, heads - first))

    def queries_of(self, span: Span, member: int, problem: Problem) -> tuple[int, int]:
        """The query head that is number `member` of a span's first group, and the heads from one group to the next."""
        group = problem.num_heads_q // problem.num_heads_kv
        return span.head_kv * group + member, group

    def first_row(self, problem: Problem, first_key: int) -> int:
        """The first query row that sees a key of the page that starts at `first_key`."""
        if not problem.causal:
            return 0
        return min(problem.seqlen_q, max(0, first_key - (problem.seqlen_k - problem.seqlen_q)))

    def scores_type(self, problem: Problem) -> str:
        """The dtype that scores are stored in."""
        return "float32" if self.wide_scores else problem.dtype

    def alpha(self, problem: Problem) -> float:
        """What Q @ K^T is multiplied with before it is stored: the whole scale, since 16 bits overflow without it."""
        return self.scale(problem)

    def workspace(self, problem: Problem, device: torch.device, page_size: int) -> Workspace:
        """Room for one group of heads, from torch's caching allocator: a captured graph then owns what it uses."""
        columns = -(-page_size // ROW_PADDING) * ROW_PADDING
        heads = self.group_of(problem, device, page_size) * (problem.num_heads_q // problem.num_heads_kv)
        rows = (heads, problem.seqlen_q)
        dtype = getattr(torch, problem.dtype)
        scores = new_output((*rows, columns), getattr(torch, self.scores_type(problem)), device)
        return Workspace(
            scores=scores,
            probs=new_output((*rows, columns), dtype, device) if self.wide_scores else scores,
            row_max=new_output(rows, torch.float32, device),
            row_sum=new_output(rows, torch.float32, device),
            accum=new_output((*rows, problem.head_dim), torch.float32, device),
            row_stride=columns,
        )

    def heads_of(self, span: Span, problem: Problem) -> tuple[int, int]:
        """The first flat query head of a span, and how many it has."""
        group = problem.num_heads_q // problem.num_heads_kv
        return (span.batch * problem.num_heads_kv + span.head_kv) * group, span.count * group
