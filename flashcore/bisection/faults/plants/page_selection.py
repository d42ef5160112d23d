"""The bug planted in the kernel that selects pages. It belongs to no backend and shows in the pages that are chosen."""

from __future__ import annotations

KERNEL = "page_selection"
RACY_BASE = (
    (
        "  Chosen before = {0, 0};\n  int room = wanted;\n",
        "  __shared__ Chosen next_smem;\n"
        "  if (threadIdx.x == 0) next_smem = {0, 0};\n"
        "  __syncthreads();\n"
        "  if ((clock64() >> 5 & 1) == 0) __nanosleep(500);  // warps come in any order\n"
        "  __syncwarp();\n"
        "  Chosen before = next_smem;\n"
        "  __syncwarp();\n"
        "  if (threadIdx.x % WARP == 0) next_smem = {before.above + mine.above, before.level + mine.level};\n"
        "  int room = wanted;\n",
    ),
    (
        "    if (other < warp) {\n"
        "      before.above += chosen_smem[other].above;\n"
        "      before.level += chosen_smem[other].level;\n"
        "    }\n",
        "",
    ),
)
"""A racy base offset: each warp takes the place where it begins to write from a counter that others are changing, and
leaves behind what it makes of it."""
