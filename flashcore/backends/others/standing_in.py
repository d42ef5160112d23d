"""What stands in where no backend has a kernel for a problem's masks: FlashAttention of others, or exact operations."""

from __future__ import annotations

import math

import torch

from flashcore.backends import Backend
from flashcore.backends.others import flash, masked
from flashcore.backends.others.masked import Masking
from flashcore.numerics import seen
from flashcore.numerics.masking import MaskTensors
from flashcore.problem import Problem


class StandIn(Backend):
    """Attention with every kind of mask, on any device; it is in no registry, and no record names it."""

    id = "auto"
    title = "whoever else can"
    role = "peer"
    device = "any"
    dtypes = ("float16", "bfloat16", "float32")
    masks = ("window", "softcap", "sink", "lengths", "ragged")

    def run(self, q, k, v, problem: Problem, masks: MaskTensors | None = None):
        return _attention(q, k, v, problem, masks or MaskTensors(), with_lse=False)

    def run_with_lse(self, q, k, v, problem: Problem, masks: MaskTensors | None = None):
        return _attention(q, k, v, problem, masks or MaskTensors(), with_lse=True)


@torch.no_grad()
def _attention(q, k, v, problem: Problem, masks: MaskTensors, with_lse: bool):
    """`out`, and `lse` where it is wanted, as `Backend.run` has them; gradients are the op's own."""
    masking = Masking(
        problem.causal, problem.window_left, problem.window_right, softcap=problem.softcap or 0.0, sink=masks.sink
    )
    if problem.lengths == "ragged":
        return _ragged(q, k, v, problem, masks, masking, with_lse)
    if not problem.lengths and masks.sink is None:
        rows_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        found = _by_flash("flash_attn_func", rows_first, masking, problem.softmax_scale, with_lse)
        if found is not None:
            return found[0].transpose(1, 2), found[1]
    if problem.lengths:
        return _padded(q, k, v, problem, masks, masking, with_lse)
    return masked.attention(q, k, v, masking, problem.softmax_scale)


def _padded(q, k, v, problem: Problem, masks: MaskTensors, masking: Masking, with_lse: bool):
    """A padded batch: by FlashAttention as a ragged one, whose every other sequence is padding."""
    at_end = problem.lengths == "left"
    if masks.sink is None:
        lengths, sizes = (masks.seqlens_q, masks.seqlens_k), (problem.seqlen_q, problem.seqlen_k)
        starts = (
            seen.alternating(of_one, problem.batch, size, q.device, at_end)
            for of_one, size in zip(lengths, sizes, strict=True)
        )
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v)]
        found = _by_flash(
            "flash_attn_varlen_func", flat, masking, problem.softmax_scale, with_lse, (*starts, *sizes)
        )  # fmt: skip
        if found is not None:
            out, lse = found
            out = out.unflatten(0, (problem.batch, -1)).transpose(1, 2)
            lse = None if lse is None else lse.unflatten(1, (problem.batch, -1)).transpose(0, 1)
            if masks.seqlens_q is not None:
                unreal = seen.unreal(masks.seqlens_q, problem.seqlen_q, at_end)[:, None]
                out = out.masked_fill(unreal[..., None], 0.0)
                lse = None if lse is None else lse.masked_fill(unreal, -math.inf)
            return out, lse
    masking = Masking(**{**vars(masking), "lengths_q": masks.seqlens_q, "lengths_k": masks.seqlens_k, "at_end": at_end})
    if masks.seqlens_k is not None:  # what stands in padding may be anything, and 0 times NaN is NaN
        v = v.masked_fill(seen.unreal(masks.seqlens_k, v.shape[2], at_end)[:, None, :, None], 0.0)
    return masked.attention(q, k, v, masking, problem.softmax_scale)


def _ragged(q, k, v, problem: Problem, masks: MaskTensors, masking: Masking, with_lse: bool):
    tensors = [tensor[0].transpose(0, 1) for tensor in (q, k, v)]  # [tokens, H, D]
    bounds = masks.cu_seqlens_q, masks.cu_seqlens_k, problem.seqlen_q, problem.seqlen_k
    found = None
    if masks.sink is None:
        found = _by_flash("flash_attn_varlen_func", tensors, masking, problem.softmax_scale, with_lse, bounds)
    if found is None:
        out, lse = masked.ragged(*tensors, *bounds, masking, problem.softmax_scale)
    else:
        past = torch.arange(q.shape[2], device=q.device) >= masks.cu_seqlens_q[-1]  # what no sequence owns they leave
        out, lse = found
        out, lse = out.masked_fill(past[:, None, None], 0.0), None if lse is None else lse.masked_fill(past, -math.inf)
    return out.transpose(0, 1)[None], None if lse is None else lse[None]


BOUNDS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def _by_flash(name: str, tensors, masking: Masking, scale: float | None, with_lse: bool, bounds=(None,) * 4):
    """By FlashAttention in its own layout, a package's or torch's; None where neither takes it."""
    if any(0 in tensor.shape for tensor in tensors):
        return None
    words = flash.asked(masking, scale)
    peer = flash.peer(name, tensors[0], words, with_lse)
    if peer is not None:
        places = {word: bound for word, bound in zip(BOUNDS, bounds, strict=True) if bound is not None}
        return flash.called(peer, tensors, {**places, **words}, with_lse)
    if flash.torch_can(*tensors[:2], masking, with_lse):
        return flash.in_torch(*tensors, masking, scale, bounds)
    return None
