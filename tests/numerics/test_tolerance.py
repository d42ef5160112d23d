"""Comparing element by element: NaN fails, and the first and the worst element are named."""

from __future__ import annotations

import math

import torch

from flashcore.numerics.tolerance import compare


def test_compare_counts_first_and_worst(monkeypatch):
    monkeypatch.setattr("flashcore.numerics.tolerance.ELEMENTS_AT_ONCE", 5)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[0, 0] = -math.inf
    got = expected.clone()
    got[0, 3], got[1, 2], got[2, 1] = 0.1, 0.5, 0.3
    found = compare(got, expected, atol=0.2, rtol=0.0, axes=("row", "column"))
    assert (found.checked, found.num_bad, found.num_nan, found.num_inf) == (12, 2, 0, 0)
    assert found.first_bad == {"row": 1, "column": 2, "got": 0.5, "expected": 0.0}
    assert found.max_abs_error == 0.5 and found.bound == 0.2 and not found.passed
    assert compare(expected, expected, atol=0.0, rtol=0.0).passed
    found = compare(torch.full((2,), math.nan), torch.full((2,), math.nan), atol=9.0, rtol=9.0)
    assert found.num_bad == found.num_nan == 2, "NaN fails even where NaN was expected"
    found = compare(torch.zeros(2), torch.tensor([math.inf, 0.0]), atol=1.0, rtol=1.0)
    assert found.num_bad == 1, "an infinite bound lets nothing through"
