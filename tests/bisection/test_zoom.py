"""The window around a bad element: the right numbers at the right place, for every stage."""

from __future__ import annotations

import pytest
from support.split_traces import SIX_PAGES, Continues, SplitCpu

from flashcore.bisection.bisecting import bisect
from flashcore.bisection.zoom import zoom
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.reference import STAGES, interleaved


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
