"""One probe a module: inputs that show some steps of attention and hide the others, and names for what they showed.

A probe is a function of an `Inquiry`, which holds what is known so far. It adds a hypothesis or a suspicion and gives
the sentence of it, or None where nothing is wrong; `peeling` asks them one after another. Beside the probes lie names
for what several show (`masks`, `scales`, `orders`), and `weights`, which judges weights that were read.
"""

__all__ = [
    "bends", "columns", "dropping", "extremes", "formulas", "heads", "inquiry", "keeping", "keys", "layouts",
    "logsumexp", "loops", "masks", "memory", "orders", "rounding", "scales", "scores", "weights",
]  # fmt: skip
