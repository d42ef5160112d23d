"""An attention implementation for transformers: ``model.set_attn_implementation(register())``.

It means what transformers' own `sdpa` and `eager` mean. Attention without a mask, under a causal one and in a sliding
window without padding goes to our kernels where they take it, with softcaps and sinks. With any other mask (padding,
packed sequences) torch's attention computes it, and what `sdpa` cannot do there, softcaps and sinks, torch's operations
do (`backends.others.masked`). With ``exact_padding=False`` padding becomes lengths, and no mask is made: on the right
of a prompt it is left alone, since under a causal mask no real token sees what comes after it; on the left our kernels
take the lengths; and a prompt with holes, or one that they do not take, is packed into a ragged batch
(`flashcore.compat.flash_attn`). Only the rows of the padding are then other numbers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from flashcore import backends, ops
from flashcore.backends.others import masked
from flashcore.backends.others.flash import HALVES
from flashcore.backends.others.masked import Masking
from flashcore.compat import flash_attn, sdpa
from flashcore.errors import InvalidProblem, ToolMissing, Unsupported
from flashcore.integrations.pages import InPages, reader_of
from flashcore.library import traced
from flashcore.numerics import plain, seen
from flashcore.paged_ops import paged_attention

NAME = "fcore"
"""The name under which models find it. transformers takes any name with "flash" in it for a FlashAttention package."""
_registered: set[str] = set()


def register(name: str = NAME, *, backend: str = "auto", exact_padding: bool = True) -> str:
    """Make FlashCore known to transformers under a name, and return it.

    ::

        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=register())

    Parameters
    ----------
    name
        What ``attn_implementation`` then takes.
    backend
        As in `flashcore.scaled_dot_product_attention`.
    exact_padding
        False: padding becomes lengths, which is faster than a mask. Real tokens get the same results; the rows of
        padding get others than from `sdpa`, so leave them out of the loss, and generate with padding on the left, as
        transformers asks for anyhow.

    Raises
    ------
    InvalidProblem
        A name that transformers would take for something else, or has already.
    UnknownName
        No backend has this id.
    ToolMissing
        transformers is not installed, or too old.
    """
    name, backend = plain.word("name", name), plain.word("backend", backend)
    exact_padding = plain.flag("exact_padding", exact_padding)
    if backend != "auto":
        backends.get(backend)
    if not name or "flash" in name.lower() or "|" in name or "/" in name:
        raise InvalidProblem(
            f"name is '{name}'; transformers takes a name with 'flash', '|' or '/' in it for a package or a kernel to "
            "load, so choose a plain word without these."
        )
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ToolMissing(
            "transformers, with its AttentionInterface and AttentionMaskInterface,",
            "pip install 'flashcore[transformers]'",
        ) from error
    if name not in _registered and (name == "eager" or name in AttentionInterface._global_mapping):
        raise InvalidProblem(f"transformers has an attention implementation '{name}' already; choose another name.")
    AttentionInterface.register(name, functools.partial(attention_forward, backend=backend))
    AttentionMaskInterface.register(name, functools.partial(mask_of_rows, exact_padding=exact_padding))
    _registered.add(name)
    return name


@dataclass
class Told:
    """What a mask of real rows means besides: it is the attribute `told` of a bool tensor ``[batch, keys]``."""

    window: int
    """Keys before its own position that a query sees; -1 for all."""
    seqlens_q: torch.Tensor | None = None
    """int32 ``[batch]``: the last rows of q that are real, under padding on the left; None where all rows are."""
    seqlens_k: torch.Tensor | None = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of a prompt with holes in it; see `_places`."""


def mask_of_rows(*arguments, exact_padding: bool = True, **options):
    """The mask as `sdpa` has it; or None, or bool ``[batch, keys]`` with a `Told`, where a causal mask needs none.

    Parameters
    ----------
    exact_padding
        True: only where no token is padding. False: also under padding, True where a token is real; but None for
        padding on the right of a prompt, which a causal mask hides anyhow.
    """
    from transformers.masking_utils import sdpa_mask

    found = None if arguments or traced() else _described(exact_padding, **options)
    if found is None:
        return sdpa_mask(*arguments, **options)
    real, told = found
    if real is not None:
        real.told = told
    return real


