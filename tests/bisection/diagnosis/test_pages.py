"""The page loop is right where nothing in it is wrong, and each fault changes what it says."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from flashcore.bisection.diagnosis.pages import PART_FAULTS, THRESHOLDS, Loop, LoopFault, carried, page_loop

KEYS, WIDTH, SIZE = 96, 8, 32
GENERATOR = torch.Generator().manual_seed(5)
SCORES = torch.randn(2, 40, KEYS, generator=GENERATOR, dtype=torch.float64) * 2 + torch.arange(KEYS) * 0.2
V = torch.randn(2, KEYS, WIDTH, generator=GENERATOR, dtype=torch.float64)
COUNTS = torch.ones_like(SCORES)
RIGHT = torch.softmax(SCORES, -1) @ V


def out(loop: Loop, scale: float = 0.5) -> torch.Tensor:
    accum, row_sum, _ = page_loop(SCORES, COUNTS, V, loop, scale)
    return accum / row_sum[..., None]


def test_a_fault_on_a_page_that_never_comes_is_none():
    for backwards in (False, True):
        assert torch.allclose(out(Loop("accum not rescaled", SIZE, page=9, backwards=backwards)), RIGHT)


@pytest.mark.parametrize("kind", get_args(LoopFault))
def test_each_fault_gives_another_result(kind):
    if kind.startswith("rescaled by warps"):
        return  # all rows here need their factor, so none is left out
    assert not torch.allclose(out(Loop(kind, SIZE)), RIGHT, rtol=1e-3, atol=1e-3)


def test_parts_of_one_key_range_are_the_whole():
    for kind in PART_FAULTS:
        assert torch.allclose(out(Loop(kind, KEYS)), RIGHT)


def test_factors_are_left_out_below_a_threshold_alone():
    steps = torch.tensor([0.0, 4.0, 12.0], dtype=torch.float64).repeat_interleave(SIZE).expand(1, 1, KEYS)
    ones = torch.ones(1, KEYS, 1, dtype=torch.float64)
    for kind, limit in THRESHOLDS.items():
        loop = Loop(f"accum not rescaled below {kind}", SIZE)
        accum, row_sum, _ = page_loop(steps, torch.ones_like(steps), ones, loop, 1.0)
        small = 1.0 if limit > 4 else math.exp(-4)
        large = 1.0 if limit >= 8 else math.exp(-8)
        assert float(accum) == pytest.approx(SIZE * ((small + 1) * large + 1))
        assert float(row_sum) == pytest.approx(SIZE * ((math.exp(-4) + 1) * math.exp(-8) + 1))


def test_a_state_that_is_carried_weighs_the_tile_before():
    base = torch.zeros(1, 4)
    accum, row_sum, after = carried(torch.ones(1, 4, 2), torch.ones(1, 4), base, "all", 2)
    assert row_sum.tolist() == [[1, 1, 2, 2]] and accum[0, :, 0].tolist() == [1, 1, 2, 2] and torch.equal(after, base)
