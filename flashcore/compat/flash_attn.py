"""FlashAttention's three functions, with its signatures and its meaning.

::

    from flashcore.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Tensors are ``[batch, seqlen, num_heads, head_dim]``; causal masks and windows are aligned bottom right, per sequence.
What a kernel of ours computes it computes, windows, softcaps and ragged batches too. All else goes, with the same
meaning, to FlashAttention-3 or -2 where they are installed, then to the FlashAttention-2 in torch, and last to torch's
operations (`flashcore.backends.others`). Nothing that is passed is ignored: what nobody here can do is refused in a
sentence. So is, under FLASHCORE_BATCH_INVARIANT=1, what no kernel of ours computes.
"""

from __future__ import annotations

import functools
import math

import torch

from flashcore import ops, paged_ops, varlen_ops
from flashcore.backends.others import flash, masked
from flashcore.backends.others.flash import HALVES
from flashcore.backends.others.masked import Masking
from flashcore.errors import InvalidProblem, Unsupported
from flashcore.library import traced
from flashcore.numerics import ambient, plain, transforms
from flashcore.paging import PAGE_SIZES, PagedKV, append_tokens
from flashcore.paging.checks import can_read_back, debugging

NAME = "flash_attn"
"""What errors call these functions."""
HEAD_DIMS = (64, 128)
"""Of our kernels that read pages."""
NOT_OURS = ("others", "no kernel of ours takes it")
"""Who computes what we do not, and why (`ops.refuse_others`)."""


