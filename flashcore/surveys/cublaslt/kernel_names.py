"""Read from the name of a cuBLAS kernel what it is: whether it uses Tensor Cores, and which tile it computes."""

from __future__ import annotations

import re
from collections.abc import Sequence

HELPERS = ("splitkreduce", "reduce_kernel", "memset", "memcpy", "reset_diagonal", "zero_")
"""Kernels that a product launches beside the one that multiplies."""
WITHOUT = ("ffma", "simt", "gemv", "dot_kernel", "sgemm", "gemmsn", "gemmk1", "dgemm", "gemm_1x1core", "kernel1x1core")
"""In the names of kernels that multiply on the ordinary units. Looked for first: `xmma_gemm_..._ffma` is one."""
WITH = (
    "nvjet", "gmma", "hmma", "wmma", "s16816", "s161616", "s1688", "s884", "h16816", "h1688", "h884", "tensorop",
    "xmma_gemm_f16", "xmma_gemm_bf16",
)  # fmt: skip
"""In the names of kernels that multiply on Tensor Cores: the instruction shape, the instruction, or NVIDIA's families
built on it (`nvjet` is cuBLAS' family for Hopper and later)."""
LONGEST = 96


def main_kernel(names: Sequence[str]) -> str | None:
    """The kernel that multiplies, of all that one call launched; None when nothing was seen."""
    main = [n for n in names if not any(h in n.lower() for h in HELPERS)]
    return (main or list(names) or [None])[0]


def short(name: str) -> str:
    """A kernel's name without return type and parameter list, cut to `LONGEST` characters."""
    name = re.sub(r"^void\s+", "", name)
    return (name.split("(")[0] if "(anonymous" not in name else name)[:LONGEST].strip()


def uses_tensor_cores(name: str | None) -> bool | None:
    """Whether a kernel multiplies on Tensor Cores; None when its name says neither."""
    if not name:
        return None
    text = name.lower()
    if any(part in text for part in WITHOUT):
        return False
    return True if any(part in text for part in WITH) else None


def tile_in(name: str | None) -> tuple[int, int] | None:
    """Rows and columns of the tile a kernel's name gives, such as (64, 48) of ``nvjet_sm90_hsh_64x48_64x16_1x2_...``.

    In the families of cuBLAS the first ``<number>x<number>`` between underscores is the tile of a thread block
    (`tilesize128x64x64` in the older ones).
    """
    found = re.search(r"(?:_|tilesize)(\d+)x(\d+)(?=[_x])", name or "")
    return (int(found[1]), int(found[2])) if found else None


def label_agrees(name: str | None, tile: str) -> bool | None:
    """Whether the kernel that ran computes the tile that the algorithm's attribute names.

    The two may give rows and columns in either order (a row-major product is a transposed column-major one). None when
    the kernel's name or the attribute names no tile.
    """
    ran, said = tile_in(name), re.search(r"(\d+)x(\d+)", tile)
    if ran is None or said is None:
        return None
    return sorted(ran) == sorted((int(said[1]), int(said[2])))


def label_problem(tile: str, ran: str | None, surveyed: str | None = None) -> str | None:
    """What speaks against a label: the kernel that ran computes another tile, or is not the one that was surveyed.

    Parameters
    ----------
    tile
        The tile of the algorithm whose name the run carries.
    ran
        The kernel that the profiler saw.
    surveyed
        The kernel that the survey saw for that algorithm, where there is one.
    """
    if not ran:
        return "no kernel was seen, so nothing proves which one ran"
    if surveyed and surveyed != ran:
        return f"the survey saw {surveyed} for this algorithm, and {ran} ran"
    if label_agrees(ran, tile) is False:
        rows, columns = tile_in(ran)
        return f"the algorithm's tile is {tile}, and the kernel that ran computes {rows}x{columns}"
    return None
