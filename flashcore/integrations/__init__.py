"""Our kernels in other people's libraries, by the hooks that those libraries have for it.

`transformers` registers an attention implementation under a name that a model's configuration can ask for. A library is
imported when a model is to be switched over, and FlashCore itself needs none of them.
"""

__all__ = ["transformers"]