def _alone(function):
    """The function with what is set around a call kept out of it (`numerics.ambient`); as it is while it is traced."""
    shielded = ambient.shielded(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return (function if traced() else shielded)(*args, **kwargs)

    return call


@_alone
def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """Attention of a dense batch.

    Parameters
    ----------
    q, k, v
        ``[B, Sq, Hq, D]`` and ``[B, Sk, Hkv, D]`` twice, Hq a multiple of Hkv; last dimension contiguous.
    dropout_p
        Of the probabilities.
    softmax_scale
        None for ``1/sqrt(D)``.
    causal
        Query i sees keys ``j <= i + Sk - Sq``.
    window_size
        ``(left, right)``: it sees keys from ``i + Sk - Sq - left`` to ``i + Sk - Sq + right``; -1 for no limit. With
        `causal` the right side is 0, whatever is passed.
    softcap
        Above 0: scores become ``softcap * tanh(scores / softcap)``.
    alibi_slopes
        float32 ``[Hq]`` or ``[B, Hq]``: ``-slope * |i + Sk - Sq - j|`` is added to the scores.
    deterministic
        The same bits at every call, gradients too. What computes here without a peer is so anyhow.
    return_attn_probs
        Return ``(out, lse, probs)`` with `lse` ``[B, Hq, Sq]`` and `probs` empty, as FlashAttention does without
        dropout.

    Returns
    -------
    out : ``[B, Sq, Hq, D]``, 0 in rows that see no key

    Raises
    ------
    InvalidProblem, Unsupported
        Tensors or options that make no sense, or that nobody here can do.
    """
    _check_dense(q, k, v)
    masking = _masking(causal, window_size, softcap, alibi_slopes, dropout_p, q.shape[1], k.shape[1])
    _check_slopes(alibi_slopes, q)
    scale = plain.softmax_scale(softmax_scale)
    deterministic = plain.flag("deterministic", deterministic)
    with_lse = plain.flag("return_attn_probs", return_attn_probs)
    _refuse_probs(with_lse, masking)
    atomics = deterministic and _adds_atomically(q, k, v)
    if _is_ours(q, masking) and not atomics and 0 not in q.shape and 0 not in k.shape:
        found = ops.attention(
            *(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale, return_lse=with_lse, **_options(masking)
        )
        out, lse = found if with_lse else (found, None)
        out = out.transpose(1, 2)
    else:
        ops.refuse_others("flash_attn_func", *NOT_OURS)
        asked = flash.asked(masking, scale, deterministic)
        peer = flash.peer("flash_attn_func", q, asked, with_lse)
        if peer is not None:
            out, lse = flash.called(peer, (q, k, v), asked, with_lse)
        elif not atomics and flash.torch_can(q, k, masking, with_lse):
            out, lse = flash.in_torch(q, k, v, masking, scale)
        else:
            out, lse = masked.attention(*(t.transpose(1, 2) for t in (q, k, v)), masking, scale)
            out = out.transpose(1, 2).contiguous()
    return (out, lse, q.new_empty(0)) if with_lse else out


@_alone
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """Attention of a ragged batch: sequences of any lengths, one after the other, without padding.

    Parameters
    ----------
    q, k, v
        ``[total_q, Hq, D]`` and ``[total_k, Hkv, D]`` twice; with `block_table` the latter are pools
        ``[num_pages, page_size, Hkv, D]``.
    cu_seqlens_q, cu_seqlens_k
        int32 ``[B + 1]`` on the device of `q`, from 0 to the total: where each sequence begins. They are not read back
        from a GPU, unless FLASHCORE_DEBUG=1 asks for a check.
    max_seqlen_q, max_seqlen_k
        At least the longest sequence's length; more costs nothing.
    block_table
        int32 ``[B, pages]``: the pages of each sequence.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As `flash_attn_func`, with the lengths of each sequence in place of Sq and Sk.

    Returns
    -------
    out : ``[total_q, Hq, D]``
        With `return_attn_probs` also `lse` ``[Hq, total_q]``, and an empty tensor.
    """
    *longest, room = _check_ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    rows, keys = longest
    if not traced():  # no sequence is longer than all together; a graph is for any number of tokens
        rows, keys = min(rows, q.shape[0]), min(keys, room)
    masking = _masking(causal, window_size, softcap, alibi_slopes, dropout_p, rows, keys)
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    _check_slopes(alibi_slopes, q, batch)
    scale = plain.softmax_scale(softmax_scale)
    deterministic = plain.flag("deterministic", deterministic)
    with_lse = plain.flag("return_attn_probs", return_attn_probs)
    _refuse_probs(with_lse, masking)
    if rows == 0 or keys == 0:
        out, lse = torch.zeros_like(q), q.new_full((heads, q.shape[0]), -math.inf, dtype=torch.float32)
        return (out, lse, q.new_empty(0)) if with_lse else out
    atomics = deterministic and _adds_atomically(q, k, v)
    fits = not atomics and block_table is None
    even = fits and [q.shape[0], k.shape[0]] == [batch * size for size in longest] and not _for_other_lengths(q)
    if even and _is_ours(q, masking):
        # No sequence is longer than the longest, so that these sums say that all are as long: a dense batch.
        dense = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (q, k, v))
        found = ops.attention(*dense, softmax_scale=scale, return_lse=with_lse, **_options(masking))
        out, lse = found if with_lse else (found, None)
        out = out.transpose(1, 2).flatten(0, 1)
        return (out, lse.transpose(0, 1).flatten(1, 2), q.new_empty(0)) if with_lse else out
    if fits and _is_ours(q, masking, "ragged"):
        starts = (one.int().contiguous() for one in (cu_seqlens_q, cu_seqlens_k))
        found = varlen_ops.varlen_attention(
            q, k, v, *starts, rows, keys, softmax_scale=scale, return_lse=with_lse, **_options(masking)
        )
        return (*found, q.new_empty(0)) if with_lse else found
    ops.refuse_others("flash_attn_varlen_func", *NOT_OURS)
    asked = flash.asked(masking, scale, deterministic)
    if block_table is not None:
        asked["block_table"] = block_table
    bounds = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": rows, "max_seqlen_k": keys
    }  # fmt: skip
    peer = flash.peer("flash_attn_varlen_func", q, asked, with_lse)
    if peer is not None:
        out, lse = flash.called(peer, (q, k, v), {**bounds, **asked}, with_lse)
    elif not atomics and block_table is None and flash.torch_can(q, k, masking, with_lse):
        out, lse = flash.in_torch(q, k, v, masking, scale, (cu_seqlens_q, cu_seqlens_k, rows, keys))
    else:
        out, lse = masked.ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, rows, keys, masking, scale, block_table)
    return (out, lse, q.new_empty(0)) if with_lse else out


