"""The loop over pages of keys, and sums of parts, with one thing done otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from flashcore.numerics import reference

LoopFault = Literal[
    "accum not rescaled", "row_sum not rescaled", "neither rescaled", "neighbour's factor", "inverse factor",
    "accum overwritten", "row_sum overwritten", "pages averaged", "factor of base 2", "accum factor twice",
    "factor twice", "factor without the scale", "factor scaled twice", "accum rescaled late", "rescaled late",
    "factor of a column", "rescaled by warps of 8", "rescaled by warps of 16", "rescaled by warps of 32",
    "accum not rescaled below 2^8", "neither rescaled below 2^8", "accum not rescaled below e^8",
    "neither rescaled below e^8", "parts not weighed", "parts weighed in base 2", "parts weighed by log2",
    "parts weighed by their maximum",
]  # fmt: skip
THRESHOLDS = {"2^8": 8 * math.log(2), "e^8": 8.0}
"""How far a maximum may move until kernels rescale that do so late, and keep the old maximum till then."""
PART_FAULTS: tuple[LoopFault, ...] = (
    "pages averaged", "parts not weighed", "parts weighed in base 2", "parts weighed by log2",
    "parts weighed by their maximum",
)  # fmt: skip
"""Faults where parts of a row's keys are added up; they may be as long as a split of the keys leaves them."""


@dataclass(frozen=True)
class Loop:
    """A fault of the loop over pages of keys."""

    kind: LoopFault
    page_size: int
    page: int | None = None
    """The page at which it happens, counted in the order of the loop; None for all."""
    backwards: bool = False
    """The loop begins with the last page."""


