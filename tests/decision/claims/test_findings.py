"""Intervals and words that every check of a claim uses."""

from __future__ import annotations

import math

from flashcore.decision.claims.findings import apart, divided


def test_intervals():
    assert apart((1, 2), (3, 4)) and apart((3, 4), (1, 2)) and not apart((1, 3), (3, 4))
    assert divided((2, 4), (1, 2)) == (1, 4)
    assert divided((2, math.inf), (1, 2)) == (1, math.inf) and divided((2, 4), (0, 1)) == (2, math.inf)
    assert divided((1, 1), (5, math.inf)) == (0, 0.2)