@_alone
def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """Attention of new queries over a cache, into which new keys and values are written first. No gradients.

    Parameters
    ----------
    q
        ``[B, Sq, Hq, D]``.
    k_cache, v_cache
        ``[rows, capacity, Hkv, D]``; with `block_table` pools ``[num_pages, page_size, Hkv, D]``. Written to in place.
    k, v
        ``[B, Snew, Hkv, D]``: written to the cache at positions `cache_seqlens` and on, or None.
    rotary_cos, rotary_sin
        ``[positions, rotary_dim / 2]``: new keys are rotated by their positions; queries by theirs under a causal mask
        or a window, else all by that of the first new key.
    cache_seqlens
        An int, or int32 ``[B]`` on the device of `q`: tokens in the cache before `k`; None for a full cache. It is not
        changed.
    cache_batch_idx
        int32 ``[B]``: the row of the cache that each sequence has; not with `block_table`.
    cache_leftpad
        int32 ``[B]``: the first position of each sequence that is real.
    block_table
        int32 ``[B, pages]``.
    num_splits
        A hint for the kernel's speed; ours choose their own splits, so that it changes no result.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As `flash_attn_func`, with each sequence's length in the cache for Sk.
    return_softmax_lse
        Return ``(out, lse)``, `lse` float32 ``[B, Hq, Sq]``.
    """
    cache = _Cache(q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    given = [t for t in (q, k_cache, v_cache, k, v) if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise InvalidProblem(
            "flash_attn_with_kvcache computes no gradients, and a tensor requires them; call it under torch.no_grad()."
        )
    with_lse, _ = plain.flag("return_softmax_lse", return_softmax_lse), plain.integer("num_splits", num_splits)
    masking = _masking(causal, window_size, softcap, alibi_slopes, 0.0, q.shape[1], cache.capacity)
    _check_slopes(alibi_slopes, q)
    scale, interleaved = plain.softmax_scale(softmax_scale), plain.flag("rotary_interleaved", rotary_interleaved)
    if (k is None) != (v is None):
        raise InvalidProblem("k and v of the new tokens come together; pass both, or neither.")
    if (rotary_cos is None) != (rotary_sin is None):
        raise InvalidProblem("rotary_cos and rotary_sin come together; pass both, or neither.")
    with torch.no_grad():
        if rotary_cos is not None:
            if k is None:
                raise InvalidProblem("rotary_cos was passed without k; FlashAttention rotates new keys only.")
            local = masking.causal or masking.window_left >= 0 or masking.window_right >= 0
            k = _rotated("k", k, rotary_cos, rotary_sin, cache.lengths, interleaved, moving=True)
            q = _rotated("q", q, rotary_cos, rotary_sin, cache.lengths, interleaved, moving=local)
        if k is not None:
            if not traced() and transforms.under_way():
                transforms.refuse("q, the cache or what is written to it", *given)
            cache.append(k, v)
        out, lse = cache.attend(q, masking, scale)
    return (out, lse) if with_lse else out


# ------------------------------------------------------------------------------------------------------------ options


def _masking(causal, window_size, softcap, alibi_slopes, dropout_p, rows: int, keys: int) -> Masking:
    """The options as one description; a window that hides nothing is none, and one that ends here is a causal mask."""
    causal = plain.flag("causal", causal)
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise InvalidProblem(f"window_size is {plain.shown(window_size)}; it has to be (left, right).") from None
    left, right = plain.integer("window_size", left), plain.integer("window_size", right)
    left, right = (-1 if side < 0 or side >= keys + rows else side for side in (left, right))
    if right == 0:
        causal = True
    dropout = plain.number("dropout_p", dropout_p)
    if dropout is None or not 0 <= dropout < 1:
        raise InvalidProblem(f"dropout_p is {plain.shown(dropout_p)}; it has to be at least 0, and below 1.")
    return Masking(causal, left, 0 if causal else right, softcap, alibi_slopes, dropout=dropout)


def _is_plain(masking: Masking) -> bool:
    """Whether it is all keys, or a causal mask, and nothing else."""
    return not (_has_window(masking) or masking.softcap or masking.slopes is not None or masking.dropout)


def _has_window(masking: Masking) -> bool:
    return masking.window_left >= 0 or (masking.window_right >= 0 and not masking.causal)


def _is_ours(q, masking: Masking, lengths: str = "") -> bool:
    """Whether `flashcore.attention` computes it: without a mask anyhow, with one where a kernel of ours takes it."""
    if q.dtype not in ops.DTYPES or masking.slopes is not None or masking.dropout:
        return False
    if not lengths and _is_plain(masking):
        return True
    masks = (*((lengths,) if lengths else ()), *_masks(masking))
    head_dim = plain.constant(q.shape[-1])  # a graph is for one head_dim, though its lengths may be any
    return ops.kernel_takes(q.device.type, q.device.index or 0, q.dtype, head_dim, masks)


def _masks(masking: Masking) -> tuple[str, ...]:
    """What of it a kernel has to take, besides a causal mask, as `Problem.masks` has it."""
    return (*(("window",) if _has_window(masking) else ()), *(("softcap",) if masking.softcap else ()))


def _options(masking: Masking) -> dict:
    """What `flashcore.attention` is told of it: only what is there."""
    options = {"causal": masking.causal}
    if _has_window(masking):
        options |= {"window_left": masking.window_left, "window_right": masking.window_right}
    return {**options, "softcap": masking.softcap} if masking.softcap else options


def _for_other_lengths(q) -> bool:
    """Whether what is made now serves other lengths later: a graph, compiled or captured."""
    return traced() or (q.is_cuda and torch.cuda.is_current_stream_capturing())


def _refuse_probs(wanted: bool, masking: Masking) -> None:
    """Raise `Unsupported` where probabilities are wanted under dropout: FlashAttention returns them for tests alone."""
    if wanted and masking.dropout:
        raise Unsupported(NAME, "it returns no probabilities as dropout left them; leave return_attn_probs out")


def _adds_atomically(q, k, v) -> bool:
    """Whether a backward pass is to come that adds in another order each time: that of torch's FlashAttention-2."""
    return q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _check_slopes(slopes, q, batch: int | None = None) -> None:
    """Raise `InvalidProblem` unless slopes are None, or floats ``[Hq]`` or ``[batch, Hq]``; None for the batch of q."""
    if slopes is not None:
        batch = q.shape[0] if batch is None else batch
        heads = q.shape[-2]
        masked.check_heads("alibi_slopes", slopes, ((heads,), (batch, heads)), q.device)


# ------------------------------------------------------------------------------------------------------------ tensors


ORDERS = {4: "[batch, seqlen, num_heads, head_dim]", 3: "[tokens, num_heads, head_dim]"}
"""Shapes as errors tell them, by the number of dimensions."""
POOL = "[num_pages, page_size, num_heads, head_dim] with a block_table"


def _check_tensors(tensors: dict[str, torch.Tensor], dims: dict[str, int], pools: tuple[str, ...] = ()) -> None:
    """Raise `InvalidProblem` unless all are dense floats, alike in dtype, device and head_dim, which is contiguous.

    Parameters
    ----------
    dims
        How many dimensions each has, by name.
    pools
        Those that are pools of pages, for the sentence on a shape.
    """
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        dense = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_nested
        if not dense or not tensor.is_floating_point():
            raise InvalidProblem(f"{name} is {plain.shown(tensor)}; it has to be a dense tensor of floats.")
        if tensor.dim() != dims[name]:
            order = POOL if name in pools else ORDERS[dims[name]]
            raise InvalidProblem(f"{name} has shape {list(tensor.shape)}; it has to be {order}.")
        if 0 in tensor.shape[-2:]:
            raise InvalidProblem(f"{name} has shape {list(tensor.shape)}; it needs a head and a head_dim.")
        if tensor.dtype != tensors[first].dtype or tensor.device != tensors[first].device:
            raise InvalidProblem(
                f"{name} is {tensor.dtype} on {tensor.device} and {first} is {tensors[first].dtype} on "
                f"{tensors[first].device}; they have to be alike."
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise InvalidProblem(f"The last dimension of {name} is not contiguous; pass {name}.contiguous().")
        if tensor.shape[-1] != tensors[first].shape[-1]:
            raise InvalidProblem(
                f"{name} has head_dim {tensor.shape[-1]} and {first} has {tensors[first].shape[-1]}; they have to be "
                "the same."
            )


def _check_heads(q, k, v, names=("k", "v")) -> None:
    """Raise `InvalidProblem` unless K and V are of one shape whose heads divide those of Q; called `names`."""
    if k.shape != v.shape:
        raise InvalidProblem(
            f"{names[0]} {list(k.shape)} and {names[1]} {list(v.shape)} differ in shape; they have to be the same."
        )
    if q.shape[-2] % k.shape[-2]:
        raise InvalidProblem(f"num_heads_q ({q.shape[-2]}) must be a multiple of num_heads_kv ({k.shape[-2]}).")


def _check_dense(q, k, v) -> None:
    _check_tensors({"q": q, "k": k, "v": v}, {"q": 4, "k": 4, "v": 4})
    _check_heads(q, k, v)
    if q.shape[0] != k.shape[0]:
        raise InvalidProblem(f"q has batch {q.shape[0]}, and k and v have {k.shape[0]}; they have to be the same.")


def _integers(name: str, tensor, shape: tuple[int, ...], device) -> torch.Tensor:
    """An integer tensor of this shape on this device."""
    whole = isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.int32, torch.int64)
    if not whole or tuple(tensor.shape) != shape:
        raise InvalidProblem(f"{name} is {plain.shown(tensor)}; it has to be an int32 tensor {list(shape)}.")
    if tensor.device != device:
        raise InvalidProblem(f"{name} lies on {tensor.device} and q on {device}; move it there.")
    if not traced() and transforms.under_way():
        transforms.refuse(name, tensor)
    return tensor


def _check_ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table) -> tuple[int, int, int]:
    """Both longest lengths, and tokens of K that one sequence can have at most."""
    dims = {"q": 3, "k": 3 if block_table is None else 4, "v": 3 if block_table is None else 4}
    _check_tensors({"q": q, "k": k, "v": v}, dims, () if block_table is None else ("k", "v"))
    _check_heads(q, k, v)
    if not isinstance(cu_seqlens_q, torch.Tensor) or cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 2:
        raise InvalidProblem(f"cu_seqlens_q is {plain.shown(cu_seqlens_q)}; it has to be an int32 tensor [batch + 1].")
    batch = cu_seqlens_q.shape[0] - 1
    rows, keys = plain.integer("max_seqlen_q", max_seqlen_q), plain.integer("max_seqlen_k", max_seqlen_k)
    if rows < 0 or keys < 0:
        raise InvalidProblem(f"max_seqlen_q is {rows} and max_seqlen_k {keys}; they have to be at least 0.")
    total = k.shape[0]
    if block_table is not None:
        table = _table(block_table, batch, q.device)
        total = table.shape[1] * k.shape[1]
    for name, starts, tokens, longest, exact in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0], rows, True),
        ("cu_seqlens_k", cu_seqlens_k, total, keys, block_table is None),
    ):
        _integers(name, starts, (batch + 1,), q.device)
        if _can_look(q):
            _check_starts(name, starts.tolist(), tokens, longest, exact)
    if block_table is not None and _can_look(q):
        _check_table(table, cu_seqlens_k.diff(), k)
    return rows, keys, total


