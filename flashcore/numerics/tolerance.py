"""Compare two tensors element by element: NaN fails, and a failure names its first coordinate and both values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore.numerics import ambient
from flashcore.tables import describe

UNIT_FLOAT32 = 2.0**-24
"""Unit roundoff of float32, in which scores are accumulated."""
TANH_ERROR = 8 * UNIT_FLOAT32
"""Absolute error of a tanh that is made of float32 operations: an exponential, a sum and a division."""
ELEMENTS_AT_ONCE = 1 << 24
"""Elements compared in one piece (128 MB of float64)."""


@dataclass(frozen=True)
class Comparison:
    """How a tensor differs from what was expected, over all its elements."""

    checked: int
    num_bad: int
    """Elements for which ``error <= atol + rtol * |expected|`` does not hold; NaN never satisfies it."""
    num_nan: int
    num_inf: int
    """Infinities where none was expected."""
    max_abs_error: float
    """Error of `worst`; inf for a NaN or for an infinity that was not expected."""
    bound: float
    """``atol + rtol * |expected|`` at `worst`, so that it passes when ``max_abs_error <= bound``."""
    first_bad: dict[str, Any] | None
    """Coordinates by axis name, `got` and `expected` of the first bad element in memory order."""
    worst: dict[str, Any] = field(default_factory=dict)
    """The same of the bad element with the largest error; of the largest error of all, when none is bad."""

    @property
    def passed(self) -> bool:
        return self.num_bad == 0

    def sentence(self) -> str:
        """One line for a person."""
        if self.passed:
            return f"all {self.checked} elements are within bounds; the largest error is {self.max_abs_error:.2e}"
        where = describe(self.first_bad)
        kinds = f"{self.num_nan} NaN, {self.num_inf} Inf"
        return f"{self.num_bad} of {self.checked} elements are wrong ({kinds}); first {where}"


@ambient.judging
def compare(
    got: torch.Tensor,
    expected: torch.Tensor,
    *,
    atol: float,
    rtol: float,
    axes: tuple[str, ...] = ("batch", "head", "row", "column"),
) -> Comparison:
    """Compare every element of two tensors of one shape, on their device and in pieces.

    An element is right when it equals the expected one (equal infinities are), or is finite and within
    ``atol + rtol * |expected|``. A NaN is wrong, whatever was expected.

    Parameters
    ----------
    got, expected
        Same shape, any floating dtype.
    atol, rtol
        Absolute and relative part of the bound.
    axes
        Names of the coordinates, as many as there are dimensions (the first ones are used).

    Raises
    ------
    ValueError
        The shapes differ, or there is no element: nothing was compared then, and nothing is right.
    """
    if got.shape != expected.shape:
        raise ValueError(f"cannot compare shapes {tuple(got.shape)} and {tuple(expected.shape)}")
    if got.numel() == 0:
        raise ValueError(f"there is nothing to compare in tensors of shape {tuple(got.shape)}")
    shape = got.shape
    got, expected = got.reshape(-1), expected.reshape(-1)
    checked, num_bad, num_nan, num_inf = got.numel(), 0, 0, 0
    first: int | None = None
    worst, worst_key = 0, (False, -1.0)
    for start in range(0, checked, ELEMENTS_AT_ONCE):
        piece = slice(start, start + ELEMENTS_AT_ONCE)
        mine, truth = got[piece].double(), expected[piece].double()
        error = (mine - truth).abs()
        same = mine == truth
        error = error.masked_fill(same, 0.0)
        # Written so that NaN fails; an infinite expectation has an infinite bound and is met by equality alone.
        good = same | ((error <= atol + rtol * truth.abs()) & truth.isfinite())
        error = error.nan_to_num(nan=math.inf, posinf=math.inf)
        bad = ~good
        judged = torch.where(bad.any(), error.masked_fill(good, -1.0), error)
        at = judged.argmax().reshape(1)
        figures = [bad.sum(), mine.isnan().sum(), (mine.isinf() & ~same).sum(), at[0], judged.index_select(0, at)[0]]
        # At once: each number that a GPU is asked for is waited for. A double holds each of them.
        *counts, largest = torch.stack([figure.double() for figure in figures]).tolist()
        count, nans, infs, at = (int(number) for number in counts)
        num_nan += nans
        num_inf += infs
        if count and first is None:
            first = start + int(bad.to(torch.uint8).argmax())
        key = (count > 0, largest)
        if key > worst_key:
            worst, worst_key = start + at, key
        num_bad += count

    def element(index: int) -> dict[str, Any]:
        mine, truth = torch.stack([got[index].double(), expected[index].double()]).tolist()
        return {**coordinates(index, shape, axes), "got": mine, "expected": truth}

    at_worst = element(worst)
    error = abs(at_worst["got"] - at_worst["expected"]) if at_worst["got"] != at_worst["expected"] else 0.0
    return Comparison(
        checked=checked,
        num_bad=num_bad,
        num_nan=num_nan,
        num_inf=num_inf,
        max_abs_error=error if math.isfinite(error) else math.inf,
        bound=atol + rtol * abs(at_worst["expected"]) if math.isfinite(at_worst["expected"]) else atol,
        first_bad=None if first is None else element(first),
        worst=at_worst,
    )


def coordinates(index: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> dict[str, int]:
    """The coordinates of a flat index into a row-major tensor of this shape, by axis name."""
    place: list[int] = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        place.append(rest)
    return dict(zip(axes, reversed(place), strict=False))
