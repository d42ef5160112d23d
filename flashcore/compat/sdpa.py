"""torch's attention function with our kernels behind it, and a context that takes a model's calls of it.

``is_causal`` is torch's here: aligned top left, where `flashcore.attention` aligns bottom right. With fewer queries
than keys the two meet once the keys that no query sees are left out, and that is what our kernel then gets.
"""

from __future__ import annotations

import numbers
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode

from flashcore import backends, ops
from flashcore.errors import FlashCoreError
from flashcore.library.dense import DTYPES
from flashcore.numerics import ambient, plain, transforms
from flashcore.problem import LARGEST

_torchs = torch._C._nn.scaled_dot_product_attention
"""torch's function itself, whenever this module is loaded: torch's `context_parallel` has another in its place."""


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    backend: str = "auto",
):  # fmt: skip
    """``torch.nn.functional.scaled_dot_product_attention``, computed by a kernel of ours where one can.

    Signature, meaning and errors are torch's. What our kernels do not take (`why_torch` says it) is passed on to torch
    as it came, so that a model never loses anything by the exchange. Under FLASHCORE_BATCH_INVARIANT=1 torch would lose
    it the promise that its bits are the same in every batch; then such a call is refused.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        As torch has them; ``is_causal`` is aligned top left.
    backend
        ``auto``, or an id that ``flashcore.backends`` knows: that one then computes whatever fits our interface.

    Returns
    -------
    out : ``[..., seqlen_q, head_dim]``, in the dtype of `query`

    Raises
    ------
    UnknownName
        No backend has this id.
    Unsupported
        FLASHCORE_BATCH_INVARIANT=1, and no backend keeps that promise for this call.
    """
    if backend != "auto" and not torch.compiler.is_compiling():
        backends.get(plain.word("backend", backend))  # though torch may compute the call
    options = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa
    }  # fmt: skip
    if (reason := why_torch(query, key, value, **options, backend=backend)) is not None:
        ops.refuse_others("scaled_dot_product_attention", "torch", reason)
        return _torchs(query, key, value, **options)
    return _ours(query, key, value, is_causal, scale, backend)


def _ours(query, key, value, is_causal, scale, backend):
    shape = query.shape
    if is_causal and key.shape[-2] > shape[-2]:
        key, value = key[..., : shape[-2], :], value[..., : shape[-2], :]
    if query.dim() != 4:
        query, key, value = (_of_four(tensor) for tensor in (query, key, value))
    out = ops.attention(query, key, value, causal=is_causal, softmax_scale=scale, backend=backend)
    return out if out.dim() == len(shape) else out.reshape(shape)


