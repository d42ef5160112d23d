"""Ask cuBLASLt what it offers for attention's products: time each candidate, name its kernel, compare with models.

`measuring` makes the records, `labels` proves that the algorithm named is the one that ran, and `facts` reads the
records again without a GPU. `unfused_model` says what attention from separate products can reach at best.
"""

__all__ = ["facts", "grid", "labels", "measuring", "unfused_model"]
