"""Bugs planted in what keeps a row's bits the same in every batch.

Each result is right by itself, so that bisection and checks see nothing: only bits that are compared tell
(`flashcore.surveys.invariance`). So these are no faults of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flashcore.bisection.faults.planting import Edit, Override, Source

SPLIT_ROWS = 64
"""Query rows of a tile whose keys are split, where all such tiles fit on the GPU at once."""


@dataclass(frozen=True)
class Break:
    """A bug that breaks the promise of the batch-invariant mode, and how to plant it, by backend id."""

    id: str
    title: str
    plants: Mapping[str, Source | Override] = field(repr=False)


def _invariant(*edits: Edit) -> Source:
    """A patch of the source with the mode and without masks."""
    return Source(edits, invariant=True)


def _base(module: str, name: str, method: str) -> Callable:
    """A method of a backend's own class."""
    from importlib import import_module

    return getattr(getattr(import_module(f"flashcore.backends.{module}"), name), method)


# ------------------------------------------------------------------------------- votes

RAISES: Edit = ("{outgrown(page_sum[0]), outgrown(page_sum[1])}", "{true, true}")
"""Where one row of a warp outgrows its reference, all take a new one, as they do without the mode."""
ROWS_THAT_VOTE = 16
FAR_BELOW = 8.0


def _row_max_by_vote(self, scores, row_max):
    """Of sixteen rows, those that are far below the highest take its reference."""
    found = _base("cpu", "CpuBackend", "row_max")(self, scores, row_max)
    for rows in found.split(ROWS_THAT_VOTE, dim=-1):  # views
        highest = rows.amax(dim=-1, keepdim=True)
        below = rows.isfinite() & (rows < highest - FAR_BELOW)
        rows.copy_(rows.where(~below, highest - FAR_BELOW))
    return found


# ------------------------------------------------------------------------------- chunks that hang on the batch

CHUNK_END = "const int chunk_end = first_tile_of(chunk_of(first_of_tile + from) + 1) - first_of_tile;"
BY_BATCH: Edit = (
    CHUNK_END,
    "const int tiles_a_chunk = params.batch > 1 ? CHUNK_TILES / 2 : CHUNK_TILES;\n"
    "    const int chunk_end = ((first_of_tile + from) / tiles_a_chunk + 1) * tiles_a_chunk - first_of_tile;",
)


def _tiles_by_batch(self, problem):
    """Tiles of half the keys where a batch has several sequences."""
    ordered, tiled = _base("cpu", "CpuBackend", "for_problem")(self, problem)
    return ordered, tiled.with_(page_size=tiled.page_size // 2) if problem.batch > 1 else tiled


# ------------------------------------------------------------------------------- keys split by how full the GPU is


def _asked(problem, device: int):
    """The problem; without the mode where its tiles leave part of the GPU idle."""
    from flashcore.gpu.launching import multiprocessors

    tiles = -(-problem.seqlen_q // SPLIT_ROWS) * problem.num_heads_q * problem.batch
    return problem.with_(batch_invariant=False) if tiles <= multiprocessors(device) else problem


def _defines_by_occupancy(self, problem, device):
    return _base("hopper", "Hopper", "defines")(self, _asked(problem, device), device)


def _entry_by_occupancy(self, problem, device):
    return _base("hopper", "Hopper", "entry")(self, _asked(problem, device), device)


def _sums_by_occupancy(self, problem, loaded, keys, device, stream):
    """A kernel without the mode takes no room for sums."""
    if not _asked(problem, device.index or 0).batch_invariant:
        return None
    return _base("hopper", "Hopper", "room_for_sums")(self, problem, loaded, keys, device, stream)


BREAKS: tuple[Break, ...] = (
    Break(
        "votes", "rows raise their reference together",
        {"hopper": _invariant(RAISES), "decode": _invariant(RAISES), "cpu": Override({"row_max": _row_max_by_vote})},
    ),
    Break(
        "chunks by batch", "chunks of keys have half the size where a call has several sequences",
        {"hopper": _invariant(BY_BATCH), "cpu": Override({"for_problem": _tiles_by_batch})},
    ),
    Break(
        "split by occupancy", "keys are split where tiles would leave part of the GPU idle",
        {
            "hopper": Override({
                "defines": _defines_by_occupancy, "entry": _entry_by_occupancy, "room_for_sums": _sums_by_occupancy,
            }),
        },
    ),
)  # fmt: skip
"""All of them."""
