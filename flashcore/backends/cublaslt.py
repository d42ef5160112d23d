"""Backend `cublaslt`: attention over key pages with cuBLASLt's products and our softmax between them ('Phase 3B').

    scores = scale * Q @ K^T of a page   (cuBLASLt)
    mask, row_max, rescale, probs, row_sum, and the rescale of accum   (kernels/page_softmax.cu)
    accum += P @ V of the page   (cuBLASLt; from zero on the first page)

The variants differ in how much one launch does and in whether a page's scores stay in the L2 cache: `cublaslt` (few
heads at a time, scores in L2), `cublaslt-graph` (the same as one CUDA graph), `cublaslt-batched`, `cublaslt-loop`.

Scores go through memory, and but for `cublaslt-loop` they do so in the problem's own 16 bits, softmax_scale applied. In
float16 a scaled score above 65504 is therefore stored as infinity, and its row of `out` and `lse` comes out as NaN:
nothing hides it. Below -65504 a score counts as masked. Where such scores may occur (large activations, or a scale of
1), take bfloat16, `cublaslt-loop`, whose scores are float32, or a fused kernel.

The same rounding is in `lse`: where a fused kernel is off by a millionth, these are by up to half a step of the largest
scores, by some 3e-4 at float16 scores of a few units. The bound of a check has that rounding in it for a backend that
says so (`rounds_scores`).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashcore.backends._contract import Availability
from flashcore.backends._cublaslt_cut import LARGEST_PAGE, Cut, Span, Workspace
from flashcore.backends._cublaslt_cut import RESIDENT_SHARE as RESIDENT_SHARE
from flashcore.backends._page_tables import Page, PageTable, page_at, parts
from flashcore.backends._registry import register
from flashcore.backends._traces import TraceBuffers
from flashcore.errors import FlashCoreError, ToolMissing, Unsupported
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Plan, Policy, Product, choose
from flashcore.gpu.launching import LoadedKernel, aligned, as_argument, entry_point, launch, outputs_for
from flashcore.numerics.reference import STAGES, Trace
from flashcore.problem import Problem

_PAGE = struct.Struct("5Q q 6i")
"""`PageParams` of kernels/page_softmax.cu."""
ENTRY_KEYS = (256, 512, 1024, 2048)
"""The most keys of a page that page_softmax.cu has an entry for."""


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
    pages: Sequence[Page]


@functools.lru_cache(maxsize=16)
def _side_streams(device: int, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(torch.device("cuda", device)) for _ in range(count))


def takeable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy where cuBLASLt cannot take it: rows that start at odd places or overlap."""
    tensor = aligned(tensor)
    if tensor.stride(2) >= tensor.shape[3]:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _run(plan: Plan, a: int, b: int, d: int, work: Workspace, stream: int) -> None:
    """Run a product, with as much workspace as its algorithm asks for."""
    size = plan.algorithm.workspace_bytes
    plan.run(a, b, d, stream=stream, workspace=work.room(size), workspace_bytes=size)


