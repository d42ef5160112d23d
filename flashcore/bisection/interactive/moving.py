"""Sliders over a finding: move through stage, head, page, row and column where ipywidgets is installed."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

from flashcore.bisection.interactive.cells import in_kernel
from flashcore.bisection.interactive.looking import Look, Place


class Shown(Protocol):
    """A finding that can be drawn (`flashcore.bisection.interactive.debugging.Debugging`)."""

    look: Look | None

    def finding_html(self) -> str: ...

    def grids_html(self) -> str: ...

    def place_html(self, place: Place) -> str: ...


def widget_of(found: Shown) -> Any:
    """The finding, its grids and sliders as one widget; None outside a notebook, or where ipywidgets is missing."""
    if not in_kernel() or importlib.util.find_spec("ipywidgets") is None:
        return None
    return with_sliders(found)


def with_sliders(found: Shown) -> Any:
    """The same, wherever one is; needs ipywidgets."""
    import ipywidgets

    look, first = found.look, found.look.first
    style = {"description_width": "4em"}

    def slider(name: str, value: int, count: int) -> Any:
        return ipywidgets.IntSlider(value=value, min=0, max=max(count - 1, 0), description=name, style=style,
                                    continuous_update=False, disabled=count <= 1)  # fmt: skip

    stage = ipywidgets.Dropdown(options=list(look.stages), value=first.stage, description="stage", style=style)
    judged = ipywidgets.Dropdown(options=[("from its own inputs", False), ("from the start", True)],
                                 value=first.from_start, description="judged", style=style)  # fmt: skip
    sliders = {
        "head": slider("head", first.head, look.heads),
        "page": slider("page" if look.has_own_inputs else "key tile", first.page, look.pages(first.stage)),
        "row": slider("row", first.row, look.rows),
        "column": slider("column", first.column, look.columns(first.stage)),
    }
    shown = ipywidgets.HTML(found.place_html(first))
    moving = {"now": False}

    def place() -> Place:
        where = {name: one.value for name, one in sliders.items()}
        return Place(stage.value, from_start=judged.value and look.has_own_inputs, **where)

    def changed(_: object = None) -> None:
        if not moving["now"]:
            shown.value = found.place_html(place())

    def another_stage(_: object) -> None:
        moving["now"] = True  # each slider that is cut to its new length would draw once more
        for name, count in (("page", look.pages(stage.value)), ("column", look.columns(stage.value))):
            sliders[name].value = min(sliders[name].value, count - 1)
            sliders[name].max = max(count - 1, 0)
            sliders[name].disabled = count <= 1
        moving["now"] = False
        changed()

    stage.observe(another_stage, "value")
    for one in (judged, *sliders.values()):
        one.observe(changed, "value")
    controls = [stage, *([judged] if look.has_own_inputs else []), *sliders.values()]
    return ipywidgets.VBox([
        ipywidgets.HTML(found.finding_html()), ipywidgets.HTML(found.grids_html()),
        ipywidgets.HBox([ipywidgets.VBox(controls), shown], layout=ipywidgets.Layout(flex_flow="row wrap")),
    ])  # fmt: skip
