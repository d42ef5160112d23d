"""The window around a bad element: the right numbers at the right place, for every stage."""

from __future__ import annotations

import math

import pytest
from support.split_traces import SIX_PAGES, Continues, SplitCpu

from flashcore import backends
from flashcore.bisection.bisecting import bisect
from flashcore.bisection.zoom import tile, zoom
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.reference import STAGES, interleaved
from flashcore.problem import square


def test_the_window_shows_the_chain_that_was_traced():
    backend = Continues(lambda n: interleaved(n, 3))
    backend.stages = ("accum",)
    result = bisect(backend, SIX_PAGES)
    first = result.stages[STAGES.index("accum")].local.first_bad
    down, across = result.window["at"]
    assert result.window["page"] == first["page"] == 3
    assert result.window["got"][down][across] == pytest.approx(first["got"], rel=1e-4)
    assert result.window["expected"][down][across] == pytest.approx(first["expected"], rel=1e-4)


def test_the_window_from_the_start_follows_the_chains_too():
    inputs = make_inputs(SIX_PAGES)
    trace = SplitCpu().trace(*inputs, SIX_PAGES)
    truth = reference.trace(*inputs, SIX_PAGES, previous=trace.previous)
    element = {"stage": "row_sum", "page": 4, "batch": 1, "head": 0, "row": 7}
    window = zoom(trace, *inputs, SIX_PAGES, element, is_local=False)
    down, across = window["at"]
    assert window["expected"][down][across] == pytest.approx(float(truth.row_sum[1, 0, 4, 7]), rel=1e-3)


# ------------------------------------------------------------------------------------------------ by itself

PROBLEM = square(2, 3, 40, 16, page_size=16)


def seen(stage: str, is_local: bool = True, change: float = 1.0, **place) -> dict:
    """The window around an element of the cpu backend's trace that is too large by `change`."""
    inputs = make_inputs(PROBLEM)
    trace = backends.get("cpu").trace(*inputs, PROBLEM)
    head = (place["batch"], place["head"])
    rest = {"accum": ("page", "row", "column"), "lse": ("row",)}.get(stage)
    rest = rest or (("page", "row") if stage in ("row_max", "rescale", "row_sum") else ("row", "column"))
    tensor = getattr(trace, stage)
    tensor[(*head, *(place[name] for name in rest))] += change
    return zoom(trace, *inputs, PROBLEM, {"stage": stage, **place}, is_local=is_local)


ELEMENTS = {
    "scores": {"page": 1, "batch": 1, "head": 2, "row": 20, "column": 18},
    "row_sum": {"page": 2, "batch": 1, "head": 2, "row": 20},
    "probs": {"page": 2, "batch": 0, "head": 1, "row": 39, "column": 39},
    "accum": {"page": 2, "batch": 1, "head": 0, "row": 0, "column": 0},
    "out": {"batch": 1, "head": 2, "row": 7, "column": 15},
    "lse": {"batch": 1, "head": 2, "row": 38},
}
"""Inside, at the last row and column, at the first ones, and at one edge alone.

Sums are changed on the last page: a later one is judged from the sums before it, so that it would differ too.
"""


@pytest.mark.parametrize("stage", ELEMENTS)
@pytest.mark.parametrize("is_local", [True, False])
def test_the_wrong_element_stands_where_the_window_says_and_nothing_else_is_wrong(stage, is_local):
    place = ELEMENTS[stage]
    window = seen(stage, is_local, change=8.0, **place)
    down, across = window["at"]
    assert (window["stage"], window["batch"], window["head"], window["page"]) == (
        stage, place["batch"], place["head"], place.get("page")
    )  # fmt: skip
    axes = (window["down"], window["across"])
    assert axes == {"row_sum": ("page", "row"), "lse": ("head", "row")}.get(stage, ("row", "column"))
    assert (window["first_down"] + down, window["first_across"] + across) == tuple(place[axis] for axis in axes)
    for i, (got, expected) in enumerate(zip(window["got"], window["expected"], strict=True)):
        for j, (mine, wanted) in enumerate(zip(got, expected, strict=True)):
            off = 8.0 if [i, j] == window["at"] else 0.0
            assert mine - wanted == pytest.approx(off, abs=0.03), (i, j)


