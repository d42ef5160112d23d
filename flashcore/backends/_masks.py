"""What kernels are told of masks: a macro, a bit for each kind that is compiled in, and the struct `MaskParams`."""

from __future__ import annotations

import functools
import math
import operator
import struct
from collections.abc import Sequence

from flashcore.gpu.options import MASKS
from flashcore.numerics.masking import MaskTensors
from flashcore.problem import FARTHEST, Problem

MASK_BITS = {"window": 1, "softcap": 2, "sink": 4, "lengths": 8, "ragged": 8}
"""What FLASHCORE_MASKS says of each of `Problem.masks` (kernels/include/masks.cuh)."""
MASK_PARAMS = struct.Struct("7Q 5i 10f 4x")
"""`MaskParams` of kernels/include/masks.cuh."""
OVER_PAGES = ("window", "softcap", "sink")
"""The masks of a kernel over pages, whose cache has the lengths."""
NEAR = 0.5
SMALLEST_SLOPE, LARGEST_SLOPE = 1e-4, 1e3
"""Scales over caps whose powers are floats of full precision."""
TANH = (0.999999451, -0.333262842, 0.131899394, -0.0443927384)
"""``tanh(x) = x * (TANH[0] + TANH[1] x^2 + ...)`` up to |x| = NEAR: fitted at the nodes of Chebyshev, off by 2.7e-7."""
SMALL = 0.2
TANH_SMALL = (0.999973759, -0.32807452)
"""The same up to SMALL, off by 5.2e-6."""
SMALL_UP_TO = 100.0
"""Softcaps for which that error, times the softcap, stays below a rounding of probabilities to 16 bits."""
LARGEST_SOFTCAP = 1000.0
"""Beyond it errors of the tanh, times the softcap, would show in the results. Models have 15 to 50."""
TANH_ERROR = 2.0**-17
"""What the tanh of these kernels is off by at most (`Backend.tanh_error`)."""


def why_not(problem: Problem) -> str | None:
    """None when the kernels take the masks of a problem as they are; otherwise the reason, as a clause."""
    if problem.softcap is not None and problem.softcap > LARGEST_SOFTCAP:
        return (
            f"its tanh is too coarse for a softcap of {problem.softcap:g}; it takes softcaps up to {LARGEST_SOFTCAP:g}"
        )
    return None


def mask_defines(problem: Problem) -> tuple[tuple[str, int], ...]:
    """The macro that compiles in what the problem asks for besides the causal mask."""
    if not problem.masks:
        return ()
    return ((MASKS, functools.reduce(operator.or_, (MASK_BITS[name] for name in problem.masks))),)


def mask_params(
    problem: Problem, masks: MaskTensors | None, scale: float, lengths: Sequence[int] = (0,) * 6,
    listed: Sequence[int] = (0,) * 3,
) -> bytes:  # fmt: skip
    """`MaskParams`, packed.

    Parameters
    ----------
    masks
        The tensors of the problem's masks; the sink is told by its address.
    scale
        That the kernel is launched with.
    lengths
        Addresses of both kinds of lengths of Q and K, of the list of tiles, and of its length; 0 where there are none.
    listed
        Sequences, tiles that the list has room for, and 1 where sequences are padded on the left.
    """
    left, right = (min(limit, FARTHEST) for limit in problem.window)
    sink = masks.sink.data_ptr() if problem.sink else 0
    return MASK_PARAMS.pack(sink, *lengths, *listed, left, right, *cap_params(problem.softcap, scale))


def cap_params(softcap: float | None, scale: float) -> tuple[float, ...]:
    """The cap, the series of the capped exponent, and the square up to which it holds (`MaskParams`)."""
    if softcap is None:
        return (0.0,) * 10
    by_cap = scale / softcap
    if not SMALLEST_SLOPE < abs(by_cap) < LARGEST_SLOPE:
        # No score is near: the kernel then goes by exponentials.
        return softcap, by_cap, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, -1.0

    def series(terms) -> list[float]:
        return [softcap * math.log2(math.e) * by_cap ** (2 * i + 1) * term for i, term in enumerate(terms)]

    small_square = (SMALL / by_cap) ** 2 if softcap <= SMALL_UP_TO else -1.0
    return softcap, by_cap, *series(TANH), (NEAR / by_cap) ** 2, *series(TANH_SMALL), small_square
