"""Measurements beside the sweep, each of which answers questions of its own.

`cublaslt` asks cuBLASLt what it offers for attention's products. `paging` measures the paged cache, and `models` whole
decoders with our attention in them. `invariance` asks whether the bits of a row depend on anything but the row. No room
here uses another, and each has `measuring`, which makes the records, and `facts`, which needs no GPU.
"""

__all__ = ["cublaslt", "invariance", "models", "paging"]