def _described(
    exact_padding: bool, batch_size=None, q_length=None, kv_length=None, q_offset=0, kv_offset=0, mask_function=None,
    attention_mask=None, allow_is_causal_skip=True, local_size=None, device="cpu", **others,
) -> tuple[torch.Tensor | None, Told | None] | None:  # fmt: skip
    """The real rows and what is told of them; None for what only a mask can say. It may wait for the device once."""
    numbers = (batch_size, q_length, kv_length, q_offset, kv_offset)
    if not all(type(number) is int for number in numbers) or not allow_is_causal_skip:
        return None  # a static cache, or more than the mask function hides keys
    window = _window_of(mask_function, local_size)
    if window is None or q_offset + q_length != kv_offset + kv_length:  # the last query stands beside the last key
        return None
    prompt = q_length == kv_length
    if attention_mask is None:
        real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    elif attention_mask.dim() == 2 and attention_mask.shape[1] >= kv_offset + kv_length:
        real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        turns = real[:, 1:].int() - real[:, :-1].int()
        # One wait for the device, as torch's own mask has it; once a forward pass, and not in each layer.
        padding, rises, falls = torch.stack([~real.all(), (turns > 0).any(), (turns < 0).any()]).tolist()
        if padding:
            return None if exact_padding else _padded(real, window, q_length, prompt, rises, falls)
    else:
        return None
    if window >= kv_length - 1:  # no key is that far away
        window = -1
    whole = window < 0 and (prompt or q_length == 1)  # what no mask at all means
    return (None, None) if whole else (real, Told(window))


def _padded(real: torch.Tensor, window: int, q_length: int, prompt: bool, rises: bool, falls: bool):
    """As `_described`, where some token is padding; `rises` and `falls` say whether real ones begin and end."""
    if falls and not rises and prompt:  # on the right alone: no real token sees what comes after it
        return (None, None) if window < 0 else (torch.ones_like(real), Told(window))
    if rises and not falls:
        lengths_q, lengths_k = (rows.sum(1, dtype=torch.int32) for rows in (real[:, -q_length:], real))
        return real, Told(window, lengths_q, lengths_k)
    # With holes a window counts them too, and packed sequences have none.
    return (real, Told(window, places=_places(real))) if prompt and window < 0 and rises and falls else None


