"""Backend `cublaslt`: attention over key pages with cuBLASLt's products and our softmax between them ('Phase 3B').

    scores = scale * Q @ K^T of a page   (cuBLASLt)
    mask, row_max, rescale, probs, row_sum, and the rescale of accum   (kernels/page_softmax.cu)
    accum += P @ V of the page   (cuBLASLt; from zero on the first page)

Four variants differ in how much one launch does and in whether a page's scores stay in the L2 cache.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashcore import cublaslt
from flashcore.backends import Availability, register
from flashcore.backends._cuda import CudaBackend
from flashcore.backends._launch import LoadedKernel, aligned, as_argument, entry_point, launch, outputs_for
from flashcore.backends._outputs import new_output
from flashcore.backends._traces import TraceBuffers
from flashcore.cublaslt import Plan, Policy, Product, choose
from flashcore.errors import ToolMissing
from flashcore.problem import Problem
from flashcore.reference import Trace

_PAGE = struct.Struct("5Q q 6i")
"""`PageParams` of kernels/page_softmax.cu."""
ROWS = 8
"""Query rows a block of page_softmax.cu."""
LARGEST_PAGE = 2048
"""A row of a page has to fit the registers of one warp."""
ENTRY_KEYS = (256, 512, 1024, 2048)
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
    """What a call needs besides its outputs, for one group of heads."""

    scores: torch.Tensor
    probs: torch.Tensor
    row_max: torch.Tensor
    row_sum: torch.Tensor
    accum: torch.Tensor
    row_stride: int


@dataclass(frozen=True)
class _Call:
    """What stays the same through one call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    problem: Problem
    device: int
    buffers: TraceBuffers | None
    loaded: LoadedKernel
    params: Any
    page_size: int
    pages: Sequence[int]


@functools.lru_cache(maxsize=16)
def _side_streams(device: int, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(torch.device("cuda", device)) for _ in range(count))


def _run(plan: Plan, a: int, b: int, d: int, stream: int) -> None:
    """Run a product, with the workspace its algorithm asks for from torch's caching allocator."""
    size = plan.algorithm.workspace_bytes
    room = torch.empty(size, dtype=torch.uint8, device="cuda") if size else None
    plan.run(a, b, d, stream=stream, workspace=room.data_ptr() if size else 0, workspace_bytes=size)


