"""The promises that users of attention count on, each with its cases and the function that asks.

`registry` lists them. `asking` holds what one case is and how an answer is judged. Each of `values`, `memory`, `bits`
and `streams` asks for promises of one kind.
"""

__all__ = ["asking", "bits", "memory", "registry", "streams", "values"]
