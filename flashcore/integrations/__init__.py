"""Our kernels in other people's libraries, by the hooks that those libraries have for it.

`transformers` registers an attention implementation under a name that a model's configuration can ask for; `caching`
makes a cache in pages for `generate`, and `pages` is what that hands to attention. `torch_flash` puts our kernels in
the place of torch's FlashAttention. A library is imported when a model is to be switched over, and FlashCore itself
needs none of them.
"""

__all__ = ["caching", "torch_flash", "transformers"]