@pytest.mark.parametrize(
    ("stage", "place", "size", "first"),
    [
        ("scores", {"page": 1, "batch": 0, "head": 0, "row": 20, "column": 20}, (5, 8), (18, 16)),
        ("scores", {"page": 0, "batch": 0, "head": 0, "row": 0, "column": 1}, (5, 8), (0, 0)),
        ("scores", {"page": 2, "batch": 0, "head": 0, "row": 39, "column": 38}, (5, 8), (35, 32)),
        ("row_max", {"page": 2, "batch": 0, "head": 0, "row": 3}, (3, 8), (0, 0)),
        ("out", {"batch": 0, "head": 0, "row": 2, "column": 15}, (5, 8), (0, 8)),
        ("lse", {"batch": 1, "head": 2, "row": 39}, (1, 8), (2, 32)),
    ],
)
def test_a_window_is_whole_wherever_there_is_room_for_it(stage, place, size, first):
    window = seen(stage, change=0.0, **place)
    assert (window["first_down"], window["first_across"]) == first
    for rows in (window["got"], window["expected"]):
        assert len(rows) == size[0] and {len(row) for row in rows} == {size[1]}


def test_a_stage_smaller_than_a_window_is_shown_as_it_is():
    tiny = square(1, 1, 2, 3, page_size=16)
    inputs = make_inputs(tiny)
    trace = backends.get("cpu").trace(*inputs, tiny)
    element = {"stage": "out", "batch": 0, "head": 0, "row": 1, "column": 2}
    window = zoom(trace, *inputs, tiny, element, is_local=True)
    assert window["at"] == [1, 2] and (window["first_down"], window["first_across"]) == (0, 0)
    assert [len(row) for row in window["got"]] == [3, 3]


def test_local_expects_what_follows_from_the_stage_before_and_global_what_follows_from_the_start():
    """A wrong accum makes out wrong: from the start it is, from its own inputs it is not."""
    inputs = make_inputs(PROBLEM)
    trace = backends.get("cpu").trace(*inputs, PROBLEM)
    trace.accum[0, 1, 2, 9, 5] += 100.0
    trace.out[0, 1, 9, 5] = trace.accum[0, 1, 2, 9, 5] / trace.row_sum[0, 1, 2, 9]
    element = {"stage": "out", "batch": 0, "head": 1, "row": 9, "column": 5}
    local, overall = (zoom(trace, *inputs, PROBLEM, element, is_local=which) for which in (True, False))
    down, across = local["at"]
    assert local["at"] == overall["at"] and local["got"] == overall["got"]
    assert local["expected"][down][across] == pytest.approx(local["got"][down][across], rel=1e-3)
    assert abs(overall["expected"][down][across] - overall["got"][down][across]) > 1


def test_numbers_are_short_and_plain_nan_and_infinities_too():
    window = seen("scores", change=math.nan, **ELEMENTS["scores"])
    down, across = window["at"]
    assert math.isnan(window["got"][down][across]) and math.isfinite(window["expected"][down][across])
    window = seen("scores", change=math.inf, **ELEMENTS["scores"])
    assert window["got"][down][across] == math.inf
    for number in (x for row in window["expected"] for x in row):
        assert type(number) is float and number == float(f"{number:.5g}")


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_a_tile_has_an_error_beyond_its_bound_where_one_element_is_wrong(stage, is_local):
    problem = square(1, 2, 70, 16, page_size=32)
    q, k, v = make_inputs(problem)
    own = reference.trace(q, k, v, problem, page_size=32)
    tensor = getattr(own, stage)
    at = {4: (0, 1, 41, 8), 5: (0, 1, 1, 41, 8), 3: (0, 1, 41)}[tensor.dim()]
    if stage in ("row_max", "rescale", "row_sum"):
        at = (0, 1, 2, 41)  # the last page, which no other goes on from
    if stage in ("scores", "probs"):
        at = (0, 1, 41, 67)  # in the last page, which has six keys
    tensor[at] = 1e9 if stage != "row_max" else math.nan
    element = {"stage": stage, "batch": 0, "head": 1, "page": 1 if stage == "accum" else 2, "row": 41,
               "column": at[-1]}  # fmt: skip
    found = tile(own, q, k, v, problem, element, is_local=is_local)
    down, across = found["at"]
    wrong = [(i, j) for i, row in enumerate(found["shares"]) for j, share in enumerate(row) if not share <= 1]
    assert wrong == [(down, across)], "every other element of the tile is right"
    if stage in ("scores", "probs"):
        assert (found["first_down"], found["first_across"], len(found["shares"][0])) == (32, 64, 6)


def test_a_tile_ends_with_the_rows_and_begins_at_a_multiple_of_its_size():
    problem = square(1, 1, 70, 16, page_size=128)
    q, k, v = make_inputs(problem)
    own = reference.trace(q, k, v, problem, page_size=128)
    element = {"stage": "probs", "batch": 0, "head": 0, "page": 0, "row": 69, "column": 65}
    found = tile(own, q, k, v, problem, element, is_local=True)
    assert (found["first_down"], found["first_across"], found["at"]) == (64, 64, [5, 1])
    assert (len(found["shares"]), len(found["shares"][0])) == (6, 6)
