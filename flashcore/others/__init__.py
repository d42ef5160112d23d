"""Attention that no kernel of ours computes: by FlashAttention where it is installed, by torch's own, and exactly.

`masked` is attention with windows, caps, sinks, biases and lengths in torch's operations, and takes whatever nobody has
a kernel for. `flash` calls packages of FlashAttention and the FlashAttention-2 in torch, and tells each only what it
knows. `flashcore.ops` asks them where a problem has no kernel, and so do the interfaces in `compat`.
"""

__all__ = ["flash", "masked"]
