"""Interfaces that people already call, with our kernels behind them: torch's attention and FlashAttention's functions.

`sdpa` is ``torch.nn.functional.scaled_dot_product_attention`` and a context that takes a model's calls of it, and
`flash_attn` has the three functions that users of FlashAttention import. Each interface keeps the meaning that its
callers know, to the alignment of a causal mask; what no kernel of ours computes goes to whoever does, with the same
meaning.
"""

__all__ = ["flash_attn", "sdpa"]
