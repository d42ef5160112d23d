"""Backend `reference`: float64 inside, rounded results, dense and over pages."""

from __future__ import annotations

import torch

from flashcore import backends
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import square


def test_the_reference_rounds_its_results_and_not_its_trace():
    problem = square(1, 1, 20, 8)
    inputs = make_inputs(problem)
    backend = backends.get("reference")
    out, lse = backend.run(*inputs, problem)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    assert backend.trace(*inputs, problem).out.dtype == torch.float64
