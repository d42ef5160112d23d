"""The backward pass of attention, from the `out` and `lse` of whatever computed the forward pass.

With ``P = exp(scores - lse)`` and the sums over a row written ``<>`` (Dao et al., FlashAttention, appendix B.4)::

    dV = P^T dO        dP = dO V^T        dS = P * (dP - <dO * O> + dlse)
    dQ = scale * dS K        dK = scale * dS^T Q

Under a softcap ``c * tanh(s / c)`` dS is multiplied by its slope, ``1 - tanh(s / c)^2``. A sink is a key whose value is
0, so that its gradient is ``-sum over rows of exp(sink - lse) * (<dO * O> - dlse)``; whatever else it changes stands in
`lse` already.

On a GPU torch's own FlashAttention-2 does this for 16-bit tensors, with windows and ragged batches, and with padding as
a ragged batch whose every other sequence is padding. It takes no gradient of `lse` and no softcap; then, for float32
and on a CPU, the products stand here, in float32 and for some heads at a time.
"""

from __future__ import annotations

import math

import torch

from flashcore.errors import InvalidProblem
from flashcore.library._namespace import define, differentiate, implement
from flashcore.numerics import ambient, masking, seen

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
        "torch.nn.functional.scaled_dot_product_attention inside of torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
    )


differentiate(attention_backward, _refuse)


def flow_back(op: torch._ops.OpOverload, backward: torch._ops.OpOverload) -> None:
    """Say that gradients flow back through an op of attention by the op `backward`.

    Parameters
    ----------
    op
        Takes q, k, v, what describes the call, and then `return_lse` and other options.
    backward
        Takes the gradients of `out` and `lse`, either of which may be None; q, k, v, `out` and `lse`; and what
        describes the call, as `op` does. It returns the gradients of q, k, v and, where the call has sinks, of those.
    """
    names = [argument.name for argument in op._schema.arguments]
    tensors = [place for place, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]
    return_lse = names.index("return_lse")
    sink = names.index("sink") if "sink" in names else None

    def keep(ctx, inputs, output):
        ctx.given = [None if place in tensors else value for place, value in enumerate(inputs)]
        ctx.save_for_backward(*(inputs[place] for place in tensors), *output)
        ctx.set_materialize_grads(False)
        if not inputs[return_lse]:
            ctx.mark_non_differentiable(output[1])

    def gradients(ctx, grad_out, grad_lse):
        found, given = [None] * len(names), list(ctx.given)
        if grad_out is None and grad_lse is None:
            return tuple(found)
        *saved, out, lse = ctx.saved_tensors
        for place, tensor in zip(tensors, saved, strict=True):
            given[place] = tensor
        if not given[return_lse]:  # somebody called the op itself; our own calls ask for lse when gradients are wanted
            out, lse = op(*given[:return_lse], True, *given[return_lse + 1 :])
        grads = backward(grad_out, grad_lse, *given[:3], out, lse, *given[3:return_lse])
        found[:3] = grads[:3]
        if sink is not None and given[sink] is not None:
            found[sink] = grads[3]
        return tuple(found)

    differentiate(op, gradients, keep)


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