def _can_look(tensor: torch.Tensor) -> bool:
    """Whether numbers on its device are read to be checked: on a CPU, and on a GPU that is asked to."""
    return not traced() and can_read_back(tensor.device) and (not tensor.is_cuda or debugging())


def _table(block_table, batch: int, device) -> torch.Tensor:
    """`block_table` once it is an integer tensor ``[batch, pages]`` on this device; else `InvalidProblem`."""
    columns = block_table.shape[-1] if isinstance(block_table, torch.Tensor) and block_table.dim() else 0
    if not columns:
        raise InvalidProblem(
            f"block_table is {plain.shown(block_table)}; it has to be an int32 tensor [{batch}, pages]."
        )
    return _integers("block_table", block_table, (batch, columns), device)


def _check_table(table: torch.Tensor, lengths: torch.Tensor, pool: torch.Tensor) -> None:
    """Raise `InvalidProblem` where a page that a sequence has tokens in is none of the pool; reads the table."""
    begins = torch.arange(table.shape[1], device=table.device) * pool.shape[1]
    wrong = (begins < lengths[:, None]) & ((table < 0) | (table >= pool.shape[0]))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise InvalidProblem(
            f"block_table[{row}, {column}] is {int(table[row, column])}, and the pool has pages 0 to "
            f"{pool.shape[0] - 1}; a sequence has tokens there."
        )


