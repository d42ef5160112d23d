"""Measure attention inside of models: random decoders of published shapes, the same tokens first, then times.

`measuring` takes each step of `plan` in every way that `attending` knows, by the host's launches, compiled and as a
CUDA graph; `model` is the decoder. `facts` reads the records again: they are of kind `model`, and ``data["what"]`` says
what was measured.
"""

__all__ = ["facts", "measuring", "plan"]
