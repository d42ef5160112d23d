"""Cut out what lies around one element of a stage: got and expected of a few, and how wrong each of its tile is."""

from __future__ import annotations

from typing import Any

from flashcore.bisection.stagewise import Judges
from flashcore.numerics import ambient, masking, reference
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.reference import Trace
from flashcore.numerics.tolerance import TANH_ERROR
from flashcore.problem import Problem

ROWS, COLUMNS = 5, 8
"""Size of a window: enough to see whether a row, a column, a fragment or one element is wrong."""
TILE_ROWS, TILE_COLUMNS = 32, 64
"""Size of a tile: its edges lie at multiples of these, as those of kernels do."""
_DIGITS = 5
_ROW_STAGES = ("row_max", "rescale", "row_sum")


def _plane(tensor, stage: str, page: int | None):
    """The two-dimensional part of one head's stage that an element of `page` lies in."""
    if stage == "accum":
        return tensor[page]
    return tensor[None] if stage == "lse" else tensor


def _slice(at: int, size: int, wanted: int) -> slice:
    first = max(0, min(at - wanted // 2, size - wanted))
    return slice(first, min(first + wanted, size))


@ambient.judging
def zoom(
    own: Trace, q, k, v, problem: Problem, element: dict[str, Any], *, is_local: bool, masks: MaskTensors | None = None
) -> dict[str, Any]:
    """The window around `element`, in plain numbers for a record.

    Parameters
    ----------
    own
        The traced stages.
    q, k, v
        The inputs of the trace.
    element
        As in `Judgement.first_bad`: stage, page, batch, head, row, column.
    is_local
        Expect what follows from the backend's own inputs to the stage, not from the start.
    masks
        Where the masks of `problem` need tensors.

    Returns
    -------
    dict
        `stage`, `batch`, `head`, `page` (of the element), `down` and `across` (names of the axes), `first_down`,
        `first_across`, `at` (the element's place in the window), and `got` and `expected` as lists of rows.
    """
    stage, page = element["stage"], element.get("page")
    mine, wanted, *_ = _one_head(own, q, k, v, problem, element, is_local, masks)
    got, expected = (_plane(getattr(t, stage)[0], stage, page) for t in (mine, wanted))
    down, across, place = _axes(element)
    window = tuple(_slice(at, size, n) for at, size, n in zip(place, got.shape, (ROWS, COLUMNS), strict=True))
    return _cut(element, down, across, place, window) | {
        "got": _numbers(got[window]), "expected": _numbers(expected[window]),
    }  # fmt: skip


@ambient.judging
def tile(
    own: Trace, q, k, v, problem: Problem, element: dict[str, Any], *, is_local: bool,
    masks: MaskTensors | None = None, tanh_error: float = TANH_ERROR,
) -> dict[str, Any]:  # fmt: skip
    """How wrong each element of the tile around `element` is; parameters as in `zoom` and `bisecting.judge`.

    Returns
    -------
    dict
        As of `zoom`, with `shares` in place of `got` and `expected`: rows of errors as a share of their bounds. A tile
        of `scores` or `probs` ends with its page.
    """
    stage, page = element["stage"], element.get("page")
    mine, wanted, inputs, of_head = _one_head(own, q, k, v, problem, element, is_local, masks)
    head = element["batch"] * problem.num_heads_q + element["head"]
    judges = Judges(mine, own, inputs, problem, head, of_head, tanh_error)
    models = judges.local_models(wanted) if is_local else judges.global_models(wanted)
    scores = mine.scores if is_local else wanted.scores
    shares = _plane(judges.shares(stage, wanted, models, scores, is_local=is_local)[0], stage, page)
    down, across, place = _axes(element)
    first, last = 0, shares.shape[1]
    if stage in ("scores", "probs"):
        first = place[1] // own.page_size * own.page_size
        last = min(first + own.page_size, last)
    top = place[0] // TILE_ROWS * TILE_ROWS
    left = first + (place[1] - first) // TILE_COLUMNS * TILE_COLUMNS
    cut = slice(top, min(top + TILE_ROWS, shares.shape[0])), slice(left, min(left + TILE_COLUMNS, last))
    return _cut(element, down, across, place, cut) | {"shares": _numbers(shares[cut])}


def _one_head(own: Trace, q, k, v, problem: Problem, element: dict[str, Any], is_local: bool, masks):
    """The trace of the element's head, what it should hold, and the head's inputs and masks; shapes with ``[1]``."""
    q, k, v, problem, masks = masking.right_aligned(q, k, v, problem, masks)
    head = element["batch"] * problem.num_heads_q + element["head"]
    one = slice(head, head + 1)
    mine = own.map(lambda t: t.reshape(-1, *t.shape[2:])[one].double())
    inputs, of_head = reference.flat_inputs(q, k, v, problem, one), reference.flat_masks(problem, masks, one)
    if is_local:
        return mine, reference.flat_stages_from(mine, *inputs, problem, of_head), inputs, of_head
    truth = reference.flat_trace(*inputs, problem, own.page_size, mine.row_max, own.previous, of_head)
    return mine, truth, inputs, of_head


def _axes(element: dict[str, Any]) -> tuple[str, str, tuple[int, int]]:
    """Names of the two axes of the element's plane, and its place along them."""
    if element["stage"] in _ROW_STAGES:
        return "page", "row", (element["page"], element["row"])
    if element["stage"] == "lse":
        return "head", "row", (0, element["row"])
    return "row", "column", (element["row"], element["column"])


def _cut(element: dict[str, Any], down: str, across: str, place, cut: tuple[slice, slice]) -> dict[str, Any]:
    stage = element["stage"]
    return {
        "stage": stage, "batch": element["batch"], "head": element["head"], "page": element.get("page"),
        "down": down, "across": across,
        "first_down": element["head"] if stage == "lse" else cut[0].start, "first_across": cut[1].start,
        "at": [place[0] - cut[0].start, place[1] - cut[1].start],
    }  # fmt: skip


def _numbers(tensor) -> list[list[float]]:
    return [[float(f"{x:.{_DIGITS}g}") for x in row] for row in tensor.tolist()]
