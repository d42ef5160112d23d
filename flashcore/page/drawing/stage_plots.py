"""Draw a bisection: the error of each stage on each page, and what lies around the first bad element. Never torch."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flashcore import tables
from flashcore.page.drawing.closeups import differences, number_of
from flashcore.page.drawing.html_tables import nothing
from flashcore.page.drawing.svg import COLOURS, FONT_SIZE, figure_html, style
from flashcore.records import Trial

_CELL_WIDTH, _CELL_HEIGHT = 0.62, 0.34
"""Inches of one cell of the heat map; cells shrink when there are many."""
_WIDEST = 6.6
_LEFT, _BOTTOM, _EDGE = 0.92, 0.62, 0.08
"""Inches for the names of stages, for the numbers of pages, and around. A layout engine would take half of the time."""
_WHOLE = ("out", "lse")
"""Stages that have no pages: they stand in a column of their own, after the last page."""


def _share(value: Any) -> float:
    return float(value)


def _words(share: float) -> str:
    """A share of the bound as a cell says it; what fails is said in a word, never by its colour alone."""
    if not math.isfinite(share):
        return "FAIL"
    return f"{share:.2f}" if share <= 1 else "FAIL"


def _colour(share: float) -> tuple[str, float]:
    """Fill and its opacity: stronger towards the bound, another colour beyond it."""
    if share <= 1:
        return COLOURS["s1"], 0.06 + 0.34 * max(share, 0.0)
    size = 1.0 if not math.isfinite(share) else min(1.0, math.log10(share) / 6)
    return COLOURS["target"], 0.30 + 0.30 * size


def error_figure(trial: Trial, *, view: str = "local") -> Figure:
    """Stages down, pages across: the worst error of each as a share of its bound.

    Parameters
    ----------
    trial
        Of kind `bisection`, with a ``grid`` in its data.
    view
        ``local`` (each stage from the backend's own inputs) or ``global`` (from the start).
    """
    grid = trial.data["grid"]
    rows: dict[str, list[float]] = {stage: [_share(s) for s in shares] for stage, shares in grid[view].items()}
    pages = max(len(shares) for stage, shares in rows.items() if stage not in _WHOLE)
    together = grid["pages_a_cell"]
    labels = [str(p * together) if together == 1 else f"{p * together}-" for p in range(pages)]
    width = min(_CELL_WIDTH, (_WIDEST - _LEFT - _EDGE) / (pages + 1))
    inner = (width * (pages + 1), _CELL_HEIGHT * len(rows))
    outer = (_LEFT + inner[0] + _EDGE, _BOTTOM + inner[1] + _EDGE)
    with style():
        figure = Figure(figsize=outer)
        axes = figure.add_axes((_LEFT / outer[0], _BOTTOM / outer[1], inner[0] / outer[0], inner[1] / outer[1]))
        size = min(FONT_SIZE - 3, 20 * width)
        for down, (stage, shares) in enumerate(rows.items()):
            for across, share in enumerate(shares):
                column = pages if stage in _WHOLE else across
                fill, opacity = _colour(share)
                axes.add_patch(Rectangle((column, down), 1, 1, facecolor=fill, alpha=opacity, linewidth=0))
                axes.text(column + 0.5, down + 0.5, _words(share), ha="center", va="center", fontsize=size,
                          fontweight="bold" if not share <= 1 else "normal")  # fmt: skip
        axes.set_xlim(0, pages + 1)
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([x + 0.5 for x in range(pages + 1)], [*labels, "end"], fontsize=size)
        axes.set_yticks([y + 0.5 for y in range(len(rows))], list(rows))
        axes.set_xlabel("page of keys" if together == 1 else f"pages of keys, {together} a cell")
        axes.tick_params(length=0)
        axes.grid(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
    return figure


def error_html(trial: Trial, *, view: str = "local") -> str:
    """`error_figure` for a page, with its message as text alternative; a sentence where there is nothing to draw."""
    grid = trial.data.get("grid")
    if not grid:
        return nothing(f"No stages were judged: {trial.reason or 'the record holds none'}.")
    bad = [f"{stage} ({sum(not _share(s) <= 1 for s in shares)} of {len(shares)} cells)"
           for stage, shares in grid[view].items() if any(not _share(s) <= 1 for s in shares)]  # fmt: skip
    worst = max((_share(s) for shares in grid[view].values() for s in shares), default=0.0)
    seen = "from its own inputs" if view == "local" else "from the start"
    alt = f"{trial.backend}: worst error of each stage and page {seen}, as a share of its bound. " + (
        f"Beyond the bound: {', '.join(bad)}." if bad else f"All are within; the largest share is {worst:.2f}."
    )
    caption = f"{trial.backend}, each stage {seen}: error as a share of its bound; FAIL is beyond it"
    return figure_html(error_figure(trial, view=view), alt, caption=caption)


def bisection_html(trial: Trial, *, planted: str = "") -> str:
    """One bisection whole: its finding in words, then stages, maps and the zoom; folded where every stage is right.

    `planted` names a bug that was planted for it.
    """
    coverage, of = trial.data.get("coverage", {}), f" with {planted} planted" if planted else ""
    label = trial.problem.label() if trial.problem else "no problem"
    all_there = "all there are" if coverage.get("complete") else "not all there are"
    said = str(trial.reason or trial.data.get("finding", "nothing was judged")).rstrip(".")
    head = f"{trial.backend}{of} on {label}: {tables.WORDS[trial.status]}."
    covered = f"Coverage: {coverage.get('elements', 0)} values, {all_there}."
    finding = f"<p><strong>{escape(head)}</strong> {escape(said)}. {covered}</p>"
    parts = []
    if trial.data.get("stages"):
        caption = f"Stages of {trial.backend}{of}, {label}"
        parts.append(tables.styled(tables.stage_table(trial), caption).to_html())
    views = ["local"] if trial.status == "ok" else ["local", "global"]
    parts += [error_html(trial, view=view) for view in views if trial.data.get("grid")]
    if trial.data.get("window"):
        parts.append(zoom_html(trial))
    return finding + (tables.folded("".join(parts), "Its stages", fold=trial.status == "ok") if parts else "")


def _panels(window: dict[str, Any]) -> dict[str, list[list[float]]]:
    read = {name: [[_share(x) for x in row] for row in window[name]] for name in ("got", "expected")}
    return read | {"difference": differences(read)}


def zoom_figure(trial: Trial) -> Figure:
    """What was got, what was expected and the difference, around the first bad element, which has a frame."""
    window = trial.data["window"]
    panels = _panels(window)
    rows, columns = len(panels["got"]), len(panels["got"][0])
    sizes = [abs(x) for row in panels["difference"] for x in row if math.isfinite(x)]
    largest = max(sizes, default=0.0) or 1.0
    with style():
        figure = Figure(figsize=(_WIDEST, 3 * (0.62 + 0.27 * rows)), layout="constrained")
        for axes, (name, values) in zip(figure.subplots(3, 1), panels.items(), strict=True):
            for down, row in enumerate(values):
                for across, value in enumerate(row):
                    if name == "difference" and value != 0:
                        strength = abs(value) / largest if math.isfinite(value) else 1.0
                        axes.add_patch(Rectangle((across, down), 1, 1, facecolor=COLOURS["target"], linewidth=0,
                                                 alpha=0.08 + 0.42 * strength))  # fmt: skip
                    axes.text(across + 0.5, down + 0.5, number_of(value, digits=3), ha="center", va="center",
                              fontsize=FONT_SIZE - 3)  # fmt: skip
            down, across = window["at"]
            axes.add_patch(Rectangle((across, down), 1, 1, fill=False, edgecolor=COLOURS["ink"], linewidth=1.6))
            axes.set_xlim(0, columns)
            axes.set_ylim(rows, 0)
            axes.set_title(name)
            first_down, first_across = window["first_down"], window["first_across"]
            axes.set_yticks([n + 0.5 for n in range(rows)], [str(first_down + n) for n in range(rows)])
            axes.set_xticks([n + 0.5 for n in range(columns)], [str(first_across + n) for n in range(columns)])
            axes.set_ylabel(window["down"])
            axes.tick_params(length=0)
            axes.grid(False)
        axes.set_xlabel(window["across"])
    return figure


def zoom_html(trial: Trial) -> str:
    """`zoom_figure` for a page; a sentence when nothing is wrong and there is nothing to look at closely."""
    window = trial.data.get("window")
    if not window:
        return nothing("Nothing to look at closely: no stage holds a wrong element.")
    place = ", ".join(f"{k} {window[k]}" for k in ("batch", "head", "page") if window.get(k) is not None)
    down, across = window["at"]
    got, expected = (number_of(_share(window[name][down][across]), digits=3) for name in ("got", "expected"))
    where = f"{window['down']} {window['first_down'] + down}, {window['across']} {window['first_across'] + across}"
    alt = (f"{trial.backend}, {window['stage']}, {place}: values around the first bad element at {where}, "
           f"got {got}, expected {expected}.")  # fmt: skip
    caption = f"{window['stage']} around the first bad element ({place}, {where}): got {got}, expected {expected}"
    return figure_html(zoom_figure(trial), alt, caption=caption)
