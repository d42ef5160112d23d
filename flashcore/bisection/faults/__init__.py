"""Bugs planted on purpose, to prove that the checker finds them, and compute-sanitizer, which looks from outside.

`catalogue` lists the bugs, `plants` holds how each is put into each backend, and `proving` plants one at a time and
compares what bisection finds with what was planted. Bisection is never told. `diagnosing` does the same for diagnosis,
which sees no stages, and `breaking` for the comparison of bits, which sees results alone.
"""

__all__ = ["breaking", "catalogue", "diagnosing", "proving", "sanitizer"]