def by_products(
    grad_out, grad_lse, q, k, v, out, lse, causal: bool, scale: float, *, window: tuple[int, int] = (-1, -1),
    softcap: float | None = None, lengths_q=None, lengths_k=None, at_end: bool = False,
):  # fmt: skip
    """By five products a chunk of K/V heads, in float32; query heads that share one are rows of one product.

    Parameters
    ----------
    grad_out, grad_lse
        Gradients of `out` and `lse`, or None.
    q, k, v, out, lse
        Of the forward pass, ``[B, Hq, Sq, D]`` and so on. What lies in padding has to be finite.
    window
        Keys before and after its own position that a query sees; -1 for no limit.
    lengths_q, lengths_k, at_end
        Real rows of each sequence ``[B]``, and whether these are the last ones.
    """
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k = k.shape[1], k.shape[2]
    group = heads_q // heads_kv
    rows = group * seqlen_q

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
    row = torch.arange(seqlen_q, device=q.device).repeat(group)[:, None]
    column = torch.arange(seqlen_k, device=q.device)
    sides = {"left": window[0], "right": 0 if causal else window[1]}

    def hidden(part):  # bool, [chunk or nothing, G * Sq, Sk]
        of_chunk = (
            None if lengths is None else lengths.repeat_interleave(heads_kv)[part].view(-1, 1, 1)
            for lengths in (lengths_q, lengths_k)
        )
        of_q, of_k = of_chunk
        return seen.hidden(
            row, column, seqlen_q, seqlen_k, **sides, lengths_q=of_q, lengths_k=of_k, at_end=at_end
        )  # fmt: skip

    found = [torch.empty(t.shape, dtype=torch.float32, device=q.device) for t in (q_rows, k_all, v_all)]
    step = max(1, CHUNK_SCORES.get(q.device.type, CHUNK_SCORES["cpu"]) // (rows * seqlen_k))
    same = hidden(slice(0)) if lengths_q is None and lengths_k is None else None  # for all sequences
    for start in range(0, batch * heads_kv, step):
        part = slice(start, start + step)
        queries, keys, values = q_rows[part].float(), k_all[part].float(), v_all[part].float()
        probs = (queries @ keys.mT).mul_(scale)
        slope = None
        if softcap is not None:
            probs.div_(softcap).tanh_()
            slope = 1.0 - probs.square()
            probs.mul_(softcap)
        unseen = same if lengths_q is None and lengths_k is None else hidden(part)
        if unseen is not None:
            probs.masked_fill_(unseen, -math.inf)
        # A row that sees no key has lse -inf and no score but -inf: less 0, its probs are 0.
        probs = probs.sub_(lse[part].masked_fill(lse[part] == -math.inf, 0.0)[..., None]).exp_()
        if grad_out is None:
            scores = -delta[part][..., None] * probs
            found[2][part] = 0
        else:
            from_out = grad_out[part].float()
            torch.matmul(probs.mT, from_out, out=found[2][part])
            scores = (from_out @ values.mT).sub_(delta[part][..., None]).mul_(probs)
        if slope is not None:
            scores.mul_(slope)
        torch.matmul(scores, keys, out=found[0][part])
        torch.matmul(scores.mT, queries, out=found[1][part])
    return (found[0] * scale).view(q.shape), (found[1] * scale).view(k.shape), found[2].view(v.shape)


# --------------------------------------------------------------------------------------------------------- with masks


def _fake_masked(
    grad_out, grad_lse, q, k, v, out, lse, sink, seqlens_q, seqlens_k, causal, softmax_scale, window_left,
    window_right, softcap, padding,
):  # fmt: skip
    grad_sink = q.new_empty(0) if sink is None else torch.empty_like(sink)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad_sink


masked_attention_backward = define(
    "masked_attention_backward",
    "(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? sink, "
    "Tensor? seqlens_q, Tensor? seqlens_k, bool causal, float? softmax_scale, int window_left, int window_right, "
    "float? softcap, str padding) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sink)",
    _fake_masked,
)
"""The op: gradients of q, k, v and the sinks; that of no sinks is empty, of shape ``[0]``."""


def _fake_varlen(
    grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sink, causal,
    softmax_scale, window_left, window_right, softcap,
):  # fmt: skip
    return _fake_masked(
        grad_out, grad_lse, q, k, v, out, lse, sink, None, None, causal, softmax_scale, -1, -1, None, ""
    )


varlen_attention_backward = define(
    "varlen_attention_backward",
    "(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? sink, bool causal, float? softmax_scale, "
    "int window_left, int window_right, float? softcap) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sink)",
    _fake_varlen,
)
"""The same of a ragged batch."""
differentiate(masked_attention_backward, _refuse)
differentiate(varlen_attention_backward, _refuse)


def _sink_gradient(sink, grad_out, grad_lse, out, lse):
    """Of sinks ``[Hq]``, from rows ``[..., Hq, rows, D]``: those that are not real, or see nothing, have lse -inf."""
    if sink is None:
        return out.new_empty(0)
    delta = torch.zeros_like(lse) if grad_out is None else (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    of_row = ((sink.float()[:, None] - lse).exp() * delta).masked_fill_(lse == -math.inf, 0.0)
    return -of_row.sum(-1).view(-1, sink.shape[0]).sum(0).to(sink.dtype)


def _takes_flash_masked(q, grad_out, grad_lse, causal: bool, window: tuple[int, int], softcap) -> bool:
    """Whether FlashAttention-2's backward pass takes a window; one open to the right alone it means otherwise."""
    odd = window[0] >= 0 and window[1] < 0 and not causal
    shaped = q if q.dim() == 4 else q[None]
    return softcap is None and not odd and takes_flash(shaped, grad_out, grad_lse)


def _by_flash_masked(grad_out, q, k, v, out, lse, starts, sizes, causal: bool, window: tuple[int, int], scale: float):
    """By ``aten::_flash_attention_backward``, rows before heads: ``[B, S, H, D]``, or ragged ``[tokens, H, D]``."""
    sign = 1.0 if scale > 0 else -1.0 if scale < 0 else 0.0  # as in `by_flash`, and so is the infinity
    lse = lse.masked_fill(lse == -math.inf, math.inf).contiguous()
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    options = {"scale": abs(scale) or 1.0}
    left, right = window[0], 0 if causal else window[1]
    if left >= 0 or (right >= 0 and not causal):
        options |= {"window_size_left": left, "window_size_right": right}
    grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
        readable(grad_out), readable(q if sign == 1.0 else q * sign), readable(k), readable(v), readable(out), lse,
        *starts, *sizes, 0.0, causal, state, state, **options,
    )  # fmt: skip
    return grad_q if sign == 1.0 else grad_q * sign, grad_k, grad_v


@ambient.shielded
def _masked_backward(
    grad_out, grad_lse, q, k, v, out, lse, sink, seqlens_q, seqlens_k, causal, softmax_scale, window_left,
    window_right, softcap, padding,
):  # fmt: skip
    scale = 1.0 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    window, at_end, given = (window_left, window_right), padding == "left", (q, k, v)
    if seqlens_q is not None:  # what stands in padding may be anything, and 0 times NaN is NaN
        unreal = seen.unreal(seqlens_q, q.shape[2], at_end)[:, None, :, None]
        q, out = q.masked_fill(unreal, 0.0), out.masked_fill(unreal, 0.0)
        grad_out = None if grad_out is None else grad_out.masked_fill(unreal, 0.0)
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(unreal[..., 0], 0.0)
    if seqlens_k is not None:
        unreal = seen.unreal(seqlens_k, k.shape[2], at_end)[:, None, :, None]
        k, v = k.masked_fill(unreal, 0.0), v.masked_fill(unreal, 0.0)
    takes = _takes_flash_masked(q, grad_out, grad_lse, causal, window, softcap)
    sizes = q.shape[2], k.shape[2]
    if takes and seqlens_q is None and seqlens_k is None:
        rows_first = (tensor.transpose(1, 2) for tensor in (grad_out, q, k, v, out))
        found = _by_flash_masked(*rows_first, lse, (None, None), sizes, causal, window, scale)
        found = tuple(grad.transpose(1, 2) for grad in found)
    elif takes and LSE_IS_RAGGED:
        batch = q.shape[0]
        starts = [
            seen.alternating(lengths, batch, size, q.device, at_end)
            for lengths, size in zip((seqlens_q, seqlens_k), sizes, strict=True)
        ]
        end_to_end = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (grad_out, q, k, v, out))
        lse_of_rows = lse.transpose(0, 1).flatten(1)
        found = _by_flash_masked(*end_to_end, lse_of_rows, starts, sizes, causal, window, scale)
        found = [grad.unflatten(0, (batch, -1)).transpose(1, 2) for grad in found]
        for nth, lengths in enumerate((seqlens_q, seqlens_k, seqlens_k)):
            if lengths is not None:
                unreal = seen.unreal(lengths, found[nth].shape[2], at_end)[:, None, :, None]
                found[nth] = found[nth].masked_fill(unreal, 0.0)
    else:
        found = by_products(
            grad_out, grad_lse, q, k, v, out, lse, causal, scale, window=window, softcap=softcap, lengths_q=seqlens_q,
            lengths_k=seqlens_k, at_end=at_end,
        )  # fmt: skip
    grad_sink = _sink_gradient(sink, grad_out, grad_lse, out, lse)
    return *(_like(tensor, grad) for tensor, grad in zip(given, found, strict=True)), grad_sink


