"""An attention implementation for transformers: ``model.set_attn_implementation(register())``.

It means what transformers' own `sdpa` and `eager` mean. Attention without a mask, and under a causal one, goes to our
kernels where they take it. With any other mask (padding on either side, sliding windows that hide something, packed
sequences) torch's attention computes it, and what `sdpa` cannot do, softcaps and sinks, torch's operations do
(`flashcore.others.masked`). With ``exact_padding=False`` a prompt's padding becomes lengths, and no mask is made: on
the right it is left alone, since under a causal mask no real token sees what comes after it; elsewhere the real tokens
are packed into a ragged batch (`flashcore.compat.flash_attn`). Only the rows of the padding are then other numbers.
"""

from __future__ import annotations

import functools

import torch

from flashcore.compat import flash_attn, sdpa
from flashcore.errors import InvalidProblem, ToolMissing, Unsupported
from flashcore.library import traced
from flashcore.numerics import plain
from flashcore.others import masked
from flashcore.others.masked import Masking

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
        False: padding of a prompt or a training batch becomes lengths, which is faster than a mask. Real tokens get
        the same results; the rows of padding get others than from `sdpa`, so leave them out of the loss, and generate
        with padding on the left, as transformers asks for anyhow.

    Raises
    ------
    InvalidProblem
        A name that transformers would take for something else, or has already.
    ToolMissing
        transformers is not installed, or too old.
    """
    name, backend = plain.word("name", name), plain.word("backend", backend)
    exact_padding = plain.flag("exact_padding", exact_padding)
    if not name or "flash" in name.lower() or "|" in name or "/" in name:
        raise InvalidProblem(
            f"name is '{name}'; transformers takes a name with 'flash', '|' or '/' in it for a package or a kernel to "
            "load, so choose a plain word without these."
        )
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise ToolMissing(
            "transformers, with its AttentionInterface and AttentionMaskInterface,",
            "pip install 'flashcore[transformers]'",
        ) from error
    if name not in _registered and (name == "eager" or name in AttentionInterface._global_mapping):
        raise InvalidProblem(f"transformers has an attention implementation '{name}' already; choose another name.")
    AttentionInterface.register(name, functools.partial(attention_forward, backend=backend))
    AttentionMaskInterface.register(name, sdpa_mask if exact_padding else mask_of_real_rows)
    _registered.add(name)
    return name


def mask_of_real_rows(*arguments, **options):
    """The mask as `sdpa` has it; but None, or bool ``[batch, seqlen]``, for a prompt under a causal mask and padding.

    None where padding stands on the right only, else True where a token is real.
    """
    from transformers.masking_utils import sdpa_mask

    real = None if arguments or traced() else _padding_of_a_prompt(**options)
    if real is None:
        return sdpa_mask(*arguments, **options)
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return None
    real.places = _places(real)  # looked up once, not in every layer: it waits for the device
    return real


def _padding_of_a_prompt(
    q_length=None, kv_length=None, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None,
    allow_is_causal_skip=True, local_size=None, **others,
) -> torch.Tensor | None:  # fmt: skip
    """Which tokens are real, where a causal mask over a prompt hides nothing but these; None for all else."""
    from transformers.masking_utils import causal_mask_function

    whole = isinstance(q_offset, int) and q_offset == 0 == kv_offset and q_length == kv_length and q_length is not None
    if not whole or mask_function is not causal_mask_function or not allow_is_causal_skip or local_size is not None:
        return None
    fits = attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] == kv_length
    return attention_mask.bool() if fits else None


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
        bool ``[B, S]`` of `mask_of_real_rows`.
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
        The weights are asked for, or packed sequences without a mask that holds them apart.
    """
    if others.get("output_attentions"):
        raise Unsupported(NAME, "it returns no attention weights; set attn_implementation='eager' for these")
    if others.get("head_mask") is not None:
        raise Unsupported(NAME, "it takes no head_mask; set attn_implementation='eager' for one")
    if attention_mask is None and others.get("cu_seq_lens_q") is not None:
        raise Unsupported(NAME, "it got packed sequences (cu_seq_lens_q) and no mask; pass position_ids, so that "
                          "transformers makes one, or one sequence a row")  # fmt: skip
    rows, keys = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    # Read at last: in a traced model `rows` may be a symbol, and what is asked of it becomes a condition of the graph.
    causal = bool(causal and attention_mask is None and rows > 1)
    if causal and keys > rows:  # a static cache that is empty so far: its first keys are those of the queries
        key, value, keys = key[:, :, :rows], value[:, :, :rows], rows
        position_bias = None if position_bias is None else position_bias[..., :rows]
    window = -1
    if attention_mask is None and sliding_window is not None and keys > sliding_window:
        window = sliding_window - 1
    if attention_mask is not None and attention_mask.dim() == 2:
        if s_aux is None and position_bias is None and value.shape[3] == query.shape[3]:
            window = -1 if sliding_window is None else sliding_window - 1
            out = _packed(query, key, value, attention_mask, dropout, scaling, window, softcap)
            return out, None
        attention_mask = (
            attention_mask[:, None, None] & torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()
        )
        if sliding_window is not None:
            attention_mask = attention_mask.triu(1 - sliding_window)
    if softcap is None and s_aux is None and window < 0 and position_bias is None:
        out = _by_torch_or_ours(query, key, value, attention_mask, dropout, causal, scaling, backend)
    else:
        masking = Masking(
            causal, window, softcap=softcap or 0.0, sink=s_aux, dropout=dropout,
            **_as_bias(attention_mask, position_bias),
        )  # fmt: skip
        out, _ = masked.attention(query, key, value, masking, scaling)
    return out.transpose(1, 2).contiguous(), None


def _packed(query, key, value, real, dropout, scaling, window: int, softcap: float | None) -> torch.Tensor:
    """``[B, S, H, D]``: attention of the real tokens alone, as a ragged batch, and 0 in the rows of padding."""
    index, starts = getattr(real, "places", None) or _places(real)
    batch, heads, rows, head_dim = query.shape
    packed = (tensor.transpose(1, 2).flatten(0, 1)[index] for tensor in (query, key, value))
    out = flash_attn.flash_attn_varlen_func(
        *packed, starts, starts, rows, rows, dropout, scaling, True, (window, -1), softcap or 0.0
    )
    return out.new_zeros(batch * rows, heads, head_dim).index_put((index,), out).unflatten(0, (batch, rows))


def _by_torch_or_ours(query, key, value, attention_mask, dropout, causal, scaling, backend):
    grouped = query.shape[1] != key.shape[1]
    if attention_mask is not None:
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
