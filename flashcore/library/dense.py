"""``torch.ops.flashcore.attention``: what torch's compiler, export, autograd and `torch.vmap` take attention for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from flashcore.errors import InvalidProblem
from flashcore.library import gradients
from flashcore.library._namespace import define, implement, map_over
from flashcore.numerics import transforms
from flashcore.problem import DTYPE_BYTES

DTYPES = {getattr(torch, name): name for name in DTYPE_BYTES}
"""Names of the dtypes that problems may have."""


def check_shapes(q_shape, k_shape, v_shape, q_dtype, k_dtype, v_dtype) -> None:
    """Raise `InvalidProblem` unless three tensors of these shapes and dtypes are one problem of attention."""
    for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
        if len(shape) != 4:
            raise InvalidProblem(
                f"{name} has {len(shape)} dimensions {tuple(shape)}; it has to be [batch, num_heads, seqlen, head_dim]."
            )
        if 0 in shape:
            raise InvalidProblem(f"{name} is empty, shape {tuple(shape)}; every size must be at least 1.")
    if not q_dtype == k_dtype == v_dtype:
        raise InvalidProblem(f"q, k and v have dtypes {q_dtype}, {k_dtype} and {v_dtype}; convert them to one.")
    if q_dtype not in DTYPES:
        raise InvalidProblem(f"dtype {q_dtype} is not supported; use one of {', '.join(map(str, DTYPES))}.")
    if k_shape != v_shape:
        raise InvalidProblem(f"k {tuple(k_shape)} and v {tuple(v_shape)} differ in shape; they have to be the same.")
    if q_shape[0] != k_shape[0]:
        raise InvalidProblem(f"q has batch {q_shape[0]}, and k and v have {k_shape[0]}; they have to be the same.")
    if q_shape[3] != k_shape[3]:
        raise InvalidProblem(f"q has head_dim {q_shape[3]}, and k and v have {k_shape[3]}; they have to be the same.")
    if q_shape[1] % k_shape[1]:
        raise InvalidProblem(f"num_heads_q ({q_shape[1]}) must be a multiple of num_heads_kv ({k_shape[1]}).")


def check_rows(q, k, v) -> None:
    """Raise `InvalidProblem` unless the last dimension of each lies together."""
    if q.shape[3] > 1:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.stride(3) != 1:
                raise InvalidProblem(
                    f"The last dimension of {name} is not contiguous (stride {tensor.stride(3)}); "
                    f"pass {name}.contiguous(), or a view whose head_dim lies together in memory."
                )


def out_strides(q: torch.Tensor) -> tuple[int, ...]:
    """Strides of `out`: the memory order of `q` without its gaps, so that a ``[B, S, H, D]`` view in gives one out."""
    return torch.empty_like(q, device="meta").stride()


def laid_out(out: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """`out` with these strides: itself, or the same numbers moved to where they promise to be."""
    if out.stride() == strides:
        return out
    return torch.empty_strided(out.shape, strides, dtype=out.dtype, device=out.device).copy_(out)


def _fake(q, k, v, causal=False, softmax_scale=None, return_lse=False, backend="auto", batch_invariant=False):
    check_shapes(q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
    check_rows(q, k, v)
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse


attention = define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, bool causal=False, float? softmax_scale=None, bool return_lse=False, "
    "str backend='auto', bool batch_invariant=False) -> (Tensor out, Tensor lse)",
    _fake,
)
"""The op. `lse` is empty, of shape ``[0]``, unless it is asked for; all else as `flashcore.attention`.

A process that loads an exported program has to import `flashcore.ops` first, which says what computes it.
"""


def computed_by(function: Callable) -> None:
    """Say what computes the op; it is called with the arguments of the op."""
    implement(attention, function)


gradients.flow_back(attention, gradients.attention_backward)

# ------------------------------------------------------------------------------------------------------- mapped axes


def _map(
    info, in_dims, q, k, v, causal=False, softmax_scale=None, return_lse=False, backend="auto", batch_invariant=False
):  # fmt: skip
    """The mapped axis is folded into the batch: attention treats its batches alike, and one call does them all."""
    transforms.refuse_derivatives("q, k or v", q, k, v)  # of a torch.func.grad that stands outside the torch.vmap
    folded = [fold(tensor, dim, info.batch_size) for tensor, dim in zip((q, k, v), in_dims, strict=False)]
    out, lse = attention(*folded, causal, softmax_scale, return_lse, backend, batch_invariant)
    out = out.unflatten(0, (info.batch_size, -1))
    return (out, lse.unflatten(0, (info.batch_size, -1))) if return_lse else (out, lse), (0, 0 if return_lse else None)


def fold(tensor: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """``[size * B, ...]`` of a tensor whose mapped axis is `dim`, or that is the same for all when None."""
    whole = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return whole.flatten(0, 1)


map_over(attention, _map)

# ---------------------------------------------------------------------------------------------------------- operations


def flops(q_shape, k_shape, v_shape, *others, out_shape=None, **options) -> int:
    """Operations of the two products, in the convention of `torch.utils.flop_counter`: a mask takes none away."""
    batch, heads, seqlen_q, head_dim = q_shape
    return 4 * batch * heads * seqlen_q * k_shape[2] * head_dim


def backward_flops(grad_shape, grad_lse_shape, q_shape, k_shape, *others, out_shape=None, **options) -> int:
    """Of the five products of the backward pass; the scores are computed once more."""
    return flops(q_shape, k_shape, None) * 5 // 2


register_flop_formula(torch.ops.flashcore.attention)(flops)
register_flop_formula(torch.ops.flashcore.attention_backward)(backward_flops)