def page_loop(seen, counts, v, loop: Loop, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``accum``, ``row_sum`` and the reference after a loop over pages that does one thing wrong."""
    size, keys = loop.page_size, seen.shape[-1]
    columns = [slice(j, min(j + size, keys)) for j in range(0, keys, size)]
    if loop.backwards:
        columns.reverse()
    if loop.kind in PART_FAULTS:
        return _parts(seen, counts, v, columns, loop.kind)
    row_max = seen.new_full(seen.shape[:-1], -math.inf)
    row_sum, accum = seen.new_zeros(seen.shape[:-1]), seen.new_zeros(*seen.shape[:-1], v.shape[-1])
    for j, page in enumerate(columns):
        before, row_max = row_max, row_max.maximum(seen[..., page].amax(dim=-1))
        base = reference.safe(row_max)
        right = (before - base).exp()
        # base is 0 for a row without keys so far, and what it has is 0 as well
        probs = (seen[..., page] - base[..., None]).exp() * counts[..., page]
        total, part = probs.sum(dim=-1), probs @ v[..., page, :]
        of_sum, of_accum = right, right[..., None]
        if loop.page is None or loop.page == j:
            of_sum, of_accum = _wrong_factors(loop.kind, right, before - base, scale, accum.shape[-1])
        row_sum, accum = of_sum * row_sum + total, of_accum * accum + part
        if loop.kind in ("accum rescaled late", "rescaled late"):
            late = torch.where(before == -math.inf, 1.0, right)
            accum = accum * late[..., None]
            row_sum = row_sum * late if loop.kind == "rescaled late" else row_sum
    return accum, row_sum, reference.safe(row_max)


def _wrong_factors(kind: LoopFault, right, moved, scale: float, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What row_sum ``[N, Sq]`` and the accumulator ``[N, Sq, 1 or W]`` take in place of ``exp(moved)``."""
    one = torch.ones_like(right)
    power = {"factor of base 2": math.log(2), "factor twice": 2.0, "factor scaled twice": scale,
             "factor without the scale": 1 / scale if scale else 1.0}.get(kind)  # fmt: skip
    if power is not None:
        both = (moved * power).exp()
        return both, both[..., None]
    match kind:
        case "accum not rescaled":
            return right, one[..., None]
        case "row_sum not rescaled":
            return one, right[..., None]
        case "neither rescaled" | "rescaled late":
            return one, one[..., None]
        case "neighbour's factor":
            return right, right.roll(1, dims=-1)[..., None]
        case "inverse factor":
            both = (-moved).exp().nan_to_num(posinf=1.0)
            return both, both[..., None]
        case "accum overwritten":
            return right, 0 * one[..., None]
        case "row_sum overwritten":
            return 0 * one, right[..., None]
        case "accum factor twice":
            return right, right[..., None] ** 2
        case "accum rescaled late":
            return right, one[..., None]
        case "factor of a column":  # row_sum has a factor a row; the accumulator's is broadcast along the wrong side
            return right, by_column(right, width)
        case "accum not rescaled below 2^8" | "accum not rescaled below e^8":
            return right, torch.where(moved >= -THRESHOLDS[kind.rpartition(" ")[2]], 1.0, right)[..., None]
        case "neither rescaled below 2^8" | "neither rescaled below e^8":
            both = torch.where(moved >= -THRESHOLDS[kind.rpartition(" ")[2]], 1.0, right)
            return both, both[..., None]
        case "rescaled by warps of 8" | "rescaled by warps of 16" | "rescaled by warps of 32":
            return right, _by_warps(right, moved, int(kind.rpartition(" ")[2]))[..., None]
    raise ValueError(f"no such fault of the page loop: {kind}")


def by_column(right: torch.Tensor, width: int) -> torch.Tensor:
    """Column d of a tile of `width` rows takes the factor of the tile's row d, where the tile is whole."""
    found = right[..., None].expand(*right.shape, width).clone()
    for first in range(0, right.shape[-1] - width + 1, width):
        found[..., first : first + width, :] = right[..., None, first : first + width]
    return found


def _by_warps(right: torch.Tensor, moved: torch.Tensor, rows: int) -> torch.Tensor:
    """1 where not every one of `rows` rows in a row needs its factor."""
    more = -right.shape[-1] % rows
    needs = torch.nn.functional.pad((right < 1).double(), (0, more), value=1.0).unflatten(-1, (-1, rows)).amin(dim=-1)
    whole = needs.repeat_interleave(rows, dim=-1)[..., : right.shape[-1]]
    return torch.where((whole > 0) | (moved == -math.inf), right, 1.0)


def _parts(seen, counts, v, columns: list[slice], kind: LoopFault) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What comes of parts that are each right, and added up by other weights than theirs."""
    found = []
    for part in columns:
        base = reference.safe(seen[..., part].amax(dim=-1))
        probs = (seen[..., part] - base[..., None]).exp() * counts[..., part]
        found.append((probs @ v[..., part, :], probs.sum(dim=-1), base))
    accums, sums, bases = (torch.stack(each) for each in zip(*found, strict=True))
    highest = bases.amax(dim=0)
    if kind == "parts not weighed":
        return accums.sum(dim=0), sums.sum(dim=0), highest
    lse = bases + sums.log()
    weight = {
        "pages averaged": lambda: torch.full_like(sums, 1 / len(found)),
        "parts weighed in base 2": lambda: torch.softmax(lse * math.log(2), dim=0),
        "parts weighed by log2": lambda: torch.softmax(lse / math.log(2), dim=0),
        "parts weighed by their maximum": lambda: torch.softmax(bases.masked_fill(sums == 0, -math.inf), dim=0),
    }[kind]()
    means = accums / sums.masked_fill(sums == 0, 1.0)[..., None]
    total = (sums * (bases - highest).exp()).sum(dim=0)
    return (weight.nan_to_num(0.0)[..., None] * means).sum(dim=0) * total[..., None], total, highest


def carried(accum, row_sum, base, what: str, tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state of each row added to that of the row `tile` rows before it, tile after tile."""
    accum, row_sum, base = accum.clone(), row_sum.clone(), base.clone()
    for first in range(tile, row_sum.shape[-1], tile):
        now = slice(first, min(first + tile, row_sum.shape[-1]))
        then = slice(first - tile, now.stop - tile)
        top = torch.maximum(base[:, now], base[:, then])
        mine, theirs = (base[:, now] - top).exp(), (base[:, then] - top).exp()
        row_sum[:, now] = mine * row_sum[:, now] + theirs * row_sum[:, then]
        accum[:, now] *= mine[..., None]
        if what == "all":
            accum[:, now] += theirs[..., None] * accum[:, then]
        base[:, now] = top
    return accum, row_sum, base