@register
class CublasLt(CudaBackend):
    """`resident`: few heads at a time over whole rows, so that scores and probabilities stay in L2."""

    id = "cublaslt"
    title = "cuBLASLt products with our softmax between them ('Phase 3B')"
    kernel = "page_softmax"
    policy: Policy = "first"
    wide_scores: bool = False
    """Scores in float32; otherwise in the problem's 16 bits, and probabilities are written over them."""
    rounds_scores = True
    pages_of: int | None = 1024
    """Keys in a page; None takes the problem's own page_size."""
    lanes: int = 2
    """Groups under way at once, each on a stream of its own: one's products run under another's softmax."""
    heads_at_once: int | None = 0
    """Query heads in one group; None for all, 0 for as many as keep their scores in L2."""

    def availability(self) -> Availability:
        state = super().availability()
        if not state.ok:
            return state
        try:
            cublaslt.version()
        except ToolMissing as error:
            return Availability(False, "cuBLASLt's bindings are not installed", error.fix)
        return state

    # ---------------------------------------------------------------------------------------- how the work is cut

    def page_size(self, problem: Problem) -> int:
        """Keys in a page."""
        return min(self.pages_of or problem.page_size, LARGEST_PAGE, -(-problem.seqlen_k // ROW_PADDING) * ROW_PADDING)

    def group_of(self, problem: Problem, device: torch.device) -> int:
        """K/V heads in one group."""
        group = problem.num_heads_q // problem.num_heads_kv
        total = problem.batch * problem.num_heads_kv
        if self.heads_at_once is None:
            return total
        if self.heads_at_once:
            return max(1, self.heads_at_once // group)
        a_head = problem.seqlen_q * self.page_size(problem) * (6 if self.wide_scores else 2)
        room = RESIDENT_SHARE * torch.cuda.get_device_properties(device).L2_cache_size / self.lanes
        return max(1, min(total, int(room / (a_head * group))))

    def spans(self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Span]:
        """All K/V heads, cut into groups that one strided batch covers."""
        most = self.group_of(problem, q.device)
        regular = all(t.stride(0) == t.shape[1] * t.stride(1) or problem.batch == 1 for t in (q, k, v))
        heads = problem.batch * problem.num_heads_kv if regular else problem.num_heads_kv
        for batch in range(1 if regular else problem.batch):
            for first in range(0, heads, most):
                yield Span(batch, first, min(most, heads - first))

    def first_row(self, problem: Problem, first_key: int) -> int:
        """The first query row that sees a key of the page that starts at `first_key`."""
        if not problem.causal:
            return 0
        return min(problem.seqlen_q, max(0, first_key - (problem.seqlen_k - problem.seqlen_q)))

    def scores_type(self, problem: Problem) -> str:
        """The dtype that scores are stored in."""
        return "float32" if self.wide_scores else problem.dtype

    def workspace(self, problem: Problem, device: torch.device) -> Workspace:
        """Room for one group of heads, from torch's caching allocator: a captured graph then owns what it uses."""
        columns = -(-self.page_size(problem) // ROW_PADDING) * ROW_PADDING
        heads = self.group_of(problem, device) * (problem.num_heads_q // problem.num_heads_kv)
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

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - backends live as long as the process
    def plan(self, product: Product, alpha: float, beta: float, device: int, room: int) -> Plan:
        """The product with the algorithm that this backend's policy chooses."""
        algorithm, _ = choose(product, policy=self.policy, device=device, workspace_bytes=room)
        return Plan(product, algorithm, alpha=alpha, beta=beta, device=device)

    # ---------------------------------------------------------------------------------------- one call

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        problem: Problem,
        page_table: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention; with `page_table`, over those pages alone, in that order (pages of `page_size(problem)` keys)."""
        out, lse = outputs_for(q)
        self._compute(q, k, v, out, lse, problem, page_table)
        return out, lse

    def trace(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Trace:
        page_size = self.page_size(problem)
        buffers = TraceBuffers.make(problem, page_size, 1, q.device)
        out, lse = (tensor.fill_(float("nan")) for tensor in outputs_for(q))
        self._compute(q, k, v, out, lse, problem, None, buffers)
        trace = buffers.trace(problem, page_size, out, lse)
        # Scores that were stored in 16 bits are given back as such: the judge then allows for that rounding.
        return replace(trace, scores=trace.scores.to(getattr(torch, self.scores_type(problem))))

    def _compute(self, q, k, v, out, lse, problem: Problem, page_table, buffers=None) -> None:
        q, k, v = aligned(q), aligned(k), aligned(v)
        call = _Call(
            q=q, k=k, v=v, problem=problem, device=q.device.index or 0, buffers=buffers,
            loaded=self.load(problem, q.device, trace=buffers is not None),
            params=as_argument(self.params(q, k, v, out, lse, problem)),
            page_size=self.page_size(problem),
            pages=range(-(-problem.seqlen_k // self.page_size(problem))) if page_table is None else page_table,
        )  # fmt: skip
        main = torch.cuda.current_stream(q.device)
        spans = list(self.spans(problem, q, k, v))
        lanes = min(self.lanes, len(spans)) if buffers is None else 1
        room = [self.workspace(problem, q.device) for _ in range(lanes)]
        if lanes == 1:
            for span in spans:
                self._span(call, span, room[0], main.cuda_stream)
            return
        streams = _side_streams(call.device, lanes)
        for side in streams:
            side.wait_stream(main)
        for number, span in enumerate(spans):
            self._span(call, span, room[number % lanes], streams[number % lanes].cuda_stream)
        for side in streams:
            main.wait_stream(side)

    def _span(self, call: _Call, span: Span, work: Workspace, stream: int) -> None:
        """All pages of one group of heads, on one stream."""
        problem = call.problem
        keys_of_entry = next(keys for keys in ENTRY_KEYS if keys >= call.page_size)
        bits = 8 * work.scores.element_size()
        softmax = entry_point(call.loaded, f"page_softmax_{bits}_{keys_of_entry}", call.device)
        finish = entry_point(call.loaded, "page_finish", call.device)
        more = () if call.buffers is None else (as_argument(call.buffers.packed()),)
        threads = call.loaded.threads
        first_head, num_heads = self._heads(span, problem)
        for number, index in enumerate(call.pages):
            first_key = index * call.page_size
            keys = min(call.page_size, problem.seqlen_k - first_key)
            first_row = self.first_row(problem, first_key) if number else 0
            rows = problem.seqlen_q - first_row
            if rows == 0:
                continue
            page = as_argument(_PAGE.pack(
                work.scores.data_ptr(), work.probs.data_ptr(), work.row_max.data_ptr(), work.row_sum.data_ptr(),
                work.accum.data_ptr(), work.row_stride, first_head, first_row, number, first_key, keys, num_heads,
            ))  # fmt: skip
            self._scores(call, work, span, first_row, first_key, keys, stream)
            launch(softmax, -(-rows // ROWS) * num_heads, threads, (call.params, page, *more), stream=stream)
            self._values(call, work, span, first_row, first_key, keys, number, stream)
            if call.buffers is not None:
                accum = call.buffers.accum.view(-1, *call.buffers.accum.shape[2:])
                kept = accum[first_head : first_head + num_heads, number, first_row:]
                kept.copy_(work.accum[:num_heads, first_row:])  # a traced call runs on torch's current stream alone
        launch(finish, -(-num_heads * problem.seqlen_q // ROWS), threads, (call.params, page, *more), stream=stream)

    def _heads(self, span: Span, problem: Problem) -> tuple[int, int]:
        """The first flat query head of a span, and how many it has."""
        group = problem.num_heads_q // problem.num_heads_kv
        return (span.batch * problem.num_heads_kv + span.head_kv) * group, span.count * group

    def _scores(self, call: _Call, work, span: Span, first_row, first_key, keys, stream) -> None:
        """scores = softmax_scale * Q @ K^T, one strided batch for each query head of a group."""
        q, k, problem = call.q, call.k, call.problem
        group = problem.num_heads_q // problem.num_heads_kv
        _, head_q, row_q = self.strides("q", q)
        _, head_k, row_k = self.strides("k", k)
        next_scores = problem.seqlen_q * work.row_stride
        product = Product(
            m=problem.seqlen_q - first_row, n=keys, k=problem.head_dim, batch=span.count, transpose_b=True,
            dtype=problem.dtype, out_dtype=self.scores_type(problem), row_a=row_q, row_b=row_k,
            row_d=work.row_stride, next_a=group * head_q, next_b=head_k, next_d=group * next_scores,
        )  # fmt: skip
        plan = self.plan(product, self.scale(problem), 0.0, call.device, cublaslt.workspace_limit())
        first_q = span.batch * q.stride(0) + span.head_kv * group * head_q + first_row * row_q
        first_k = span.batch * k.stride(0) + span.head_kv * head_k + first_key * row_k
        for member in range(group):
            _run(
                plan,
                q.data_ptr() + q.element_size() * (first_q + member * head_q),
                k.data_ptr() + k.element_size() * first_k,
                work.scores.data_ptr()
                + work.scores.element_size() * (member * next_scores + first_row * work.row_stride),
                stream,
            )  # fmt: skip

    def _values(self, call: _Call, work, span: Span, first_row, first_key, keys, number, stream) -> None:
        """accum = P @ V on the first page, accum += P @ V after it."""
        v, problem = call.v, call.problem
        group = problem.num_heads_q // problem.num_heads_kv
        _, head_v, row_v = self.strides("v", v)
        next_probs, next_accum = problem.seqlen_q * work.row_stride, problem.seqlen_q * problem.head_dim
        product = Product(
            m=problem.seqlen_q - first_row, n=problem.head_dim, k=keys, batch=span.count, dtype=problem.dtype,
            out_dtype="float32", row_a=work.row_stride, row_b=row_v, row_d=problem.head_dim,
            next_a=group * next_probs, next_b=head_v, next_d=group * next_accum,
        )  # fmt: skip
        plan = self.plan(product, 1.0, self.beta(number), call.device, cublaslt.workspace_limit())
        first_v = span.batch * v.stride(0) + span.head_kv * head_v + first_key * row_v
        for member in range(group):
            _run(
                plan,
                work.probs.data_ptr() + work.probs.element_size() * (member * next_probs + first_row * work.row_stride),
                v.data_ptr() + v.element_size() * first_v,
                work.accum.data_ptr() + 4 * (member * next_accum + first_row * problem.head_dim),
                stream,
            )  # fmt: skip

    def beta(self, number: int) -> float:
        """What the product with V is added to: nothing on the first page, what is there after it."""
        return 0.0 if number == 0 else 1.0


@register
class CublasLtBatched(CublasLt):
    """`batched`: one launch a page for all heads at once; scores go through device memory."""

    id = "cublaslt-batched"
    title = "cuBLASLt, all heads in one launch a page"
    pages_of = LARGEST_PAGE
    lanes = 1
    heads_at_once = None


@register
class CublasLtLoop(CublasLt):
    """`loop`: one launch a head and page, as the original status report's kernel did."""

    id = "cublaslt-loop"
    title = "cuBLASLt, one launch a head and page"
    policy = "largest-workspace"
    wide_scores = True
    rounds_scores = False
    pages_of = None
    lanes = 1
    heads_at_once = 1
    swept = False