@register
class CublasLt(Cut):
    """`resident`: few heads at a time over whole rows, so that scores and probabilities stay in L2."""

    id = "cublaslt"
    title = "cuBLASLt products with our softmax between them ('Phase 3B')"
    kernel = "page_softmax"
    policy: Policy = "first"

    def availability(self) -> Availability:
        state = super().availability()
        if not state.ok:
            return state
        try:
            cublaslt.version()
        except ToolMissing as error:
            return Availability(False, "cuBLASLt's bindings are not installed", error.fix)
        return state

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - backends live as long as the process
    def plan(self, product: Product, alpha: float, beta: float, device: int, room: int) -> Plan:
        """The product with the algorithm that this backend's policy chooses."""
        algorithm, _ = choose(product, policy=self.policy, device=device, workspace_bytes=room)
        return Plan(product, algorithm, alpha=alpha, beta=beta, device=device)

    # ---------------------------------------------------------------------------------------- one call

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, page_table: PageTable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over all keys or, with `page_table`, over those of the pages that it names.

        Parameters
        ----------
        page_table
            Page indices for every sequence alike, or an integer tensor ``[batch, max_pages]`` on either device with a
            row for each sequence; -1 ends a row, and what follows it is not read. Page j holds the keys
            ``j * problem.page_size`` to ``(j + 1) * problem.page_size - 1``; the one at the end of the keys holds
            those that there are, wherever it stands in the row. Pages are visited in the order given; one that is
            named twice counts twice. Keys keep their positions: under `causal` a query sees those of the named pages
            that it would see without a table. A query that sees none gives 0, and -inf in `lse`.

            A table on the GPU is read to the host once a call, which waits for it; cuBLASLt takes addresses from the
            host. Sequences with the same pages run together, and otherwise one after the other.

        Raises
        ------
        PageTableError
            The table has a wrong shape or names a page that does not exist.
        Unsupported
            `problem.page_size` is more than a row of the softmax kernel holds.
        """
        out, lse = outputs_for(q)
        if page_table is None:
            size = self.page_size(problem)
            self._compute(q, k, v, out, lse, problem, size, self._pages(problem, size))
            return out, lse
        size = self._size_in_tables(problem)
        for which, part, indices in parts(page_table, problem, size):
            pages = [page_at(index, part, size) for index in indices]
            self._compute(q[which], k[which], v[which], out[which], lse[which], part, size, pages)
        return out, lse

    def trace(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, page_table: PageTable | None = None
    ) -> Trace:
        """The stages of `run`, of all heads of a group on one stream.

        With `page_table` they are those of the dense problem whose K and V are the named pages side by side, in that
        order, with ``seqlen_k`` keys all in all: what it has to be judged against.

        Raises
        ------
        PageTableError
            As for `run`.
        Unsupported
            With a table: the problem is causal (side by side, keys lose their positions), sequences have different
            many keys or none, or a short page is not the last one.
        """
        if page_table is None:
            size = self.page_size(problem)
            return self._trace(q, k, v, problem, size, self._pages(problem, size))
        size = self._size_in_tables(problem)
        traces = []
        for which, part, indices in parts(page_table, problem, size):
            pages = [
                page_at(index, part, size)._replace(position=number * size) for number, index in enumerate(indices)
            ]
            keys = sum(page.keys for page in pages)
            if problem.causal or not keys or any(page.keys < size for page in pages[:-1]):
                raise Unsupported(
                    self.id, "with a page table it is traced without a causal mask, over pages of which only the last "
                    "may be a short one"
                )  # fmt: skip
            traces.append(self._trace(q[which], k[which], v[which], part.with_(seqlen_k=keys), size, pages))
        if len({trace.scores.shape[-1] for trace in traces}) > 1:
            raise Unsupported(self.id, "a trace needs as many keys in each sequence's pages")
        return Trace(size, **{stage: torch.cat([getattr(trace, stage) for trace in traces]) for stage in STAGES})

    def _size_in_tables(self, problem: Problem) -> int:
        """Keys in a page that a table names."""
        if problem.page_size > LARGEST_PAGE:
            raise Unsupported(self.id, f"pages of a table hold {LARGEST_PAGE} keys at most (got {problem.page_size})")
        return problem.page_size

    def _pages(self, problem: Problem, page_size: int) -> list[Page]:
        return [page_at(index, problem, page_size) for index in range(self.num_pages(problem, page_size))]

    def _trace(self, q, k, v, problem: Problem, page_size: int, pages: Sequence[Page]) -> Trace:
        buffers = TraceBuffers.make(problem, page_size, 1, q.device)
        out, lse = (tensor.fill_(float("nan")) for tensor in outputs_for(q))
        self._compute(q, k, v, out, lse, problem, page_size, pages, buffers)
        trace = buffers.trace(problem, page_size, out, lse)
        # Scores that were stored in 16 bits are given back as such: the judge then allows for that rounding.
        return replace(trace, scores=trace.scores.to(getattr(torch, self.scores_type(problem))))

    def _compute(self, q, k, v, out, lse, problem: Problem, page_size: int, pages: Sequence[Page], buffers=None):
        if not pages:
            out.zero_()
            lse.fill_(float("-inf"))
            return
        q, k, v = (takeable(tensor) for tensor in (q, k, v))
        call = _Call(
            q=q, k=k, v=v, problem=problem, device=q.device.index or 0, buffers=buffers,
            loaded=self.load(problem, q.device, trace=buffers is not None),
            params=as_argument(self.params(q, k, v, out, lse, problem)), page_size=page_size, pages=pages,
        )  # fmt: skip
        main = torch.cuda.current_stream(q.device)
        spans = list(self.spans(problem, q, k, v, page_size))
        lanes = min(self.lanes, len(spans)) if buffers is None else 1
        room = [self.workspace(problem, q.device, page_size) for _ in range(lanes)]
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
        """All pages of one group of heads, on one stream. What is refused carries the stage it happened at."""
        problem, tile_m = call.problem, call.loaded.tile_m
        keys_of_entry = next(keys for keys in ENTRY_KEYS if keys >= call.page_size)
        bits = 8 * work.scores.element_size()
        softmax = entry_point(call.loaded, f"page_softmax_{bits}_{keys_of_entry}", call.device)
        finish = entry_point(call.loaded, "page_finish", call.device)
        more = () if call.buffers is None else (as_argument(call.buffers.packed()),)
        threads = call.loaded.threads
        first_head, num_heads = self.heads_of(span, problem)
        for number, page in enumerate(call.pages):
            first_row = self.first_row(problem, page.position) if number else 0
            rows = problem.seqlen_q - first_row
            if rows == 0:
                continue
            packed = as_argument(_PAGE.pack(
                work.scores.data_ptr(), work.probs.data_ptr(), work.row_max.data_ptr(), work.row_sum.data_ptr(),
                work.accum.data_ptr(), work.row_stride, first_head, first_row, number, page.position, page.keys,
                num_heads,
            ))  # fmt: skip
            stage = "scores"
            try:
                self._scores(call, work, span, first_row, page, stream)
                stage = "probs"
                launch(softmax, -(-rows // tile_m) * num_heads, threads, (call.params, packed, *more), stream=stream)
                stage = "accum"
                self._values(call, work, span, first_row, page, number, stream)
            except FlashCoreError as error:
                error.stage = stage
                raise
            if call.buffers is not None:
                accum = call.buffers.accum.view(-1, *call.buffers.accum.shape[2:])
                kept = accum[first_head : first_head + num_heads, number, first_row:]
                kept.copy_(work.accum[:num_heads, first_row:])  # a traced call runs on torch's current stream alone
        blocks = -(-num_heads * problem.seqlen_q // tile_m)
        launch(finish, blocks, threads, (call.params, packed, *more), stream=stream)

    def _scores(self, call: _Call, work: Workspace, span: Span, first_row: int, page: Page, stream: int) -> None:
        """scores = softmax_scale * Q @ K^T, one strided batch for each query head of a group."""
        q, k, problem = call.q, call.k, call.problem
        group = problem.num_heads_q // problem.num_heads_kv
        _, head_q, row_q = self.strides("q", q)
        _, head_k, row_k = self.strides("k", k)
        _, step = self.queries_of(span, 0, problem)
        next_scores = problem.seqlen_q * work.row_stride
        product = Product(
            m=problem.seqlen_q - first_row, n=page.keys, k=problem.head_dim, batch=span.count, transpose_b=True,
            dtype=problem.dtype, out_dtype=self.scores_type(problem), row_a=row_q, row_b=row_k,
            row_d=work.row_stride, next_a=step * head_q, next_b=head_k, next_d=group * next_scores,
        )  # fmt: skip
        plan = self.plan(product, self.alpha(problem), 0.0, call.device, cublaslt.workspace_limit())
        first_k = span.batch * k.stride(0) + span.head_kv * head_k + page.first_key * row_k
        for member in range(group):
            head, _ = self.queries_of(span, member, problem)
            first_q = span.batch * q.stride(0) + head * head_q + first_row * row_q
            first_score = member * next_scores + first_row * work.row_stride
            _run(
                plan,
                q.data_ptr() + q.element_size() * first_q,
                k.data_ptr() + k.element_size() * first_k,
                work.scores.data_ptr() + work.scores.element_size() * first_score,
                work,
                stream,
            )  # fmt: skip

    def _values(
        self, call: _Call, work: Workspace, span: Span, first_row: int, page: Page, number: int, stream: int
    ) -> None:
        """accum = P @ V on the first page, accum += P @ V after it."""
        v, problem = call.v, call.problem
        group = problem.num_heads_q // problem.num_heads_kv
        _, head_v, row_v = self.strides("v", v)
        next_probs, next_accum = problem.seqlen_q * work.row_stride, problem.seqlen_q * problem.head_dim
        product = Product(
            m=problem.seqlen_q - first_row, n=problem.head_dim, k=page.keys, batch=span.count, dtype=problem.dtype,
            out_dtype="float32", row_a=work.row_stride, row_b=row_v, row_d=problem.head_dim,
            next_a=group * next_probs, next_b=head_v, next_d=group * next_accum,
        )  # fmt: skip
        plan = self.plan(product, 1.0, self.beta(number), call.device, cublaslt.workspace_limit())
        first_v = span.batch * v.stride(0) + span.head_kv * head_v + self.first_value(page) * row_v
        for member in range(group):
            first_prob = member * next_probs + first_row * work.row_stride
            first_accum = member * next_accum + first_row * problem.head_dim
            _run(
                plan,
                work.probs.data_ptr() + work.probs.element_size() * first_prob,
                v.data_ptr() + v.element_size() * first_v,
                work.accum.data_ptr() + work.accum.element_size() * first_accum,
                work,
                stream,
            )  # fmt: skip

    def first_value(self, page: Page) -> int:
        """The row of V that belongs to a page's first key."""
        return page.first_key if page.first_value is None else page.first_value

    def beta(self, number: int) -> float:
        """What the product with V is added to: nothing on the first page, what is there after it."""
        return 0.0 if number == 0 else 1.0


@register
class CublasLtBatched(CublasLt):
    """`batched`: one launch a page for all heads at once; scores go through device memory."""

    id = "cublaslt-batched"
    title = "cuBLASLt, all heads in one launch a page"
    variant_of = "cublaslt"
    pages_of = LARGEST_PAGE
    lanes = 1
    heads_at_once = None
    swept = False


@register
class CublasLtLoop(CublasLt):
    """`loop`: one launch a head and page, as the original status report's kernel did."""

    id = "cublaslt-loop"
    title = "cuBLASLt, one launch a head and page"
    variant_of = "cublaslt"
    policy = "largest-workspace"
    wide_scores = True
    rounds_scores = False
    pages_of = None
    lanes = 1
    heads_at_once = 1
    swept = False
