"""A cache of transformers in pages: ``model.generate(..., cache=paged_cache(model, batch=4, max_length=4096))``."""

from __future__ import annotations

from flashcore.errors import InvalidProblem, ToolMissing, Unsupported
from flashcore.numerics import plain
from flashcore.paging import LayeredKVCache

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Of a model's layers: those whose keys and values are all kept, each in its own layer."""


def paged_cache(model, *, batch: int, max_length: int, page_size: int = 128):
    """A cache for ``model.generate(..., cache=cache)`` whose pages are given out by one ledger, for all layers.

    ::

        cache = paged_cache(model, batch=4, max_length=4096)
        model.generate(**prompts, cache=cache, max_new_tokens=100)

    Releases of transformers before 5.24 call the argument ``past_key_values``.

    Under the attention that `flashcore.integrations.transformers.register` makes known, a decode step reads the pages
    where they lie, if a kernel of ours takes the model's dtype and head_dim and no token is padding; it is told of
    windows, softcaps and sinks. Any other step, and any other implementation, gets a dense copy of the pages: right,
    and slower than transformers' own cache.
    Cropping works; beams, which reorder, do not.

    Parameters
    ----------
    model
        A decoder of transformers in float16 or bfloat16, on the device where it stays.
    batch
        Sequences that are generated at once.
    max_length
        Tokens of the longest sequence, its prompt included; room for them is set aside now.
    page_size
        Tokens in a page: 16, 32, 64, 128 or 256.

    Returns
    -------
    transformers.Cache
        With the pages as its attribute `books`, a `flashcore.paging.LayeredKVCache`.

    Raises
    ------
    InvalidProblem
        A size or dtype that no cache has.
    Unsupported
        The model has layers that keep something else than keys and values, or share them.
    ToolMissing
        transformers is not installed, or too old.
    """
    try:
        from flashcore.integrations._paged_cache import PagedCache
    except ImportError as error:
        raise ToolMissing("transformers, with its Cache of layers,", "pip install 'flashcore[transformers]'") from error
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise InvalidProblem(f"model is {plain.shown(model)}; pass a decoder of transformers.")
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or LAYER_TYPES[:1])
    if not kinds <= set(LAYER_TYPES) or getattr(config, "num_kv_shared_layers", 0):
        odd = ", ".join(sorted(kinds - set(LAYER_TYPES))) or "layers that share keys and values"
        raise Unsupported("fcore", f"the paged cache holds keys and values of each layer, and this model has {odd}; "
                          "use transformers' DynamicCache")  # fmt: skip
    batch, max_length, page_size = (
        plain.integer(name, value)
        for name, value in (("batch", batch), ("max_length", max_length), ("page_size", page_size))
    )
    for name, value in (("batch", batch), ("max_length", max_length)):
        if value < 1:
            raise InvalidProblem(f"{name} is {value}; it has to be at least 1.")
    columns = -(-max_length // max(page_size, 1))
    heads = config.num_attention_heads
    return PagedCache(LayeredKVCache(
        config.num_hidden_layers, num_pages=columns * batch, batch=batch, max_pages=columns, page_size=page_size,
        num_heads_kv=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=model.dtype, device=model.device,
    ))  # fmt: skip
