"""Which faults of the loop over pages of keys are tried, in which order, and what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from flashcore.bisection.diagnosis.behaviour import PART_FAULTS, Loop, LoopFault
from flashcore.problem import Problem

LOOP_SIZES = (64, 128, 32, 16, 256, 96, 176, 80, 160)
PAGE_FAULTS: tuple[LoopFault, ...] = (
    "accum not rescaled", "row_sum not rescaled", "neither rescaled", "neighbour's factor", "inverse factor",
    "accum overwritten", "row_sum overwritten", "factor of base 2",
)  # fmt: skip
"""Faults that may happen on one page alone."""
MOST_PAGES = 80
"""Pages of a loop that is simulated."""


def loops_of(problem: Problem) -> Iterator[list[Loop]]:
    """Faults of the page loop that may explain a call: those that fit together, the plainest first."""
    keys = problem.seqlen_k
    sizes = list(dict.fromkeys(s for s in (problem.page_size, *LOOP_SIZES) if keys / MOST_PAGES <= s < keys))
    cut = [-(-keys // parts) for parts in range(2, 9)]
    whole = [kind for kind in get_args(LoopFault) if kind not in PART_FAULTS]
    yield [Loop(kind, size, None, backwards) for size in sizes for backwards in (False, True) for kind in whole]
    yield [Loop(kind, size) for size in dict.fromkeys([*sizes, *cut]) for kind in PART_FAULTS]
    for size in sizes:
        last = -(-keys // size) - 1
        yield [Loop(kind, size, page, backwards) for page in sorted({1, 2, 3, 4, last}) if 0 < page <= last
               for backwards in (False, True) for kind in PAGE_FAULTS]  # fmt: skip


def words_of(loop: Loop) -> tuple[str, tuple[str, ...]]:
    if loop.kind in PART_FAULTS:
        what = {
            "pages averaged": "each part is normalised by itself and the results are averaged",
            "parts not weighed": "sums of parts are added up, each taken against the maximum of its own part",
            "parts weighed in base 2": "parts are weighed by 2 to the power of their lse, where base e is meant",
            "parts weighed by log2": "parts are weighed by exp of an lse of base 2",
            "parts weighed by their maximum": "parts are weighed by their maxima alone, without their sums",
        }[loop.kind]
        return f"{what}, where a part is {loop.page_size} keys", ("rescale", "out")
    where = "on every page" if loop.page is None else f"on page {loop.page}"
    order = ", last page first" if loop.backwards else ""
    pages = f"{where} of {loop.page_size} keys{order}"
    both, accum, row_sum = ("rescale",), ("accum",), ("row_sum",)
    warps = "the accumulator is rescaled only where {} rows in a row all need it"
    words = {
        "accum not rescaled": ("the accumulator is not rescaled when the maximum moves", accum),
        "row_sum not rescaled": ("row_sum is not rescaled when the maximum moves", row_sum),
        "neither rescaled": ("neither the accumulator nor row_sum is rescaled when the maximum moves", both),
        "neighbour's factor": ("the accumulator is rescaled by the factor of the row before", accum),
        "inverse factor": ("the rescale factor is exp(new - old) where exp(old - new) is meant", both),
        "accum overwritten": ("the accumulator is overwritten instead of added to", accum),
        "row_sum overwritten": ("row_sum is overwritten instead of added to", row_sum),
        "factor of base 2": ("the rescale factor is of base 2 where base e is meant", both),
        "accum factor twice": ("the accumulator is multiplied by the rescale factor twice", accum),
        "factor twice": ("the rescale factor is applied twice", both),
        "factor without the scale": ("the rescale factor is made of maxima that lack the scale", both),
        "factor scaled twice": ("the scale is applied twice within the rescale factor", both),
        "accum rescaled late": ("the accumulator is rescaled after the page was added to it, and not before", accum),
        "rescaled late": ("accumulator and row_sum are rescaled after the page was added, and not before", both),
        "factor of a column": ("the accumulator's factors are laid along its columns, where each is a row's", accum),
        "rescaled by warps of 8": (warps.format(8), accum),
        "rescaled by warps of 16": (warps.format(16), accum),
        "rescaled by warps of 32": (warps.format(32), accum),
    }[loop.kind]
    return f"{words[0]}, {pages}", words[1]
