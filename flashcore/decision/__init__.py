"""From records to a decision: gates, options and the verdict, and published claims held against measurements.

`verdict.judge` reads a run and says GO, NO-GO or INCONCLUSIVE, and `formats` writes that for where it travels to;
`compare` says which trials may be set against each other, and how they compare. Nothing here imports torch or needs a
GPU, and no notebook's cells are ever read.
"""

__all__ = ["advice", "claims", "compare", "evidence", "fleet", "formats", "gates", "seal", "verdict"]
