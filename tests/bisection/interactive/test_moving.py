"""Sliders: each draws the place it was moved to, and none can leave the problem.

Once with widgets made up here, so that this is tested where ipywidgets is missing, and once with the real ones.
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from flashcore.bisection.faults import catalogue
from flashcore.bisection.interactive import debug, moving
from flashcore.problem import square


class Widget:
    """What the sliders use of a widget: a value that tells who watches it, and its other fields."""

    def __init__(self, children=(), **fields):
        self._watch = []
        self.__dict__.update(fields | {"children": children})

    def observe(self, call, name):
        assert name == "value"
        self._watch.append(call)

    def __setattr__(self, name, value):
        changed = name == "value" and "value" in self.__dict__ and self.__dict__["value"] != value
        self.__dict__[name] = value
        for call in self._watch if changed else ():
            call({"new": value})


@pytest.fixture(params=["made up", "installed"])
def found(request, monkeypatch):
    if request.param == "made up":
        kinds = ("Dropdown", "IntSlider", "VBox", "HBox", "HTML", "Layout")
        made = {kind: type(kind, (Widget,), {}) for kind in kinds}
        made["HTML"] = lambda text="": Widget(value=text)
        monkeypatch.setitem(sys.modules, "ipywidgets", SimpleNamespace(**made))
    else:
        pytest.importorskip("ipywidgets")
    return debug(catalogue.get("F8").plant("cpu"), square(1, 2, 96, 16, page_size=64))


def parts(found):
    """The controls by name, and what shows the place."""
    box = moving.with_sliders(found)
    finding, grids, below = box.children
    assert "scores goes wrong first" in finding.value and "Worst error of each stage" in grids.value
    controls, shown = below.children
    return {one.description: one for one in controls.children}, shown


def test_it_begins_at_the_first_bad_element_and_follows_the_sliders(found):
    controls, shown = parts(found)
    assert list(controls) == ["stage", "judged", "head", "page", "row", "column"]
    assert controls["stage"].value == "scores" and "scores, batch 0, head 0, page 0" in shown.value
    controls["head"].value = 1
    assert "scores, batch 0, head 1, page 0" in shown.value
    controls["page"].value = 1
    assert "scores, batch 0, head 1, page 1" in shown.value
    before = shown.value
    controls["row"].value = 90
    assert shown.value != before and ">90</th>" in shown.value


def test_another_stage_has_its_own_length_of_sliders(found):
    controls, shown = parts(found)
    controls["page"].value, controls["column"].value = 1, 63
    controls["stage"].value = "out"
    assert controls["page"].disabled and controls["page"].value == 0 and controls["column"].max == 15
    assert "out, batch 0, head 0: " in shown.value
    controls["stage"].value = "lse"
    assert controls["column"].disabled and "lse, batch 0, head 0: " in shown.value
    controls["stage"].value = "row_sum"
    assert controls["page"].max == 1 and not controls["page"].disabled


def test_the_other_way_of_judging_shows_other_errors(found):
    controls, shown = parts(found)
    controls["stage"].value = "probs"
    assert "are within their bounds" in shown.value, "right from its own inputs"
    controls["judged"].value = True
    assert "are beyond their bounds" in shown.value, "and wrong from the start"


def test_outside_a_notebook_and_without_ipywidgets_there_is_none(found, monkeypatch):
    assert moving.widget_of(found) is None
    monkeypatch.setattr(moving, "in_kernel", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert moving.widget_of(found) is None
    assert set(found._repr_mimebundle_()) == {"text/plain", "text/html"}