implement(masked_attention_backward, _masked_backward)

LSE_IS_RAGGED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
"""Whether torch's FlashAttention-2 takes `lse` of a ragged batch as ``[Hq, total]``; before it was a padded one."""


@ambient.shielded
def _varlen_backward(
    grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sink, causal,
    softmax_scale, window_left, window_right, softcap,
):  # fmt: skip
    scale = 1.0 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    window = window_left, window_right
    # No sequence is longer than all together, as in the forward pass.
    starts, sizes = (cu_seqlens_q, cu_seqlens_k), (min(max_seqlen_q, q.shape[0]), min(max_seqlen_k, k.shape[0]))
    if 0 in sizes:  # nobody sees anything
        found = tuple(map(torch.zeros_like, (q, k, v)))
    elif LSE_IS_RAGGED and _takes_flash_masked(q, grad_out, grad_lse, causal, window, softcap):
        found = _by_flash_masked(grad_out, q, k, v, out, lse, starts, sizes, causal, window, scale)
        # What no sequence owns it leaves as it found it.
        found = tuple(
            grad.masked_fill(_past(ends, grad.shape[0])[:, None, None], 0.0)
            for grad, ends in zip(found, (starts[0], starts[1], starts[1]), strict=True)
        )
    else:
        found = _ragged_by_products(
            grad_out, grad_lse, q, k, v, out, lse, starts, sizes, causal, scale, window=window, softcap=softcap
        )
    grad_sink = _sink_gradient(
        sink, None if grad_out is None else grad_out.transpose(0, 1), grad_lse, out.transpose(0, 1), lse
    )
    return *(_like(tensor, grad) for tensor, grad in zip((q, k, v), found, strict=True)), grad_sink


