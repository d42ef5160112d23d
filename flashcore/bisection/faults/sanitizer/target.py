"""The small program that compute-sanitizer watches: one backend, a few launches with every kind of tail.

Run as ``python -m flashcore.bisection.faults.sanitizer.target BACKEND [FAULT]``.
"""

from __future__ import annotations

import sys

from flashcore.problem import Problem

PROBLEMS = (
    Problem(batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=70, seqlen_k=139, head_dim=64, causal=True),
    Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=130, seqlen_k=65, head_dim=128, dtype="bfloat16"),
)
"""Grouped heads, tails on both sides, several pages, a causal mask, both head_dims and dtypes."""
MASKED = (
    PROBLEMS[0].with_(batch=6, window_left=40, softcap=30.0, sink=True, lengths="ragged"),
    PROBLEMS[1].with_(batch=6, window_left=20, window_right=9, lengths="left"),
)
"""All masks, and sequences that end before their tensors do; for backends that take them."""


def main(arguments: list[str]) -> None:
    """Launch the production build and the traced build on each problem."""
    import torch

    from flashcore import backends
    from flashcore.bisection.faults import catalogue
    from flashcore.numerics.inputs import make_inputs, make_masks

    backend_id, *fault = arguments
    chosen = catalogue.get(fault[0]).plant(backend_id) if fault else backends.get(backend_id)
    chosen.require(chosen.suits(PROBLEMS[0]))
    for problem in map(chosen.suits, (*PROBLEMS, *MASKED)):
        if chosen.why_not(problem) is None:
            q, k, v = make_inputs(problem, device="cuda")
            masks = backends.with_masks(make_masks(problem, device="cuda"))
            chosen.run(q, k, v, problem, **masks)
            if chosen.traceable:
                chosen.trace(q, k, v, problem, **masks)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
