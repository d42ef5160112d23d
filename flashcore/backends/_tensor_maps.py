"""Describe a tensor to Hopper's copy engine, which loads boxes of it into shared memory (TMA)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from flashcore.errors import LaunchError

MAP_BYTES = 128
SWIZZLE_BYTES = 128
"""Boxes are this wide: the widest swizzle, which wgmma reads without bank conflicts."""


def tensor_map(
    address: int, shape: Sequence[int], strides: Sequence[int], *, rows: int, dtype: str, name: str = "a tensor",
    heads: int = 1, promote: bool = True,
) -> bytes:  # fmt: skip
    """A `CUtensorMap` for boxes of `heads` heads, `rows` rows and 128 bytes of columns, swizzled by 128 bytes.

    Parameters
    ----------
    address
        Of the first element, a multiple of 16 bytes.
    shape
        ``[batch, heads, rows, columns]``, in elements of two bytes.
    strides
        Of batch, head and row, in elements: multiples of 8, in any order of size.
    rows, heads
        Of a box, up to 256 each.
    dtype
        ``float16`` or ``bfloat16``.
    promote
        Let a miss of L2 bring 256 bytes instead of what was asked for: good for what is read again, bad for what is
        read once (6 % of decoding on an H200).

    Raises
    ------
    LaunchError
        The driver refused the description.
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == "bfloat16" else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    sizes = [driver.cuuint64_t(size) for size in reversed(shape)]
    # The driver wants a stride of whole 16 bytes even where a size of one makes it meaningless.
    safe = [2 * stride if size > 1 else 2 * shape[-1] for size, stride in zip(shape[:-1], strides, strict=True)]
    steps = [driver.cuuint64_t(step) for step in reversed(safe)]
    box = [driver.cuuint32_t(n) for n in (SWIZZLE_BYTES // 2, rows, heads, 1)]
    promotions = driver.CUtensorMapL2promotion
    status, made = driver.cuTensorMapEncodeTiled(
        kind, len(shape), address, sizes, steps, box, [driver.cuuint32_t(1)] * len(shape),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_256B if promote else promotions.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if status:
        raise LaunchError(
            "cuTensorMapEncodeTiled", status.name, f"{name} of shape {tuple(shape)} and strides {tuple(strides)}"
        )
    return ctypes.string_at(int(made.getPtr()), MAP_BYTES)