def _window_of(mask_function, local_size) -> int | None:
    """Keys before its own position that a query sees under a mask of transformers; -1 for all, None for another mask.

    A mask of a sliding window is a closure over two others, the window and the causal mask.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return -1 if local_size is None else None
    both = _enclosed(mask_function, "and_masks.<locals>.and_mask").get("mask_functions", ())
    if not isinstance(both, tuple) or len(both) != 2 or both[1] is not causal_mask_function:
        return None
    size = _enclosed(both[0], "sliding_window_overlay.<locals>.inner_mask").get("sliding_window")
    return size - 1 if type(size) is int and size == local_size and size > 0 else None


def _enclosed(function, name: str) -> dict:
    """The variables that a function of this qualified name keeps; none of a function of another name."""
    code = getattr(function, "__code__", None)
    if code is None or getattr(function, "__qualname__", "") != name:
        return {}
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))


def _places(real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the real tokens stand in a flat batch, and where each sequence of them begins, once they are packed."""
    ends = real.sum(dim=1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return real.flatten().nonzero().flatten(), torch.nn.functional.pad(ends, (1, 0))


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    *,
    backend: str = "auto",
    **others,
) -> tuple[torch.Tensor, None]:
    """Attention as a layer of transformers calls it.

    Parameters
    ----------
    query, key, value
        ``[batch, num_heads, seqlen, head_dim]``; key and value with the heads of the model's groups.
    attention_mask
        None, bool (True where a key is seen), or floats to add to the scores; broadcasts to ``[B, Hq, Sq, Sk]``. Or
        bool ``[B, Sk]`` of `mask_of_rows`: which keys are real, under a causal mask aligned bottom right.
    dropout, scaling
        Of the probabilities; of the scores, None for ``1/sqrt(head_dim)``.
    is_causal
        Without a mask, and for more than one query: aligned top left, as transformers means it. None for what the
        module says.
    position_bias
        Added to the scores.
    softcap, s_aux
        Of Gemma 2: scores become ``softcap * tanh(scores / softcap)``. Of gpt-oss: one sink a head.
    sliding_window
        Keys that a query sees, its own counted; the mask holds it already, where there is one.

    Returns
    -------
    out, None
        ``[batch, seqlen, num_heads, head_dim]``, contiguous; no weights.

    Raises
    ------
    Unsupported
        The weights are asked for, or packed sequences without a mask that holds them apart; or bits that are the same
        in every batch (FLASHCORE_BATCH_INVARIANT=1), of a call that torch would compute.
    """
    if others.get("output_attentions"):
        raise Unsupported(NAME, "it returns no attention weights; set attn_implementation='eager' for these")
    if others.get("head_mask") is not None:
        raise Unsupported(NAME, "it takes no head_mask; set attn_implementation='eager' for one")
    if attention_mask is None and others.get("cu_seq_lens_q") is not None:
        raise Unsupported(NAME, "it got packed sequences (cu_seq_lens_q) and no mask; pass position_ids, so that "
                          "transformers makes one, or one sequence a row")  # fmt: skip
    query, key, value = _as_autocast_has_it(query, key, value)
    if isinstance(key, InPages):
        window = _window_over_pages(query, key, attention_mask, sliding_window)
        if window is not None and position_bias is None and not dropout:
            masks = {"window_left": window, "softcap": softcap or None, "sink": s_aux}
            reader = reader_of(query, key.pages, backend, **masks)
            if reader is not None:
                out = paged_attention(query, key.pages, softmax_scale=scaling, backend=reader, **masks)
                return out.transpose(1, 2).contiguous(), None
        key, value = key.dense(), value.dense()
    rows, keys = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    # Read at last: in a traced model `rows` may be a symbol, and what is asked of it becomes a condition of the graph.
    causal = bool(causal and attention_mask is None and rows > 1)
    if causal and keys > rows:  # a static cache that is empty so far: its first keys are those of the queries
        key, value, keys = key[:, :, :rows], value[:, :, :rows], rows
        position_bias = None if position_bias is None else position_bias[..., :rows]
    window = -1
    if sliding_window is not None and (attention_mask is None or attention_mask.dim() == 2) and keys > sliding_window:
        window = sliding_window - 1
    masks = {"softcap": softcap, "sink": s_aux}
    if attention_mask is not None and attention_mask.dim() == 2:
        described = getattr(attention_mask, "told", None)
        told = described or Told(window)  # a mask that somebody made anew, as a move to another device does
        window = told.window
        alone = described is not None and told.places is None
        if alone and _is_ours(
            query, key, value, window, dropout, position_bias, backend, **masks, lengths=told.seqlens_k
        ):
            lengths = {"seqlens_q": told.seqlens_q, "seqlens_k": told.seqlens_k, "padding": "left"}
            out = _by_ours(query, key, value, True, window, scaling, backend, **masks, **lengths)
            return out.transpose(1, 2).contiguous(), None
        packs = s_aux is None and position_bias is None and value.shape[3] == query.shape[3]
        padded = not alone or told.seqlens_k is not None
        if packs and not padded and not softcap and query.is_cuda and query.dtype in HALVES:
            rows_first = (tensor.transpose(1, 2) for tensor in (query, key, value))  # a window: FlashAttention takes it
            return flash_attn.flash_attn_func(*rows_first, dropout, scaling, True, (window, 0)).contiguous(), None
        if packs and padded and rows == keys:
            return _packed(query, key, value, attention_mask, told, dropout, scaling, softcap), None
        attention_mask = _as_mask(attention_mask, rows, window)
        window = -1
    elif attention_mask is None and _is_ours(query, key, value, window, dropout, position_bias, backend, **masks):
        out = _by_ours(query, key, value, causal, window, scaling, backend, **masks)
        return out.transpose(1, 2).contiguous(), None
    if softcap is None and s_aux is None and window < 0 and position_bias is None:
        out = _by_torch_or_ours(query, key, value, attention_mask, dropout, causal, scaling, backend)
    else:
        masking = Masking(
            causal, window, softcap=softcap or 0.0, sink=s_aux, dropout=dropout,
            **_as_bias(attention_mask, position_bias),
        )  # fmt: skip
        ops.refuse_others(NAME, "torch", "no kernel of ours takes its masks")
        out, _ = masked.attention(query, key, value, masking, scaling)
    return out.transpose(1, 2).contiguous(), None


def _as_autocast_has_it(query, key, value):
    """The three in the dtype in which torch's attention would take them: under autocast a model's rotary embedding
    leaves float32 beside values in 16 bits. Pages stay as they were stored, and queries become like them."""
    kind = query.device.type
    if kind not in ops.AUTO_ORDER or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = key.dtype if isinstance(key, InPages) else torch.get_autocast_dtype(kind)
    return tuple(
        tensor if isinstance(tensor, InPages) or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in (query, key, value)
    )


