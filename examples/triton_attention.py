"""FlashAttention's forward pass in Triton, small and right: a kernel to try the diagnosis on, or to begin from.

On a GPU, with Triton installed (torch brings it on Linux):

    flashcore diagnose examples/triton_attention.py:attention --lse natural

says that it is right. Change one line, such as the one that multiplies by the scale, and ask again: the finding names
the change, the first element it shows at, and the smallest case that still fails. In a notebook the same question is
``flashcore.debug("examples/triton_attention.py:attention")``, and each call reads the file anew.

The module can be imported without Triton; calling `attention` then says what is missing.
"""

from __future__ import annotations

import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

HEAD_DIMS = (16, 32, 64, 128, 256)
"""What the kernel takes: `tl.dot` wants powers of two from 16 on."""


def _kernel(function):
    """Compiled by Triton where it is installed."""
    return function if triton is None else triton.jit(function)


@_kernel
def _forward(
    q, k, v, out, lse, scale, seqlen_q, seqlen_k, num_heads, group,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block: BLOCK_M rows of one head, over all keys in tiles of BLOCK_N."""
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    head_kv = head // group
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, HEAD_DIM)
    there = row[:, None] < seqlen_q

    q_first = q + batch * q_batch + head * q_head
    q_tile = tl.load(q_first + row[:, None] * q_row + column[None, :], mask=there, other=0.0)
    k_first = k + batch * k_batch + head_kv * k_head
    v_first = v + batch * v_batch + head_kv * v_head
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accum = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    last = seqlen_k
    if CAUSAL:  # the mask is aligned bottom right: no row of this block sees a key further on
        last = tl.minimum(seqlen_k, (tl.program_id(0) + 1) * BLOCK_M + seqlen_k - seqlen_q)
    for start in range(0, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k_tile = tl.load(k_first + key[None, :] * k_row + column[:, None], mask=key[None, :] < seqlen_k, other=0.0)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee")
        scores = scores * scale
        seen = key[None, :] < seqlen_k
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None] + seqlen_k - seqlen_q)
        scores = tl.where(seen, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1))
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
        rescale = tl.exp(row_max - safe)
        probs = tl.exp(scores - safe[:, None])
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        v_tile = tl.load(v_first + key[:, None] * v_row + column[None, :], mask=key[:, None] < seqlen_k, other=0.0)
        accum = accum * rescale[:, None]
        accum += tl.dot(probs.to(v_tile.dtype), v_tile, input_precision="ieee")
        row_max = new_max

    accum = accum / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]  # a row that sees no key is 0
    place = out + batch * out_batch + head * out_head + row[:, None] * out_row + column[None, :]
    tl.store(place, accum.to(out.dtype.element_ty), mask=there)
    tl.store(lse + tl.program_id(1).to(tl.int64) * seqlen_q + row, row_max + tl.log(row_sum), mask=row < seqlen_q)


def attention(q, k, v, causal: bool = False, softmax_scale: float | None = None, return_lse: bool = False):
    """``softmax(softmax_scale * q k^T + mask) v`` by one kernel of Triton.

    Parameters
    ----------
    q, k, v
        ``[batch, num_heads, seqlen, head_dim]`` on a GPU, float16, bfloat16 or float32; K and V may have fewer heads.
    causal
        Aligned bottom right: the last query sees every key.
    softmax_scale
        None for ``1 / sqrt(head_dim)``.
    return_lse
        Also return the natural logarithm of each row's softmax denominator, float32 ``[batch, num_heads, seqlen]``.

    Raises
    ------
    RuntimeError
        Triton is not installed, or the tensors lie on no GPU.
    ValueError
        A head_dim that the kernel does not take, or heads that do not divide.
    """
    if triton is None:
        raise RuntimeError("This attention is a Triton kernel, and Triton is not installed: pip install triton.")
    if not q.is_cuda:
        raise RuntimeError(f"This attention is a Triton kernel and needs tensors on a GPU; q lies on {q.device}.")
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_heads_kv, seqlen_k = k.shape[1:3]
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim} is not taken; it has to be one of {', '.join(map(str, HEAD_DIMS))}.")
    if num_heads % num_heads_kv:
        raise ValueError(f"{num_heads} query heads cannot share {num_heads_kv} heads of K and V.")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    block_m, block_n = (64, 64) if head_dim * q.element_size() <= 256 else (32, 32)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    _forward[(triton.cdiv(seqlen_q, block_m), batch * num_heads)](
        q, k, v, out, lse, scale, seqlen_q, seqlen_k, num_heads, num_heads // num_heads_kv,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        HEAD_DIM=head_dim, CAUSAL=causal, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, num_stages=2,
    )  # fmt: skip
    return (out, lse) if return_lse else out