def _of_four(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with four dimensions: those in front are heads of one batch, or batches."""
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, tensor.dim() - 4)


def why_torch(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    backend: str = "auto",
) -> str | None:  # fmt: skip
    """None where a kernel of ours computes this call; otherwise why torch does, as a clause."""
    tensors = (query, key, value)
    if not all(isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_nested for t in tensors):
        return "the arguments are not three dense tensors"
    if any(transforms.is_distributed(t) for t in tensors):
        return "the tensors are DTensors, cut over ranks"
    if attn_mask is not None:
        return "there is a mask"
    if type(dropout_p) not in (int, float) or dropout_p != 0:
        return "there is dropout"
    if is_causal is not True and is_causal is not False:
        return "is_causal is no bool"
    if enable_gqa is not True and enable_gqa is not False:
        return "enable_gqa is no bool"
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymFloat))):
        return "scale is no number of Python's"
    if scale is not None and not -LARGEST <= scale <= LARGEST:
        return "scale is not finite in float32"
    if not (query.device == key.device == value.device) or not (query.dtype == key.dtype == value.dtype):
        return "the tensors differ in device or dtype"
    kind = query.device.type
    if kind not in ops.AUTO_ORDER:
        return f"the tensors lie on '{kind}'"
    if torch.is_autocast_enabled(kind) and query.dtype != torch.get_autocast_dtype(kind):
        return "autocast changes the dtype of the call"
    if query.dtype not in DTYPES:
        return f"dtype {str(query.dtype).removeprefix('torch.')} is not ours"
    if query.dim() < 2 or not query.dim() == key.dim() == value.dim():
        return "the tensors differ in dimensions"
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        return "keys and values differ in shape, or in head_dim from the queries"
    heads = -3 if query.dim() > 2 else -2
    if query.shape[:heads] != key.shape[:heads] or (heads == -3 and not _heads_fit(query, key, enable_gqa)):
        return "batch or heads would have to be broadcast"
    if 0 in query.shape or 0 in key.shape:
        return "a size is 0"
    if is_causal and query.shape[-2] > key.shape[-2]:
        return "is_causal is aligned top left, and there are more queries than keys"
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in tensors):
        return "a last dimension is not contiguous"
    if transforms.traces_derivative() if torch.compiler.is_compiling() else transforms.carries_derivatives(*tensors):
        return "torch.func or forward mode takes a derivative"
    if _math_alone():
        return "sdpa_kernel allows torch's math alone"
    if backend != "auto":
        return None
    return _why_not_ours(query.device.type, query.device.index or 0, query.dtype, plain.constant(query.shape[-1]))


@transforms.constant_when_traced
def _math_alone() -> bool:
    """Whether ``torch.nn.attention.sdpa_kernel`` rules out every fused kernel: whoever asks for that wants what only
    torch's math has, such as second derivatives."""
    if _fused_allowed():
        return False
    with ambient.choosing:  # another thread may be computing with one of torch's kernels, and have ruled out the others
        return not _fused_allowed()


def _fused_allowed() -> bool:
    allowed = torch.backends.cuda
    return allowed.flash_sdp_enabled() or allowed.mem_efficient_sdp_enabled() or allowed.cudnn_sdp_enabled()


def _heads_fit(query, key, enable_gqa) -> bool:
    same = query.shape[-3] == key.shape[-3]
    return same or (enable_gqa and query.dim() == 4 and query.shape[1] % key.shape[1] == 0)


@plain.constant_when_traced
def _why_not_ours(kind: str, index: int, dtype: torch.dtype, head_dim: int) -> str | None:
    """Whether `flashcore.attention` would take this to a kernel of ours; to another one, torch finds its own way."""
    if kind != "cuda" and not plain.batch_invariant():
        return "the tensors lie on no GPU"
    try:
        chosen = ops.picked_for(dtype, head_dim, torch.device(kind, index))
    except FlashCoreError as error:
        return str(error)
    return None if chosen.role == "ours" else f"no kernel of ours takes head_dim {head_dim} and {DTYPES[dtype]} here"


class replace_sdpa(TorchFunctionMode):  # noqa: N801  (it is used as a function is)
    """Within this context, calls of ``torch.nn.functional.scaled_dot_product_attention`` come to FlashCore.

    ::

        with flashcore.replace_sdpa() as calls:
            model(tokens)
        print(calls)  # how many went to FlashCore, how many to torch, and why

    It is one of torch's function modes: it sees the calls of this thread, however the function was imported, but not
    those inside `torch.nn.MultiheadAttention` and the layers made of it, which torch shows to a mode as one call only.
    Other functions of torch cost about a microsecond more meanwhile. A model that `torch.compile` compiled is compiled
    once more inside of the context, whole as before. Another thread enters a context of its own, which counts for it.

    Inside of ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` calls go on to torch, which has second derivatives
    there. Other choices of that context are among torch's own kernels, and change nothing here.

    DTensors go on to torch, which attends over ranks: inside torch's `context_parallel` every call does.
    `flashcore.parallel.in_context_parallel` is the context that computes those.

    Parameters
    ----------
    backend
        As in `scaled_dot_product_attention`.

    Raises
    ------
    UnknownName
        No backend has this id.
    """

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.backend = plain.word("backend", backend)
        if self.backend != "auto":
            backends.get(self.backend)  # now, and not once a call comes that is no one else's
        self.ours = 0
        """Calls that FlashCore computed."""
        self.torchs: Counter[str] = Counter()
        """Calls that went on to torch, by the reason."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not _torchs:
            return func(*args, **kwargs)
        reason = why_torch(*args, **kwargs, backend=self.backend)
        if reason is not None:
            ops.refuse_others("replace_sdpa", "torch", reason)
            self.torchs[reason] += 1
            return func(*args, **kwargs)
        self.ours += 1
        return scaled_dot_product_attention(*args, **kwargs, backend=self.backend)

    def __str__(self) -> str:
        total = sum(self.torchs.values())
        lines = [f"FlashCore computed {self.ours} of {self.ours + total} calls, and torch {total}."]
        return "\n".join([*lines, *(f"  torch {count}: {reason}" for reason, count in self.torchs.most_common())])
