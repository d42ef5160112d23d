"""Where a slider may go: every place of every stage can be drawn, and the first one is where the finding is."""

from __future__ import annotations

import pytest
from support import wrong_attention as zoo

from flashcore.bisection.faults import catalogue
from flashcore.bisection.interactive import debug
from flashcore.bisection.interactive.looking import Place
from flashcore.problem import Problem

UNEVEN = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=33, seqlen_k=70, head_dim=16, causal=True,
                 page_size=32)  # fmt: skip


def looks():
    fault = catalogue.get("F8")
    yield debug(fault.plant("cpu"), UNEVEN).look
    yield debug(zoo.heads_by_remainder, UNEVEN, device="cpu", pattern="normal").look


@pytest.fixture(scope="module", params=["stages", "answers"])
def look(request):
    return dict(zip(("stages", "answers"), looks(), strict=True))[request.param]


def test_each_corner_of_each_stage_can_be_looked_at(look):
    for stage in look.stages:
        for last in (False, True):
            ends = look.heads, look.pages(stage), look.rows, look.columns(stage)
            place = Place(stage, *(n - 1 if last else 0 for n in ends), from_start=last and look.has_own_inputs)
            for part, name in zip(look.parts(place), ("shares", "got"), strict=True):
                down, across = part["at"]
                assert 0 <= down < len(part[name]) and 0 <= across < len(part[name][0])
                assert (part["batch"], part["head"]) == ((1, 3) if last else (0, 0))


def test_one_begins_at_the_first_bad_element(look):
    tile, window = look.parts(look.first)
    down, across = tile["at"]
    assert not tile["shares"][down][across] <= 1
    down, across = window["at"]
    assert window["got"][down][across] != window["expected"][down][across]


def test_grids_have_as_many_columns_as_names(look):
    for rows, columns, caption, _ in look.grids():
        assert {len(shares) for shares in rows.values()} == {len(columns)} and "share of its bound" in caption
