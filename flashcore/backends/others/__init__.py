"""Attention that no kernel of ours computes: by FlashAttention where it is installed, by torch's own, and exactly.

`masked` is attention with windows, caps, sinks, biases and lengths in torch's operations, and takes whatever nobody has
a kernel for. `flash` calls packages of FlashAttention and the FlashAttention-2 in torch, and tells each only what it
knows. `standing_in` is both of them as a backend, which `flashcore.ops` takes where a problem's masks have no kernel.
"""

__all__ = ["flash", "masked", "standing_in"]
