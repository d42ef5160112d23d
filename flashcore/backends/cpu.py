"""`cpu`: the page loop of the fused kernels, one method a stage, in torch on the CPU.

It rounds where a GPU kernel rounds: products of 16-bit inputs accumulated in float32, probs rounded before P @ V. So a
machine without a GPU bisects this backend, and a bug is planted in it by overriding one method.

Where a problem asks for batch-invariant bits, pages are tiles of 64 keys, whatever the problem's are, and arithmetic is
that of `_in_order`: wherever a row stands, each number in it is the same chain of rounded operations. A tile of which a
row sees nothing multiplies by 1 and adds 0. For such a problem it reads page tables too, one sequence after the other.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from flashcore.backends._contract import Backend
from flashcore.backends._registry import register
from flashcore.errors import Unsupported
from flashcore.numerics import masking, reference
from flashcore.problem import Problem

if TYPE_CHECKING:
    import torch


def _ordered():
    from flashcore.backends import _in_order  # loads torch, which listing backends does without

    return _in_order


@register
class CpuBackend(Backend):
    """Attention over key pages of `problem.page_size`; every page is computed, masked or not."""

    id = "cpu"
    title = "the page loop in torch on the CPU"
    role = "ours"
    device = "cpu"
    dtypes = ("float16", "bfloat16", "float32")
    masks = ("window", "softcap", "sink", "lengths", "ragged")
    traceable = True
    batch_invariant = True
    in_order = False
    """Whether arithmetic is that of `_in_order`; set on a copy, for a problem that asks for it."""
    absent: torch.Tensor | None = None
    """bool ``[seqlen_k]``: keys that are not there, of pages that were dropped; set on such a copy."""

    def for_problem(self, problem: Problem) -> tuple[CpuBackend, Problem]:
        """The backend that computes the problem, and the problem with the pages that it goes by."""
        if not problem.batch_invariant:
            return self, problem
        ordered = copy.copy(self)
        ordered.in_order = True
        return ordered, problem.with_(page_size=_ordered().TILE)

    # Arithmetic: torch's, or of a given order.

    def product(self, a, b):
        """``a @ b``, float32."""
        return _ordered().product(a, b) if self.in_order else a @ b

    def total(self, x):
        """The sum over the keys of a page."""
        return _ordered().total(x) if self.in_order else x.sum(dim=-1)

    def exp(self, x):
        """``e^x``."""
        return _ordered().exp(x) if self.in_order else x.exp()

    def capped(self, scores, problem: Problem):
        """Scores after the softcap, if the problem has one."""
        if problem.softcap is None or not self.in_order:
            return reference.capped(scores, problem)
        return _ordered().tanh(scores / problem.softcap) * problem.softcap

    # Where sequences have lengths, their real rows are brought to the front first, and results back to their places.

    def aligned(self, q, k, v, problem: Problem, masks):
        """Q, K, V, problem and masks with the real rows of each sequence first (`masking.right_aligned`)."""
        return masking.right_aligned(q, k, v, problem, masks)

    def lengths(self, problem: Problem, masks):
        """Real queries and real keys of each sequence, int64 ``[B, 1]`` twice; None where all rows are real."""
        return (masks.seqlens_q.long()[:, None], masks.seqlens_k.long()[:, None]) if problem.lengths else None

    # The stages of one page, in dataflow order. Tensors are [B, Hq, Sq, ...]; k and v are [B, Hq, page, D], float32.

    def kv_of_head(self, tensor: torch.Tensor, problem: Problem) -> torch.Tensor:
        """K or V with one head for each query head, float32: query heads share K/V heads in consecutive groups."""
        return tensor.float().repeat_interleave(problem.num_heads_q // problem.num_heads_kv, dim=1)

    def scores(self, q, k, problem: Problem, page: slice):
        """``softmax_scale * Q @ K^T`` of the page after a softcap, -inf where masked in sequences that are whole."""
        scores = self.capped(self.product(q, k.transpose(-1, -2)).mul_(problem.scale), problem)
        mask = reference.visible(problem, slice(0, problem.seqlen_q), page, q.device)
        return scores if mask is None else scores.masked_fill_(~mask, -math.inf)

    def hidden(self, scores, problem: Problem, page: slice, lengths):
        """The scores, -inf where masked in sequences of these lengths."""
        mask = reference.visible(problem, slice(0, problem.seqlen_q), page, scores.device, lengths)
        return scores.masked_fill(~mask, -math.inf)

    def row_max(self, scores, row_max):
        """The running maximum after this page."""
        return row_max.maximum(scores.amax(dim=-1))

    def rescale(self, before, row_max):
        """What earlier pages are multiplied by, now that the reference moved from `before` to `row_max`."""
        return self.exp(before - reference.safe(row_max))

    def probs(self, scores, row_max):
        """Unnormalised probabilities of the page, float32."""
        return self.exp(scores - reference.safe(row_max)[..., None])

    def row_sum(self, row_sum, rescale, probs):
        """The softmax denominator so far."""
        return rescale * row_sum + self.total(probs)

    def accum(self, accum, rescale, probs, v):
        """``O = O * rescale + P @ V``; `probs` arrive rounded to the problem's dtype, as a Tensor Core takes them."""
        return rescale[..., None] * accum + self.product(probs.float(), v)

    def with_sink(self, accum, row_sum, row_max, sink):
        """The three after the last page, with a key of score `sink` ``[B, Hq, Sq]`` and value 0 counted in."""
        shared = row_max.maximum(sink)
        weight = self.exp(row_max - reference.safe(shared))
        return accum * weight[..., None], row_sum * weight + self.exp(sink - reference.safe(shared)), shared

    def finish(self, accum, row_sum, row_max):
        """``out`` and ``lse`` after the last page; 0 and -inf for a row that saw no key."""
        out = accum / row_sum.masked_fill(row_sum == 0, 1.0)[..., None]
        if not self.in_order:
            return out, row_max + row_sum.log()
        # A product that rounds to 0 may leave -0 in a tile, with which hidden keys go on as -0 and none at all as 0.
        return out + 0.0, row_max + _ordered().log(row_sum)

    def page_of_v(self, v, pages: list[slice], j: int):
        """The V rows that belong to the keys of page j."""
        return v[..., pages[j], :]

    def initial_accum(self, q):
        """The accumulator before the first page."""
        return q.new_zeros(q.shape)

    def _loop(self, q, k, v, problem: Problem, kept: list | None, masks=None):
        """Run all pages; with `kept`, append the stages of each. Real rows come first."""
        dtype = q.dtype
        lengths = None if masks is None else self.lengths(problem, masks)
        # Where sequences have lengths, these say where the masks lie, too.
        open_ = problem if lengths is None else problem.with_(causal=False, window_left=-1, window_right=-1)
        q, k, v = q.float(), self.kv_of_head(k, problem), self.kv_of_head(v, problem)
        row_max = q.new_full(q.shape[:-1], -math.inf)
        row_sum, accum = q.new_zeros(q.shape[:-1]), self.initial_accum(q)
        columns = reference.pages(problem, problem.page_size)
        for j, page in enumerate(columns):
            scores = self.scores(q, k[..., page, :], open_, page)
            if lengths is not None:
                scores = self.hidden(scores, problem, page, lengths)
            if self.absent is not None:
                scores = scores.masked_fill(self.absent[page], -math.inf)
            before, row_max = row_max, self.row_max(scores, row_max)
            rescale = self.rescale(before, row_max)
            probs = self.probs(scores, row_max)
            row_sum = self.row_sum(row_sum, rescale, probs)
            rounded = probs.to(dtype)
            accum = self.accum(accum, rescale, rounded, self.page_of_v(v, columns, j))
            if kept is not None:
                kept.append((scores, row_max, rescale, rounded, row_sum, accum))
        if problem.sink:
            sink = masks.sink[None, :, None].expand_as(row_max)
            if problem.lengths:
                real = reference.real(slice(0, problem.seqlen_q), masks.seqlens_q)
                sink = sink.masked_fill(~real[:, None], -math.inf)
            accum, row_sum, row_max = self.with_sink(accum, row_sum, row_max, sink)
        out, lse = self.finish(accum, row_sum, row_max)
        return out.to(dtype), lse

    def _masked_loop(self, q, k, v, problem: Problem, kept: list | None, masks):
        """`_loop`, with real rows brought to the front where the masks of the problem need that."""
        masking.check_call(masks, problem, q, k)
        if masks is None:
            return self._loop(q, k, v, problem, kept)
        q, k, v, problem, masks = self.aligned(q, k, v, problem, masks)
        return self._loop(q, k, v, problem, kept, masks)

    def run(self, q, k, v, problem, masks=None):
        if problem.lengths == "ragged":
            masking.check_call(masks, problem, q, k)
            groups = masking.alike(masks.cu_seqlens_q, masks.cu_seqlens_k)
            if len(groups) > 1:
                return self._in_groups(q, k, v, problem, masks, groups)
        backend, tiled = self.for_problem(problem)
        out, lse = backend._masked_loop(q, k, v, tiled, None, masks)
        return masking.put_back(out, lse, q, problem, masks)

    def _in_groups(self, q, k, v, problem: Problem, masks, groups: list[list[int]]):
        """`run` of a ragged batch, some of its sequences at a time."""
        out, lse = q.new_zeros(q.shape), q.float().new_full(q.shape[:3], -math.inf)
        for group in groups:
            rows, starts_q, seqlen_q = masking.some_sequences(masks.cu_seqlens_q, group)
            keys, starts_k, seqlen_k = masking.some_sequences(masks.cu_seqlens_k, group)
            part = problem.with_(batch=len(group), seqlen_q=max(seqlen_q, 1), seqlen_k=max(seqlen_k, 1))
            of_part = replace(masks, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
            out[:, :, rows], lse[:, :, rows] = self.run(q[:, :, rows], k[:, :, keys], v[:, :, keys], part, of_part)
        return out, lse

    def why_not_paged(self, problem, *, selected=False):
        if not problem.batch_invariant:
            return "it reads no page table, but for bits that are the same in every batch"
        return "it attends to all pages and takes no selection" if selected else self.why_not(problem)

    def run_paged(self, q, cache, problem, selection=None, masks=None):
        import torch

        from flashcore.paging import gather

        masking.check(masks, problem, q.device)
        if reason := self.why_not_paged(problem, selected=selection is not None):
            raise Unsupported(self.id, reason)
        found = []
        for row in range(cache.batch):
            k, v, present = gather(cache, row)
            if not present.shape[0]:  # one key that nobody sees
                k = v = k.new_zeros(k.shape[0], 1, problem.head_dim)
                present = torch.zeros(1, dtype=torch.bool)
            backend, one = self.for_problem(problem.with_(batch=1, seqlen_k=present.shape[0]))
            backend.absent = ~present
            found.append(backend._masked_loop(q[row : row + 1], k[None], v[None], one, None, masks))
        out, lse = (torch.cat(each) for each in zip(*found, strict=True))
        return out, lse

    def trace(self, q, k, v, problem, masks=None):
        import torch

        kept: list = []
        backend, problem = self.for_problem(problem)
        out, lse = backend._masked_loop(q, k, v, problem, kept, masks)
        scores, row_max, rescale, probs, row_sum, accum = zip(*kept, strict=True)
        return reference.Trace(
            problem.page_size,
            scores=torch.cat(scores, dim=-1),
            row_max=torch.stack(row_max, dim=2),
            rescale=torch.stack(rescale, dim=2),
            probs=torch.cat(probs, dim=-1),
            row_sum=torch.stack(row_sum, dim=2),
            accum=torch.stack(accum, dim=2),
            out=out,
            lse=lse,
        )
