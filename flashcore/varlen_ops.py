"""Attention of a ragged batch as a user calls it: sequences of any lengths end to end, and nothing read back."""

from __future__ import annotations

import torch

from flashcore import ops
from flashcore.errors import InvalidProblem
from flashcore.library import dense, masked
from flashcore.numerics import plain, transforms
from flashcore.problem import Problem


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    batch_invariant: bool | None = None,
):
    """`flashcore.attention` of sequences that lie one after the other, without padding.

    Parameters
    ----------
    q
        ``[total_q, num_heads_q, head_dim]``, float16, bfloat16 or float32, the last dimension contiguous.
    k, v
        ``[total_k, num_heads_kv, head_dim]`` of the same dtype and device; num_heads_q has to be a multiple of
        num_heads_kv.
    cu_seqlens_q, cu_seqlens_k
        int32 ``[batch + 1]`` on the device of `q`: sequence b owns the rows from entry b up to entry b + 1, from 0 to
        the total. A sequence may be empty. They are never read back from a GPU, so that one graph, compiled or
        captured, serves all lengths; FLASHCORE_DEBUG=1 asks for a check.
    max_seqlen_q, max_seqlen_k
        At least the longest sequence's length.
    causal, softmax_scale, window_left, window_right, softcap, sink, backend, return_lse, batch_invariant
        As in `flashcore.attention`. Masks are aligned bottom right in each sequence, by its own lengths.

    Under `torch.compile` and `torch.export` the call is one op, ``torch.ops.flashcore.varlen_attention``. Gradients
    flow back through `out` and `lse` to `q`, `k`, `v` and `sink`, first derivatives only. `torch.vmap` has no rule for
    it.

    Returns
    -------
    out : ``[total_q, num_heads_q, head_dim]``
        In the dtype of `q`, with the strides of ``torch.empty_like(q)``; 0 in rows that see no key.
    lse : float32 ``[num_heads_q, total_q]``, with `return_lse`
        Natural logarithm of the softmax denominator, -inf in rows that see no key and no sink.

    Raises
    ------
    InvalidProblem
        The tensors do not fit together; an option is of the wrong type, or makes no sense; places of sequences fall,
        or end elsewhere than the tensor does (on a GPU with FLASHCORE_DEBUG=1 only); a derivative is asked for that
        there is none of.
    UnknownName, Unsupported, BackendUnavailable
        As `flashcore.attention`.
    """
    causal, return_lse = plain.flag("causal", causal), plain.flag("return_lse", return_lse)
    softmax_scale, backend = plain.softmax_scale(softmax_scale), plain.word("backend", backend)
    left, right = masked.window(causal, window_left, window_right)
    options = causal, softmax_scale, left, right, masked.softcap(softcap)
    batch_invariant = plain.batch_invariant(batch_invariant)
    bounds = (
        cu_seqlens_q, cu_seqlens_k, _longest("max_seqlen_q", max_seqlen_q), _longest("max_seqlen_k", max_seqlen_k)
    )  # fmt: skip
    given = q, k, v, cu_seqlens_q, cu_seqlens_k, sink
    if torch.compiler.is_compiling():
        transforms.refuse_traced_derivatives(ops.NAMES)
    if torch.compiler.is_compiling() or (not ops.in_memory(*given) and ops.wants_dispatch(*given, names=ops.NAMES)):
        with_lse = ops.lse_for_gradients(return_lse, backend, q, k, v, sink)
        out, lse = masked.varlen_attention(q, k, v, *bounds, sink, *options, with_lse, backend, batch_invariant)
    else:
        out, lse = _compute(q, k, v, *bounds, sink, *options, return_lse, backend, batch_invariant)
    return (out, lse) if return_lse else out


def _longest(name: str, value) -> int:
    """A longest length; it may be 0, where nobody has a row."""
    number = plain.integer(name, value)
    if number < 0:
        raise InvalidProblem(f"{name} is {number}; it has to be at least 0.")
    return number


_calls: dict[tuple, ops.Call] = {}
"""Calls that were checked, as `flashcore.ops` keeps them."""


def _compute(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sink=None, causal=False, softmax_scale=None,
    window_left=-1, window_right=-1, softcap=None, return_lse=False, backend="auto", batch_invariant=False,
):  # fmt: skip
    """`varlen_attention` of tensors that lie in memory, with options that are plain values."""
    try:
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
            k.device, v.device, ops.look(cu_seqlens_q), ops.look(cu_seqlens_k), max_seqlen_q, max_seqlen_k,
            ops.look(sink), causal, softmax_scale, window_left, window_right, softcap, return_lse, backend,
            batch_invariant,
        )  # fmt: skip
        known = _calls.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no tensors, or none with strides: the checks say which
        key = known = None
    if known is None:
        masked.check_ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, sink)
        # No sequence is longer than all together: servers pass the most that a model takes, and room is made for this.
        rows, keys = min(max_seqlen_q, q.shape[0]), min(max_seqlen_k, k.shape[0])
        base = Problem(
            batch=cu_seqlens_q.shape[0] - 1, num_heads_q=q.shape[1], num_heads_kv=k.shape[1],
            seqlen_q=max(rows, 1), seqlen_k=max(keys, 1), head_dim=q.shape[2],
            dtype=dense.DTYPES[q.dtype], causal=causal, softmax_scale=softmax_scale, batch_invariant=batch_invariant,
        )  # fmt: skip
        problem = ops.masked_problem(base, window_left, window_right, softcap, sink is not None, "ragged")
        chosen = ops.choose(problem, q.device, backend, return_lse)
        nothing = rows == 0 or keys == 0
        if nothing and not (batch_invariant and q.shape[0]):
            chosen = ops.STAND_IN  # no kernel runs over nothing
        known = ops.keep(_calls, key, (problem, chosen, dense.out_strides(q)))
    problem, chosen, strides = known
    whole, longest = (q.shape[0], k.shape[0]), (max_seqlen_q, max_seqlen_k)
    if not k.shape[0] and chosen is not ops.STAND_IN:  # the same kernel as ever, over a key that nobody sees
        k = v = k.new_zeros(1, *k.shape[1:])
    views = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]  # [1, H, tokens, D]
    places = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    out, lse = ops.run_masked(chosen, problem, *views, return_lse, sink, whole=whole, longest=longest, **places)
    out = dense.laid_out(out.squeeze(0).transpose(0, 1), strides)
    return out, lse.squeeze(0).contiguous() if return_lse else None


def _compute_op(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sink=None, causal=False, softmax_scale=None,
    window_left=-1, window_right=-1, softcap=None, return_lse=False, backend="auto", batch_invariant=False,
):  # fmt: skip
    """What computes ``torch.ops.flashcore.varlen_attention``; its options may come from anybody."""
    left, right = masked.window(causal, window_left, window_right)
    bounds = _longest("max_seqlen_q", max_seqlen_q), _longest("max_seqlen_k", max_seqlen_k)
    out, lse = _compute(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *bounds, sink, causal, softmax_scale, left, right,
        masked.softcap(softcap), return_lse, backend, batch_invariant,
    )  # fmt: skip
    return out, lse if return_lse else out.new_empty(0, dtype=torch.float32)


masked.computed_by(masked.varlen_attention, _compute_op)
