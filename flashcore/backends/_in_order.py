"""Arithmetic whose results do not depend on where a number stands: each step is one rounded operation an element.

A matrix library and torch's sums and exponentials may take an element another way by the shape of the call, by its
place and by the threads. Here nothing is added but two tensors at a time, in an order that is written down, and
functions are series of products and sums. So the same numbers give the same bits, whatever stands beside them.
"""

from __future__ import annotations

import math

import torch

TILE = 64
"""Columns that `total` adds up at most: the keys of a tile."""
LOG2_E = 1.0 / math.log(2.0)
LN2_HIGH = 0.693359375
"""The first bits of ln 2: its product with a whole number up to 2^14 is exact in float32."""
LN2_LOW = math.log(2.0) - LN2_HIGH
LEAST = -104.0
"""Below it ``exp`` is 0 in float32."""
ODD = (1.0, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13)
"""``ln((1 + z) / (1 - z)) = 2z (ODD[0] + ODD[1] z^2 + ...)``, to 1e-11 of it for abs(z) up to 0.172."""


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of float32 ``[..., rows, inner]`` and ``[..., inner, columns]``, its terms added first to last."""
    b = b.contiguous()
    found = a[..., :1] * b[..., :1, :]
    term = torch.empty_like(found)
    for i in range(1, a.shape[-1]):
        found += torch.mul(a[..., i : i + 1], b[..., i : i + 1, :], out=term)
    return found


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, of up to TILE numbers: halves are added until one number is left."""
    x = torch.nn.functional.pad(x, (0, TILE - x.shape[-1]))
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def exp(x: torch.Tensor) -> torch.Tensor:
    """``e^x`` of float32 up to 80, to 2 units in the last place: a power of 2 times a series."""
    x = x.clamp(min=LEAST)
    power = (x * LOG2_E).round_()
    rest = x - power * LN2_HIGH - power * LN2_LOW  # at most ln(2) / 2 on either side of 0
    series = torch.full_like(rest, 1 / math.factorial(7))
    for n in range(6, -1, -1):
        series = series.mul_(rest).add_(1 / math.factorial(n))
    power = power.int()
    first = power >> 1  # in two steps, since what comes out may be too small for a factor of full precision
    return series.mul_(_power_of_2(first)).mul_(_power_of_2(power - first))


def _power_of_2(n: torch.Tensor) -> torch.Tensor:
    """``2^n`` as float32, of int32 from -126 to 127: by its bits."""
    return ((n + 127) << 23).view(torch.float32)


def log(x: torch.Tensor) -> torch.Tensor:
    """``ln x`` of float32 that is finite, rounded once: -inf of 0, and NaN of NaN."""
    fraction, power = torch.frexp(x.double())
    small = fraction < math.sqrt(0.5)
    fraction, power = torch.where(small, fraction * 2, fraction), power - small.int()
    z = (fraction - 1) / (fraction + 1)
    square, series = z * z, torch.zeros_like(z)
    for factor in reversed(ODD):
        series = series * square + factor
    found = (power * math.log(2.0) + 2 * z * series).float()
    return found.masked_fill(x == 0, -math.inf)


def tanh(x: torch.Tensor) -> torch.Tensor:
    """``tanh x`` of float32, off by at most 2^-22."""
    small = exp(x.abs() * -2)
    return torch.copysign((1 - small) / (1 + small), x)
