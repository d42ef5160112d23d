"""Gradients of attention over ranks: keys travel once more, and what each rank finds for them goes to their owner."""

from __future__ import annotations

import contextlib

import torch
from torch.autograd.function import once_differentiable

from flashcore.library.gradients import attention_backward
from flashcore.numerics import ambient
from flashcore.parallel.computing import Rows, computed_by_plan, fetched, parts, wait
from flashcore.parallel.plan import Zigzag, length, owned
from flashcore.parallel.ranks import Ranks, travel


class Differentiable(torch.autograd.Function):
    """`out` and `lse` of plan `gather`, through which gradients flow; all ranks run the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, ranks: Ranks, cut: Zigzag, scale: float | None, backend: str):
        out, lse = computed_by_plan(q, k, v, ranks, cut, "gather", scale, True, backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ranks, ctx.cut, ctx.scale = ranks, cut, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
            found = backward(grad_out, grad_lse, q, k, v, out, lse, ctx.ranks, ctx.cut, ctx.scale)
        return *found, None, None, None, None


@ambient.shielded
def backward(grad_out, grad_lse, q, k, v, out, lse, ranks: Ranks, cut: Zigzag, scale: float | None):
    """Gradients of this rank's q, k and v, each in the dtype of what it is the gradient of.

    Those of k and v are sums in float32, over two calls of a rank and over the ranks, in a fixed order. What is summed
    has been rounded by the backward pass to the dtype of `k`.
    """
    room = fetched(k, v, ranks, cut)
    keys, values = room.views()
    grads = Rows(k, keys.shape[2], torch.float32)
    for tensor in grads.both:
        tensor.zero_()
    grad_q = torch.zeros_like(q)
    for call in cut.gathered(ranks.rank).calls:
        rows, seen = slice(*call.rows), slice(*call.keys)
        grad_q[:, :, rows], *found = attention_backward(
            *(None if grad is None else grad[:, :, rows] for grad in (grad_out, grad_lse)), q[:, :, rows],
            keys[:, :, seen], values[:, :, seen], out[:, :, rows], lse[:, :, rows], call.causal, scale,
        )  # fmt: skip
        for whole, part in zip(grads.both, found, strict=True):
            whole[seen] += part.permute(2, 0, 1, 3)
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    came = {rank: [torch.empty_like(part) for part in parts(grads, cut, ranks.rank, rank)] for rank in others}
    wait(travel(ranks, {rank: parts(grads, cut, rank, ranks.rank) for rank in others}, came))
    for rank in others:
        for mine, theirs in zip(parts(grads, cut, ranks.rank, rank), came[rank], strict=True):
            mine += theirs
    return grad_q, *(_of_shard(grad, k, ranks, cut) for grad in grads.both)


def _of_shard(grad: torch.Tensor, like: torch.Tensor, ranks: Ranks, cut: Zigzag) -> torch.Tensor:
    """The two chunks that this rank owns, as its shard has them."""
    mine, at = torch.empty_like(like), 0
    for chunk in owned(ranks.rank, ranks.size):
        start, stop = cut.key_chunks[chunk]
        mine[:, :, at : at + length((start, stop))] = grad[start:stop].permute(1, 2, 0, 3)
        at += stop - start
    return mine
