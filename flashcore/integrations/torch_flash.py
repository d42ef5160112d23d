"""Our kernels as the FlashAttention inside of torch's attention: ``activate_flash_attention_impl(register())``.

Torch keeps a registry of implementations that can take the place of the FlashAttention-2 it ships. Wherever its
`scaled_dot_product_attention` chooses that kernel on a GPU, an active implementation computes: in models that nobody
changed, in `torch.nn.MultiheadAttention`, and under `torch.compile`. Its choice among cuDNN, FlashAttention and others
stays as it was; hold it to this one with ``torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)``.
"""

from __future__ import annotations

import math
import warnings

import torch

from flashcore import backends, ops
from flashcore.errors import FlashCoreError, ToolMissing
from flashcore.numerics import ambient, plain

NAME = "FlashCore"
DISPATCH_KEY = "CUDA"
"""The tensors for which torch asks us."""


class _Active:
    """Ours are in torch's dispatcher for as long as this holds them there."""

    def __init__(self, backend: str):
        self._library = torch.library.Library("aten", "IMPL", DISPATCH_KEY)

        def compute(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
            return forward(query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale, backend=backend)

        with ambient.alone, warnings.catch_warnings():  # torch warns of what is done here on purpose
            warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel")
            self._library.impl("_scaled_dot_product_flash_attention", compute, DISPATCH_KEY)

    def remove(self) -> None:
        """Give torch its own kernel back."""
        self._library._destroy()


def register(name: str = NAME, *, backend: str = "auto") -> str:
    """Make our kernels known to torch's registry of FlashAttention implementations, and return the name.

    ::

        from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

        activate_flash_attention_impl(register())
        model(tokens)
        restore_flash_attention_impl()

    Dropout, the debug mask, and a dtype or head_dim that no kernel of ours takes stay with torch's FlashAttention-2.
    So does the backward pass, which starts from our `out` and `lse`.

    Parameters
    ----------
    name
        What `activate_flash_attention_impl` then takes.
    backend
        ``auto``, or an id that ``flashcore.backends`` knows: that one then computes whatever it takes.

    Raises
    ------
    ToolMissing
        This torch has no such registry.
    UnknownName
        No backend has this id.
    """
    name, backend = plain.word("name", name), plain.word("backend", backend)
    if backend != "auto":
        backends.get(backend)
    add = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if add is None:
        raise ToolMissing(
            f"torch {torch.__version__} has no registry of FlashAttention implementations; a torch that has one",
            "pip install --upgrade torch, or call the model inside of flashcore.replace_sdpa()",
        )
    add(name, register_fn=lambda: _Active(backend))
    return name


def forward(
    query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None, backend="auto"
):  # fmt: skip
    """``aten::_scaled_dot_product_flash_attention``, computed by a kernel of ours where one can.

    Parameters
    ----------
    query, key, value
        ``[batch, num_heads, seqlen, head_dim]``, key and value with the heads of their groups.
    is_causal
        Aligned bottom right, as the op has it. Torch's function, which aligns top left, calls it for equal lengths.

    Returns
    -------
    tuple
        As the op has it: `output` with the strides of ``torch.empty_like(query)``, `logsumexp` float32
        ``[batch, num_heads, seqlen_q]`` with +inf in rows that see no key, two empty tensors, both lengths, the
        state of a dropout that there is none of, and an empty debug mask.
    """
    chosen = None if dropout_p or return_debug_mask else _taken_by(query, key, value, is_causal, scale, backend)
    if chosen is None:
        ops.refuse_others("_scaled_dot_product_flash_attention", "torch", "no kernel of ours takes it")
        return _by_torch(query, key, value, dropout_p, is_causal, return_debug_mask, scale)
    with torch.no_grad():  # whoever called records the derivative of the op, not of what is done inside
        out, lse = ops.attention(
            query, key, value, causal=is_causal, softmax_scale=scale, backend=chosen, return_lse=True
        )
    if is_causal and query.shape[2] > key.shape[2]:  # what the backward pass of torch expects there
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return out, lse, None, None, query.shape[2], key.shape[2], state, state.new_empty(()), query.new_empty(0)


def _taken_by(query, key, value, is_causal: bool, scale: float | None, backend: str) -> str | None:
    """Id of the backend that computes this call; None where FlashAttention-2 does."""
    if scale is not None and not scale > 0:  # its backward pass knows no other
        return None
    try:
        problem = ops.problem_of(query, key, value, is_causal, scale)
        chosen = (
            backends.get(backend) if backend != "auto" else ops.picked_for(query.dtype, query.shape[3], query.device)
        )
        taken = chosen.why_not(problem) is None and (backend != "auto" or chosen.role == "ours")
    except FlashCoreError:  # a shape or dtype that is torch's alone
        return None
    return chosen.id if taken else None


def _by_torch(query, key, value, dropout_p, is_causal, return_debug_mask, scale):
    """By the op beneath, which nobody replaced, called as torch itself calls it: heads and tokens change places."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out, *others = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, is_causal, return_debug_mask, scale=scale
    )
    lse, state, unused, mask = others
    return out.transpose(1, 2), lse, None, None, q.shape[1], k.shape[1], state, unused, mask
