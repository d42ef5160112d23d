"""Which trials may be compared, and by how much."""

from __future__ import annotations

import math

import pytest

from flashcore.decision import compare


@pytest.mark.parametrize(
    ("value", "text"),
    [(131.26, "131"), (4.4, "4.40"), (0.2814, "0.281"), (25811.2, "25,811"), (0, "0"), (-59.06, "−59.1"),
     (2.1e-5, "2.10e-05"), (math.nan, "not known"), (None, "not known")],
)  # fmt: skip
def test_sensible_digits(value, text):
    assert compare.number(value) == text
