"""Cut out what lies around one element of a stage: what the backend got there, and what was expected."""

from __future__ import annotations

from typing import Any

from flashcore.numerics import ambient, reference
from flashcore.numerics.reference import Trace
from flashcore.problem import Problem

ROWS, COLUMNS = 5, 8
"""Size of a window: enough to see whether a row, a column, a fragment or one element is wrong."""
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
def zoom(own: Trace, q, k, v, problem: Problem, element: dict[str, Any], *, is_local: bool) -> dict[str, Any]:
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

    Returns
    -------
    dict
        `stage`, `batch`, `head`, `page` (of the element), `down` and `across` (names of the axes), `first_down`,
        `first_across`, `at` (the element's place in the window), and `got` and `expected` as lists of rows.
    """
    stage, page = element["stage"], element.get("page")
    head = element["batch"] * problem.num_heads_q + element["head"]
    one = slice(head, head + 1)
    mine = own.map(lambda t: t.reshape(-1, *t.shape[2:])[one].double())
    inputs = reference.flat_inputs(q, k, v, problem, one)
    if is_local:
        wanted = reference.flat_stages_from(mine, *inputs, problem)
    else:
        wanted = reference.flat_trace(*inputs, problem, own.page_size, row_max=mine.row_max, previous=own.previous)
    got, expected = (_plane(getattr(t, stage)[0], stage, page) for t in (mine, wanted))
    if stage in _ROW_STAGES:
        down, across, place = "page", "row", (page, element["row"])
    elif stage == "lse":
        down, across, place = "head", "row", (0, element["row"])
    else:
        down, across, place = "row", "column", (element["row"], element["column"])
    window = tuple(_slice(at, size, n) for at, size, n in zip(place, got.shape, (ROWS, COLUMNS), strict=True))
    return {
        "stage": stage, "batch": element["batch"], "head": element["head"], "page": page,
        "down": down, "across": across,
        "first_down": element["head"] if stage == "lse" else window[0].start, "first_across": window[1].start,
        "at": [place[0] - window[0].start, place[1] - window[1].start],
        "got": _numbers(got[window]), "expected": _numbers(expected[window]),
    }  # fmt: skip


def _numbers(tensor) -> list[list[float]]:
    return [[float(f"{x:.{_DIGITS}g}") for x in row] for row in tensor.tolist()]
