"""Attention with windows, caps, sinks and lengths as ops of torch: ``masked_attention`` and ``varlen_attention``.

They stand beside the plain op, so that a plain call carries no option that it does not use. Lengths are tensors that
the ops read on the device: one graph serves all lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

from flashcore.errors import InvalidProblem
from flashcore.library import dense, gradients
from flashcore.library._namespace import define, implement, map_over
from flashcore.numerics import plain, transforms
from flashcore.problem import FARTHEST, LARGEST

SIDES = ("right", "left")
"""Where the padding of a sequence may lie."""

# ---------------------------------------------------------------------------------------------------------- arguments


def window(causal: bool, window_left, window_right) -> tuple[int, int]:
    """Both sides of a window as ints, -1 for no limit and at most FARTHEST, so that an op takes whatever is passed.

    Raises
    ------
    InvalidProblem
        One is no whole number, or below -1; keys after a query are asked for together with a causal mask.
    """
    left, right = plain.integer("window_left", window_left), plain.integer("window_right", window_right)
    for name, side in (("window_left", left), ("window_right", right)):
        if side < -1:
            raise InvalidProblem(f"{name} is {side}; it has to be at least 0, or -1 for no limit.")
    if causal and right > 0:
        raise InvalidProblem(
            f"window_right is {right}, and causal=True hides all keys after a query; leave one of the two out."
        )
    return min(left, FARTHEST), min(right, FARTHEST)


def softcap(value) -> float | None:
    """A softcap as a float above 0, or None; `InvalidProblem` for anything else."""
    if value is None:
        return None
    number = plain.number("softcap", value)
    if number is not None and not 0 < number <= LARGEST:  # also of NaN, and in a form that torch's compiler follows
        raise InvalidProblem(f"softcap is {number}; it has to be above 0 and finite in float32, or None for no cap.")
    return number


def side(padding, has_lengths: bool) -> str:
    """Where padding lies; `InvalidProblem` for a word that is none of SIDES, or one that lengths are missing for."""
    if type(padding) is not str or padding not in SIDES:
        shown = plain.shown(padding)
        raise InvalidProblem(f"padding is {shown}; it has to be 'right' or 'left', the same for every sequence.")
    if padding != "right" and not has_lengths:
        raise InvalidProblem(f"padding is '{padding}' without lengths; pass seqlens_k, seqlens_q or both with it.")
    return padding


def check_sink(sink, heads: int, device: torch.device) -> None:
    """Raise `InvalidProblem` unless this is a float tensor with a number for each query head."""
    if sink is None:
        return
    floats = isinstance(sink, torch.Tensor) and sink.layout is torch.strided and sink.is_floating_point()
    if not floats or sink.dim() != 1 or sink.shape[0] != heads:
        raise InvalidProblem(
            f"sink is {plain.shown(sink)}; it has to be a float tensor [{heads}], a score for each query head."
        )
    _check_device("sink", sink, device)


def check_integers(name: str, tensor, size: int, what: str, device: torch.device) -> None:
    """Raise `InvalidProblem` unless this is an int32 tensor ``[size]`` on that device, its numbers in a row."""
    kind = f"an int32 tensor [{size}], {what}"
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32 or tensor.dim() != 1:
        raise InvalidProblem(f"{name} is {plain.shown(tensor)}; it has to be {kind}.")
    if tensor.shape[0] != size:
        raise InvalidProblem(f"{name} is {plain.shown(tensor)}; it has to be {kind}.")
    if size > 1 and tensor.stride(0) != 1:
        raise InvalidProblem(f"{name} has gaps between its numbers (stride {tensor.stride(0)}); pass it contiguous.")
    _check_device(name, tensor, device)


def check_masks(q, sink, seqlens_q, seqlens_k) -> None:
    """Raise `InvalidProblem` unless the tensors of masks fit to `q` ``[B, Hq, Sq, D]``; their numbers are not read."""
    check_sink(sink, q.shape[1], q.device)
    for name, lengths in (("seqlens_q", seqlens_q), ("seqlens_k", seqlens_k)):
        if lengths is not None:
            check_integers(name, lengths, q.shape[0], "a length for each sequence", q.device)


def check_ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, sink) -> None:
    """Raise `InvalidProblem` unless these are one ragged batch; where sequences begin is not read."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise InvalidProblem(f"{name} is {plain.shown(tensor)}; it has to be a dense torch tensor.")
        if tensor.dim() != 3:
            raise InvalidProblem(f"{name} has shape {list(tensor.shape)}; it has to be [tokens, num_heads, head_dim].")
        if tensor.shape[1] == 0 or tensor.shape[2] == 0:
            raise InvalidProblem(f"{name} has shape {list(tensor.shape)}; it needs a head and a head_dim.")
        if tensor.device != q.device:
            raise InvalidProblem(f"{name} lies on {tensor.device} and q on {q.device}; move it there.")
        if tensor.shape[2] > 1 and tensor.stride(2) != 1:
            raise InvalidProblem(
                f"The last dimension of {name} is not contiguous (stride {tensor.stride(2)}); pass {name}.contiguous()."
            )
    if not q.dtype == k.dtype == v.dtype:
        raise InvalidProblem(f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; convert them to one.")
    if q.dtype not in dense.DTYPES:
        raise InvalidProblem(f"dtype {q.dtype} is not supported; use one of {', '.join(map(str, dense.DTYPES))}.")
    if k.shape != v.shape:
        raise InvalidProblem(f"k {list(k.shape)} and v {list(v.shape)} differ in shape; they have to be the same.")
    if q.shape[2] != k.shape[2]:
        raise InvalidProblem(f"q has head_dim {q.shape[2]}, and k and v have {k.shape[2]}; they have to be the same.")
    if q.shape[1] % k.shape[1]:
        raise InvalidProblem(f"num_heads_q ({q.shape[1]}) must be a multiple of num_heads_kv ({k.shape[1]}).")
    if not isinstance(cu_seqlens_q, torch.Tensor) or cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 2:
        raise InvalidProblem(
            f"cu_seqlens_q is {plain.shown(cu_seqlens_q)}; it has to be an int32 tensor [batch + 1], where each "
            "sequence begins, and the end."
        )
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_integers(name, starts, cu_seqlens_q.shape[0], "where each sequence begins, and the end", q.device)
    check_sink(sink, q.shape[1], q.device)


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InvalidProblem(f"{name} lies on {tensor.device} and q on {device}; move it there.")


# --------------------------------------------------------------------------------------------------------------- dense


def _fake(
    q, k, v, sink=None, seqlens_q=None, seqlens_k=None, causal=False, softmax_scale=None, window_left=-1,
    window_right=-1, softcap=None, padding="right", return_lse=False, backend="auto", batch_invariant=False,
):  # fmt: skip
    dense.check_shapes(q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
    dense.check_rows(q, k, v)
    check_masks(q, sink, seqlens_q, seqlens_k)
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse


masked_attention = define(
    "masked_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? sink=None, Tensor? seqlens_q=None, Tensor? seqlens_k=None, "
    "bool causal=False, float? softmax_scale=None, int window_left=-1, int window_right=-1, float? softcap=None, "
    "str padding='right', bool return_lse=False, str backend='auto', bool batch_invariant=False) "
    "-> (Tensor out, Tensor lse)",
    _fake,
)
"""As `flashcore.attention` with masks; `lse` is empty, of shape ``[0]``, unless it is asked for."""


gradients.flow_back(masked_attention, gradients.masked_attention_backward)


def _map(
    info, in_dims, q, k, v, sink=None, seqlens_q=None, seqlens_k=None, causal=False, softmax_scale=None,
    window_left=-1, window_right=-1, softcap=None, padding="right", return_lse=False, backend="auto",
    batch_invariant=False,
):  # fmt: skip
    """As the plain op: the mapped axis is folded into the batch, lengths with it; the sinks are those of one layer."""
    given = [tensor for tensor in (q, k, v, sink) if tensor is not None]
    transforms.refuse_derivatives("q, k, v or sink", *given)
    in_dims = (*in_dims, *(None,) * 3)  # of a call that left tensors out
    if in_dims[3] is not None:
        raise InvalidProblem("sink is mapped by torch.vmap, and one call has one sink a head; call it in a loop.")
    size = info.batch_size
    q, k, v, seqlens_q, seqlens_k = (
        None if tensor is None else dense.fold(tensor, dim, size)
        for tensor, dim in zip((q, k, v, seqlens_q, seqlens_k), (*in_dims[:3], *in_dims[4:6]), strict=True)
    )
    out, lse = masked_attention(
        q, k, v, sink, seqlens_q, seqlens_k, causal, softmax_scale, window_left, window_right, softcap, padding,
        return_lse, backend, batch_invariant,
    )  # fmt: skip
    out = out.unflatten(0, (size, -1))
    return (out, lse.unflatten(0, (size, -1))) if return_lse else (out, lse), (0, 0 if return_lse else None)


map_over(masked_attention, _map)

# -------------------------------------------------------------------------------------------------------------- ragged


def _fake_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sink=None, causal=False, softmax_scale=None,
    window_left=-1, window_right=-1, softcap=None, return_lse=False, backend="auto", batch_invariant=False,
):  # fmt: skip
    check_ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, sink)
    lse = q.new_empty((q.shape[1], q.shape[0]) if return_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse


varlen_attention = define(
    "varlen_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, Tensor? sink=None, bool causal=False, float? softmax_scale=None, int window_left=-1, "
    "int window_right=-1, float? softcap=None, bool return_lse=False, str backend='auto', "
    "bool batch_invariant=False) -> (Tensor out, Tensor lse)",
    _fake_varlen,
)
"""As `flashcore.varlen_attention`; `lse` is empty, of shape ``[0]``, unless it is asked for."""


gradients.flow_back(varlen_attention, gradients.varlen_attention_backward)


def _map_varlen(info, in_dims, *arguments):
    raise InvalidProblem(
        "An argument of varlen_attention is mapped by torch.vmap, which it has no rule for; put the sequences of all "
        "calls into one ragged batch."
    )


map_over(varlen_attention, _map_varlen)


def computed_by(op: torch._ops.OpOverload, function: Callable) -> None:
    """Say what computes one of these ops; it is called with the arguments of the op."""
    implement(op, function)


# ---------------------------------------------------------------------------------------------------------- operations


def _varlen_flops(q_shape, k_shape, v_shape, starts_q, starts_k, rows, keys, *others, out_shape=None, **options) -> int:
    """An upper bound: as if each query had the longest sequence's keys, since nobody reads the lengths here."""
    tokens, heads, head_dim = q_shape
    return 4 * tokens * heads * int(keys) * head_dim


def _varlen_backward_flops(
    grad_shape, grad_lse_shape, q_shape, k_shape, v_shape, out, lse, starts_q, starts_k, rows, keys, *others,
    out_shape=None, **options,
) -> int:  # fmt: skip
    return _varlen_flops(q_shape, k_shape, v_shape, starts_q, starts_k, rows, keys) * 5 // 2


register_flop_formula(torch.ops.flashcore.masked_attention)(dense.flops)
register_flop_formula(torch.ops.flashcore.masked_attention_backward)(dense.backward_flops)
register_flop_formula(torch.ops.flashcore.varlen_attention)(_varlen_flops)
register_flop_formula(torch.ops.flashcore.varlen_attention_backward)(_varlen_backward_flops)