def _check_starts(name: str, starts: list[int], tokens: int, longest: int, exact: bool) -> None:
    """Raise `InvalidProblem` unless these are where sequences begin, from 0 to the number of tokens."""
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    side = name[-1]
    if starts[0] != 0 or min(lengths) < 0:
        raise InvalidProblem(f"{name} is {plain.shown(starts)}; it has to begin with 0 and never fall.")
    if exact and starts[-1] != tokens:
        raise InvalidProblem(f"{name} ends with {starts[-1]}, and there are {tokens} tokens; they have to be the same.")
    if not exact and max(lengths) > tokens:
        raise InvalidProblem(f"{name} has a sequence of {max(lengths)} tokens, and block_table holds {tokens} of each.")
    if max(lengths) > longest:
        raise InvalidProblem(f"max_seqlen_{side} is {longest}, and a sequence of {name} has {max(lengths)} tokens.")


# -------------------------------------------------------------------------------------------------------------- cache


class _Cache:
    """A cache as FlashAttention's function takes it, dense or in pages, with each sequence's length."""

    def __init__(self, q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table):
        tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
        _check_tensors(tensors, dict.fromkeys(tensors, 4), () if block_table is None else ("k_cache", "v_cache"))
        _check_heads(q, k_cache, v_cache, ("k_cache", "v_cache"))
        if 0 in q.shape or 0 in k_cache.shape:
            raise InvalidProblem(f"q {list(q.shape)} or k_cache {list(k_cache.shape)} is empty.")
        self.k, self.v, self.batch, device = k_cache, v_cache, q.shape[0], q.device
        self.table = self.rows = self.first = None
        if block_table is not None:
            if cache_batch_idx is not None:
                raise InvalidProblem(
                    "cache_batch_idx and block_table both say where a sequence lies; pass one of them."
                )
            self.table = _table(block_table, self.batch, device).int().contiguous()
            self.capacity = self.table.shape[1] * k_cache.shape[1]
        else:
            self.capacity = k_cache.shape[1]
            if cache_batch_idx is not None:
                self.rows = _integers("cache_batch_idx", cache_batch_idx, (self.batch,), device)
            elif k_cache.shape[0] != self.batch:
                raise InvalidProblem(
                    f"q has batch {self.batch} and k_cache {k_cache.shape[0]} rows; pass cache_batch_idx to say which."
                )
        if cache_leftpad is not None:
            self.first = _integers("cache_leftpad", cache_leftpad, (self.batch,), device)
        if isinstance(cache_seqlens, torch.Tensor) and cache_seqlens.dim():
            self.lengths = _integers("cache_seqlens", cache_seqlens, (self.batch,), device).int()
        else:
            length = self.capacity if cache_seqlens is None else plain.integer("cache_seqlens", cache_seqlens)
            self.lengths = torch.full((self.batch,), length, dtype=torch.int32, device=device)
        self.check(0)

    def check(self, added: int) -> None:
        """Raise `InvalidProblem` where a length or a place is not of this cache; on a GPU with FLASHCORE_DEBUG=1 only.

        Parameters
        ----------
        added
            Tokens that each sequence is to have more.
        """
        if not _can_look(self.lengths):
            return
        least, most = int(self.lengths.min()), int(self.lengths.max())
        if least < 0 or most + added > self.capacity:
            raise InvalidProblem(
                f"cache_seqlens go from {least} to {most}, and with {added} new tokens the cache holds {self.capacity}."
            )
        if self.table is not None:
            _check_table(self.table, self.lengths + added, self.k)
        rows = [] if self.rows is None else self.rows.tolist()
        for sequence, row in enumerate(rows):
            if not 0 <= row < self.k.shape[0]:
                raise InvalidProblem(
                    f"cache_batch_idx[{sequence}] is {row}, and k_cache has rows 0 to {self.k.shape[0] - 1}."
                )
        if added and len(set(rows)) < len(rows):
            raise InvalidProblem(
                f"cache_batch_idx is {plain.shown(rows)}; two sequences cannot write new tokens into one row."
            )
        if self.first is not None and int(self.first.min()) < 0:
            raise InvalidProblem(f"cache_leftpad has {int(self.first.min())}; it has to be at least 0.")

    def append(self, k, v) -> None:
        """Write new tokens behind those that are there, and count them; a sequence that they do not fit stays as is."""
        tensors = {"k_cache": self.k, "k": k, "v": v}
        _check_tensors(tensors, dict.fromkeys(tensors, 4))
        wanted = (self.batch, k.shape[1], *self.k.shape[2:])
        if tuple(k.shape) != wanted or k.shape != v.shape or k.shape[1] == 0:
            raise InvalidProblem(
                f"k is {list(k.shape)} and v {list(v.shape)}; they have to be [{self.batch}, tokens, "
                f"{self.k.shape[2]}, {self.k.shape[3]}] both."
            )
        self.check(k.shape[1])
        pages = self.pages()
        if pages is not None:
            # FlashAttention leaves the caller's lengths as they are.
            lengths = self.lengths.clone()
            append_tokens(
                k.transpose(1, 2), v.transpose(1, 2), pages.k_pool, pages.v_pool, pages.page_table, lengths
            )  # fmt: skip
            self.lengths = lengths
            return
        nth = torch.arange(k.shape[1], device=k.device)
        position = self.lengths.long()[:, None] + nth
        fits = (position[:, -1:] < self.capacity) & (position[:, :1] >= 0)
        position = torch.where(fits, position, 0)
        if self.table is None:
            row = (torch.arange(self.batch, device=k.device) if self.rows is None else self.rows.long())[:, None]
        else:
            size = self.k.shape[1]
            row, position = self.table.long().gather(1, position // size), position % size
            fits = fits & ((row >= 0) & (row < self.k.shape[0])).all(1, keepdim=True)
            row = row.clamp(0, self.k.shape[0] - 1)
        for pool, new in ((self.k, k), (self.v, v)):
            pool[row, position] = torch.where(fits[..., None, None], new, pool[row, position])
        self.lengths = self.lengths + fits[:, 0].int() * k.shape[1]

    def pages(self) -> PagedKV | None:
        """The cache as pages that our kernels read, without a copy: a dense one is pages in a row."""
        if self.k.dtype not in HALVES:
            return None
        if self.table is not None:
            if self.k.shape[1] not in PAGE_SIZES:
                return None
            return PagedKV.from_tables(self.k, self.v, self.table, self.lengths, layout="nhd")
        size = next((size for size in reversed(PAGE_SIZES) if self.capacity % size == 0), None)
        if size is None or any(pool.stride(0) != self.capacity * pool.stride(1) for pool in (self.k, self.v)):
            return None
        each = self.capacity // size
        pools = (pool.view(-1, size, *pool.shape[2:]) for pool in (self.k, self.v))
        rows = torch.arange(self.batch, device=self.k.device) if self.rows is None else self.rows
        table = (rows[:, None] * each + torch.arange(each, device=self.k.device)).int()
        return PagedKV.from_tables(*pools, table, self.lengths, layout="nhd")

    def attend(self, q, masking: Masking, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`out` ``[B, Sq, Hq, D]`` and `lse`."""
        pages = self.pages() if self._in_pages(q, masking) else None
        if pages is not None:
            out, lse = paged_ops.paged_attention(
                q.transpose(1, 2), pages, softmax_scale=scale, return_lse=True, **_options(masking)
            )
            return out.transpose(1, 2), lse
        # A peer before ours, which does not split the keys of few queries here.
        peer, asked = (None, {}) if plain.batch_invariant() else self._peer(q, masking, scale)
        if peer is not None:
            return flash.called(peer, (q, self.k, self.v), asked, True)
        placed = self.table is None and self.rows is None and self.first is None
        if placed and _is_ours(q, masking, "lengths"):
            out, lse = ops.attention(
                *(t.transpose(1, 2) for t in (q, self.k, self.v)), softmax_scale=scale, return_lse=True,
                seqlens_k=self.lengths.contiguous(), **_options(masking),
            )  # fmt: skip
            return out.transpose(1, 2), lse
        ops.refuse_others("flash_attn_with_kvcache", *NOT_OURS)
        masking = Masking(**{**vars(masking), "lengths_k": self.lengths, "first_k": self.first})
        if self.table is not None:
            keys, values = masked.of_pages(self.k, self.table), masked.of_pages(self.v, self.table)
        elif self.rows is not None:
            keys, values = self.k[self.rows.long()], self.v[self.rows.long()]
        else:
            keys, values = self.k, self.v
        # What lies past a length may be anything, and 0 times NaN is NaN.
        past = torch.arange(self.capacity, device=q.device) >= self.lengths[:, None]
        values = values.masked_fill(past[..., None, None], 0.0)
        out, lse = masked.attention(*(t.transpose(1, 2) for t in (q, keys, values)), masking, scale)
        return out.transpose(1, 2).contiguous(), lse

    def _in_pages(self, q, masking: Masking) -> bool:
        """Whether attention of ours over pages computes it, where the cache can be read as pages (`pages`)."""
        if masking.slopes is not None or masking.dropout or self.first is not None:
            return False
        masks = _masks(masking)
        if not masks or not q.is_cuda:
            return q.shape[3] in HEAD_DIMS or not q.is_cuda
        head_dim = plain.constant(q.shape[3])
        return q.dtype in HALVES and paged_ops.kernel_takes(
            q.device.type, q.device.index or 0, q.dtype, head_dim, PAGE_SIZES[0], masks
        )

    def _peer(self, q, masking: Masking, scale: float | None):
        """A peer's function and what it has to be told; FlashAttention-2 takes pages of 256 tokens and multiples."""
        if self.table is not None and self.k.shape[1] % 256:
            return None, {}
        places = {"cache_batch_idx": self.rows, "cache_leftpad": self.first, "block_table": self.table}
        asked = {name: place.int() for name, place in places.items() if place is not None}
        asked |= {**flash.asked(masking, scale, False), "cache_seqlens": self.lengths, "return_softmax_lse": True}
        return flash.peer("flash_attn_with_kvcache", q, asked), asked


def _rotated(name: str, tensor, cos, sin, lengths, interleaved: bool, *, moving: bool) -> torch.Tensor:
    """The first ``2 * cos.shape[1]`` elements of each head turned by the angle of its position."""
    floats = all(isinstance(one, torch.Tensor) and one.is_floating_point() and one.dim() == 2 for one in (cos, sin))
    half = cos.shape[-1] if floats else 0
    if not half or cos.shape != sin.shape or 2 * half > tensor.shape[-1]:
        raise InvalidProblem(
            f"rotary_cos is {plain.shown(cos)} and rotary_sin {plain.shown(sin)}; they have to be alike, floats "
            f"[positions, rotary_dim / 2], with a rotary_dim of at most {tensor.shape[-1]}."
        )
    if not cos.device == sin.device == tensor.device:
        raise InvalidProblem(
            f"rotary_cos and rotary_sin lie on {cos.device} and {sin.device}, and {name} on {tensor.device}; move them "
            "there."
        )
    nth = torch.arange(tensor.shape[1], device=tensor.device) * moving
    position = lengths.long()[:, None] + nth
    if not traced() and not tensor.is_cuda and int(position.max()) >= cos.shape[0]:
        raise InvalidProblem(f"{name} has position {int(position.max())}, and rotary_cos has {cos.shape[0]} of them.")
    position = position.clamp(0, cos.shape[0] - 1)
    cos, sin = (angle[position][:, :, None].float() for angle in (cos, sin))
    turned = tensor[..., : 2 * half].float()
    one, other = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = one * cos - other * sin, one * sin + other * cos
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned.to(tensor.dtype), tensor[..., 2 * half :]], -1)
