"""FlashAttention by others: the packages that are installed, then the FlashAttention-2 in torch.

Tensors are ``[batch, seqlen, num_heads, head_dim]`` or, in a ragged batch, ``[tokens, num_heads, head_dim]``. A peer is
told only what differs from its defaults, by FlashAttention's names, and must know every word of it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math

import torch

from flashcore.backends.others.masked import Masking
from flashcore.numerics import seen

HALVES = (torch.float16, torch.bfloat16)
PEERS = (("flash_attn_interface", (9, 0), (torch.bfloat16,)), ("flash_attn", (8, 0), HALVES))
"""Packages that have functions of FlashAttention's names, newest first: module, least compute capability, dtypes. A
widespread wheel of the first lacks float16."""
RENAMED = {"block_table": "page_table"}
"""Names that other releases have for the same."""


@functools.cache
def functions(name: str, index: int) -> tuple:
    """The functions of this name in the packages that are installed, their dtypes and parameters."""
    found = []
    capability = torch.cuda.get_device_capability(index)
    for module, least, dtypes in PEERS:
        if capability < least or importlib.util.find_spec(module) is None:
            continue
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, OSError):
            continue  # installed for another torch, say
        found.append((function, dtypes, frozenset(inspect.signature(function).parameters)))
    return tuple(found)


def asked(masking: Masking, scale: float | None, deterministic: bool = False) -> dict:
    """What a peer has to be told, by FlashAttention's names: only what is not its default, so that it must know it."""
    words = {}
    if scale is not None:
        words["softmax_scale"] = scale
    if masking.causal:
        words["causal"] = True
    if masking.window_left >= 0 or (masking.window_right >= 0 and not masking.causal):
        words["window_size"] = (masking.window_left, masking.window_right)
    if masking.softcap:
        words["softcap"] = masking.softcap
    if masking.slopes is not None:
        words["alibi_slopes"] = masking.slopes.float()
    if masking.dropout:
        words["dropout_p"] = masking.dropout
    if deterministic:
        words["deterministic"] = True
    return words


def peer(name: str, q: torch.Tensor, words: dict, with_lse: bool = False):
    """The first function of an installed package that knows all of these words; None where there is none."""
    # FlashAttention takes the maximum of the unscaled products: a scale of 0 or less is not for it.
    scale = words.get("softmax_scale", 1.0)
    if not q.is_cuda or q.shape[-1] > 256 or q.shape[-1] % 8 or scale <= 0:
        return None
    known = [*words, "return_attn_probs"] if with_lse else words
    for function, dtypes, parameters in functions(name, q.device.index):
        if q.dtype in dtypes and all(one in parameters or RENAMED.get(one) in parameters for one in known):
            return function
    return None


def called(function, tensors, words: dict, with_lse: bool):
    """A peer's `out`, and its `lse` where it is wanted."""
    parameters = inspect.signature(function).parameters
    if with_lse and "return_softmax_lse" not in words:
        words = {**words, "return_attn_probs": True}
    words = {one if one in parameters else RENAMED[one]: value for one, value in words.items()}
    found = function(*tensors, **words)
    out, lse = (found[0], found[1]) if isinstance(found, (tuple, list)) else (found, None)
    if with_lse:
        lse = lse.masked_fill(lse == math.inf, -math.inf)  # what FlashAttention says of a row without a key
    return out, lse


def torch_can(q, k, masking: Masking, with_lse: bool) -> bool:
    """Whether the FlashAttention-2 in torch computes it: no softcap, no bias, no gradient of `lse`.

    A window that is open to the right alone is not taken either: there its rows beyond the keys come out otherwise.
    """
    wants = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return (
        q.is_cuda
        and q.dtype in HALVES
        and q.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
        and not masking.softcap
        and masking.slopes is None  # builds of torch differ in whether theirs takes a bias
        and masking.sink is None
        and not (masking.window_left >= 0 and masking.window_right < 0 and not masking.causal)
        and not (wants and with_lse)
        and 0 not in q.shape
        and 0 not in k.shape
        and torch.backends.cuda.is_flash_attention_available()
    )


def in_torch(q, k, v, masking: Masking, scale: float | None, ragged=(None, None, None, None)):
    """By ``aten::_flash_attention_forward``, in FlashAttention's own layout.

    `ragged` holds where sequences of queries and of keys begin, and the longest length of each.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale <= 0:  # it takes the maximum of the unscaled products; the sign, or the 0, goes into q
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    starts_q, starts_k, rows, keys = ragged
    options = {"scale": scale}
    if masking.window_left >= 0 or (masking.window_right >= 0 and not masking.causal):
        options |= {"window_size_left": masking.window_left, "window_size_right": masking.window_right}
    starts_q, starts_k = (None if starts is None else starts.int() for starts in (starts_q, starts_k))
    out, lse = torch.ops.aten._flash_attention_forward(
        q, k, v, starts_q, starts_k, q.shape[1] if rows is None else rows, k.shape[1] if keys is None else keys,
        masking.dropout, masking.causal, False, **options,
    )[:2]  # fmt: skip
    lse = lse.masked_fill(lse == math.inf, -math.inf)  # what FlashAttention says of a row without a key
    if starts_q is not None and lse.dim() == 3:  # of a padded batch, before torch 2.6
        sequence, row = seen.places(starts_q, q.shape[0], rows)
        lse = lse.transpose(1, 2)[sequence, row].T
    return out, lse