implement(varlen_attention_backward, _varlen_backward)


def _ragged_by_products(grad_out, grad_lse, q, k, v, out, lse, starts, sizes, causal: bool, scale: float, **options):
    """`by_products` of a ragged batch, as a padded one; on a CPU some sequences of like length at a time."""
    of_q, of_k = starts
    groups = masking.alike(of_q, of_k) if q.device.type == "cpu" else []
    if len(groups) > 1:
        grads = [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in (q, k, v)]
        for group in groups:
            rows, starts_q, longest_q = masking.some_sequences(of_q, group)
            keys, starts_k, longest_k = masking.some_sequences(of_k, group)
            if longest_q and longest_k:
                grads[0][rows], grads[1][keys], grads[2][keys] = _ragged_by_products(
                    None if grad_out is None else grad_out[rows], None if grad_lse is None else grad_lse[:, rows],
                    q[rows], k[keys], v[keys], out[rows], lse[:, rows], (starts_q, starts_k), (longest_q, longest_k),
                    causal, scale, **options,
                )  # fmt: skip
        return grads
    rows, keys = sizes

    def padded(tensor, begins, longest):  # [B, H, longest, ...]
        return None if tensor is None else seen.padded(tensor, begins, longest).transpose(1, 2)

    found = by_products(
        padded(grad_out, of_q, rows), padded(None if grad_lse is None else grad_lse.mT, of_q, rows),
        padded(q, of_q, rows), padded(k, of_k, keys), padded(v, of_k, keys), padded(out, of_q, rows),
        padded(lse.mT, of_q, rows), causal, scale, lengths_q=of_q.diff(), lengths_k=of_k.diff(), **options,
    )  # fmt: skip
    return [
        seen.packed(grad.transpose(1, 2), begins, tensor.shape[0])
        for grad, begins, tensor in zip(found, (of_q, of_k, of_k), (q, k, v), strict=True)
    ]


def _past(starts: torch.Tensor, tokens: int) -> torch.Tensor:
    """True for tokens past the last sequence of a ragged batch."""
    return torch.arange(tokens, device=starts.device) >= starts[-1]
