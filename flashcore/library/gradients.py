"""The backward pass of attention, from the `out` and `lse` of whatever computed the forward pass.

With ``P = exp(scores - lse)`` and the sums over a row written ``<>`` (Dao et al., FlashAttention, appendix B.4)::

    dV = P^T dO        dP = dO V^T        dS = P * (dP - <dO * O> + dlse)
    dQ = scale * dS K        dK = scale * dS^T Q

On a GPU torch's own FlashAttention-2 does this for 16-bit tensors. It takes no gradient of `lse`; then, for float32 and
on a CPU, the products stand here, in float32 and for some heads at a time.
"""

from __future__ import annotations

import math

import torch

from flashcore.errors import InvalidProblem
from flashcore.library._namespace import define, differentiate, implement
from flashcore.numerics import ambient

CHUNK_SCORES = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Scores held at once, in float32 and about four times over: 64 MB on a CPU, 2 GB on a GPU."""
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIM, FLASH_STEP = 256, 8
"""Of FlashAttention-2: the largest head_dim, and what it has to be a multiple of."""


def _fake(grad_out, grad_lse, q, k, v, out, lse, causal, softmax_scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attention_backward = define(
    "attention_backward",
    "(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, "
    "float? softmax_scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _fake,
)
"""The op: gradients of q, k and v, each in the dtype and memory order of what it is the gradient of."""


def _refuse(ctx, *grads):
    raise InvalidProblem(
        "Second derivatives of attention were asked for, and FlashCore has first ones only; call "
        "torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.SDPBackend.MATH for them."
    )


differentiate(attention_backward, _refuse)


def takes_flash(q: torch.Tensor, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> bool:
    """Whether FlashAttention-2's backward pass, as torch ships it, takes this."""
    return (
        q.is_cuda
        and grad_out is not None
        and grad_lse is None
        and q.dtype in FLASH_DTYPES
        and q.shape[3] <= FLASH_HEAD_DIM
        and q.shape[3] % FLASH_STEP == 0
        and torch.backends.cuda.is_flash_attention_available()
    )


@ambient.shielded
def _backward(grad_out, grad_lse, q, k, v, out, lse, causal, softmax_scale):
    scale = 1.0 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    by = by_flash if takes_flash(q, grad_out, grad_lse) else by_products
    found = by(grad_out, grad_lse, q, k, v, out, lse, causal, scale)
    return tuple(_like(tensor, grad) for tensor, grad in zip((q, k, v), found, strict=True))


def _like(tensor: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A gradient in the dtype and memory order of what it is the gradient of."""
    wanted = torch.empty_like(tensor)
    same = grad.dtype == wanted.dtype and grad.stride() == wanted.stride()
    return grad if same else wanted.copy_(grad)


implement(attention_backward, _backward)


def by_flash(grad_out, grad_lse, q, k, v, out, lse, causal: bool, scale: float):
    """By ``aten::_scaled_dot_product_flash_attention_backward``, whose causal mask is aligned bottom right as ours."""
    # A scale of 0 or less goes into q, as in the forward pass of that kernel: exact, and it only ever sees one above 0.
    sign = 1.0 if scale > 0 else -1.0 if scale < 0 else 0.0
    # A row that sees no key has lse -inf here and +inf there: exp(-inf - inf) is 0, and exp(-inf + inf) is NaN.
    if causal and q.shape[2] > k.shape[2]:
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of the dropout, which there is none of
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        readable(grad_out), readable(q if sign == 1.0 else q * sign), readable(k), readable(v), readable(out),
        lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, state, state, scale=abs(scale) or 1.0,
    )  # fmt: skip
    return grad_q if sign == 1.0 else grad_q * sign, grad_k, grad_v


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it whose rows start at multiples of 16 bytes and do not overlap."""
    size = tensor.element_size()
    good = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    good = good and all(step > 0 and step * size % 16 == 0 for step in tensor.stride()[:-1])
    return tensor if good else tensor.clone(memory_format=torch.contiguous_format)


def by_products(grad_out, grad_lse, q, k, v, out, lse, causal: bool, scale: float):
    """By five products a chunk of K/V heads, in float32; query heads that share one are rows of one product."""
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    rows = heads_q // heads_kv * seqlen_q

    def grouped(tensor):  # [B * Hkv, G * Sq, ...]
        return tensor.reshape(batch * heads_kv, rows, *tensor.shape[3:])

    def single(tensor):
        return tensor.reshape(batch * heads_kv, seqlen_k, head_dim)

    q_rows, k_all, v_all, lse = grouped(q), single(k), single(v), grouped(lse)
    delta = torch.zeros_like(lse)
    if grad_out is not None:
        grad_out = grouped(grad_out)
        delta += (grad_out.float() * grouped(out).float()).sum(-1)
    if grad_lse is not None:
        delta -= grouped(grad_lse)
    hidden = None
    if causal:
        row = torch.arange(seqlen_q, device=q.device).repeat(rows // seqlen_q)
        hidden = torch.arange(seqlen_k, device=q.device) > row[:, None] + (seqlen_k - seqlen_q)
    found = [torch.empty(t.shape, dtype=torch.float32, device=q.device) for t in (q_rows, k_all, v_all)]
    step = max(1, CHUNK_SCORES.get(q.device.type, CHUNK_SCORES["cpu"]) // (rows * seqlen_k))
    for start in range(0, batch * heads_kv, step):
        part = slice(start, start + step)
        queries, keys, values = q_rows[part].float(), k_all[part].float(), v_all[part].float()
        probs = (queries @ keys.mT).mul_(scale)
        if hidden is not None:
            probs.masked_fill_(hidden, -math.inf)
        # A row that sees no key has lse -inf and no score but -inf: less 0, its probs are 0.
        probs = probs.sub_(lse[part].masked_fill(lse[part] == -math.inf, 0.0)[..., None]).exp_()
        if grad_out is None:
            scores = -delta[part][..., None] * probs
            found[2][part] = 0
        else:
            from_out = grad_out[part].float()
            torch.matmul(probs.mT, from_out, out=found[2][part])
            scores = (from_out @ values.mT).sub_(delta[part][..., None]).mul_(probs)
        torch.matmul(scores, keys, out=found[0][part])
        torch.matmul(scores.mT, queries, out=found[1][part])
    return (found[0] * scale).view(q.shape), (found[1] * scale).view(k.shape), found[2].view(v.shape)