def _window_over_pages(query, key, attention_mask, sliding_window) -> int | None:
    """Keys before its own position that a query sees of those in pages, -1 for all; None where a mask hides others."""
    if attention_mask is None:
        if query.shape[2] > 1:  # without a mask several queries are aligned top left
            return None
        return -1 if sliding_window is None or key.shape[2] <= sliding_window else sliding_window - 1
    told = getattr(attention_mask, "told", None)
    return told.window if told is not None and told.seqlens_k is None and told.places is None else None


def _is_ours(query, key, value, window: int, dropout, position_bias, backend: str, *, softcap, sink, lengths=None):
    """Whether a kernel of ours takes these masks here, or the backend that was named; never for a call without one."""
    masks = []
    for name, given in (("window", window >= 0), ("softcap", softcap), ("sink", sink is not None),
                        ("lengths", lengths is not None)):  # fmt: skip
        if given:
            masks.append(name)
    if not masks or dropout or position_bias is not None:
        return False
    if backend == "auto" and not query.is_cuda and not plain.batch_invariant():
        return False
    alike = key.shape == value.shape and key.shape[3] == query.shape[3] and query.dtype == key.dtype == value.dtype
    if not alike or 0 in query.shape or 0 in key.shape or any(t.stride(3) != 1 for t in (query, key, value)):
        return False
    head_dim = plain.constant(query.shape[3])
    return ops.kernel_takes(
        query.device.type, query.device.index or 0, query.dtype, head_dim, tuple(masks), backend
    )  # fmt: skip


def _by_ours(query, key, value, causal: bool, window: int, scaling, backend: str, *, softcap, sink, **lengths):
    """`flashcore.attention` with these masks, ``[B, Hq, Sq, D]``."""
    if lengths.get("seqlens_k") is None:
        lengths = {}
    return ops.attention(
        query, key, value, causal=causal, softmax_scale=scaling, backend=backend, window_left=window,
        softcap=softcap or None, sink=sink, **lengths,
    )  # fmt: skip


def _as_mask(real: torch.Tensor, rows: int, window: int) -> torch.Tensor:
    """bool ``[B, 1, rows, keys]``: a causal mask aligned bottom right, in a window, over keys that are real."""
    keys = real.shape[1]
    row, column = torch.arange(rows, device=real.device)[:, None], torch.arange(keys, device=real.device)
    return real[:, None, None] & ~seen.hidden(row, column, rows, keys, left=window, right=0)


def _packed(query, key, value, real, told: Told, dropout, scaling, softcap: float | None) -> torch.Tensor:
    """``[B, S, H, D]``: attention of the real tokens alone, as a ragged batch, and 0 in the rows of padding."""
    if told.places is None:
        told.places = _places(real)  # looked up once, not in every layer: it waits for the device
    index, starts = told.places
    batch, heads, rows, head_dim = query.shape
    packed = (tensor.transpose(1, 2).flatten(0, 1)[index] for tensor in (query, key, value))
    out = flash_attn.flash_attn_varlen_func(
        *packed, starts, starts, rows, rows, dropout, scaling, True, (told.window, -1), softcap or 0.0
    )
    return out.new_zeros(batch * rows, heads, head_dim).index_put((index,), out).unflatten(0, (batch, rows))


def _by_torch_or_ours(query, key, value, attention_mask, dropout, causal, scaling, backend):
    grouped = query.shape[1] != key.shape[1]
    if attention_mask is not None:
        ops.refuse_others(NAME, "torch", "it has a mask; register(exact_padding=False) makes lengths of padding")
        if grouped:  # with a mask and groups at once, torch on a GPU has its slowest path only
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
    return sdpa.scaled_dot_product_attention(
        query, key, value, None, dropout, causal, scaling, grouped, backend=backend
    )  # fmt: skip


def _as_bias(attention_mask: torch.Tensor | None, position_bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A mask of either kind, and a bias beside it, as `Masking` has them."""
    if attention_mask is None:
        return {} if position_bias is None else {"bias": position_bias}
    if attention_mask.dtype == torch.bool:
        return {"seen": attention_mask} if position_bias is None else {"seen": attention_mask, "bias": position_bias}
    return {"bias": attention_mask if position_bias is None else attention_mask + position_bias}
