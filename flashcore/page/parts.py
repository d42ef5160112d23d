"""Small pieces that the page's modules share: folded content, tables from data frames, parts that stand alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.decision.compare import number
from flashcore.page.drawing import html_tables

if TYPE_CHECKING:
    from pandas import DataFrame


MOST_OF_A_CAUSE = 200
"""Letters of what a foreign error says that fit into a sentence."""


def drawn(what: str, draw: Callable[[], str]) -> str:
    """One part of the page, or a sentence on why there is none: a record that makes no sense costs no other part.

    Parameters
    ----------
    what
        Names the part in that sentence.
    draw
        Makes the part's HTML.
    """
    try:
        return draw()
    except Exception as error:  # whatever a view meets first in a record that holds something else than it should
        at = traceback.extract_tb(error.__traceback__)[-1]
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:MOST_OF_A_CAUSE]
        return html_tables.nothing(
            f"{what} could not be drawn from these records ({cause}, {Path(at.filename).name}, line {at.lineno})."
        )


def frame_html(frame: DataFrame, caption: str, *, ids: Collection[str | None] = ()) -> str:
    """A data frame as a table, its column names as headings; one in `ids` is a backend's name and stays as it is."""
    records = frame.to_dict("records")
    if not records:
        return html_tables.nothing(f"{caption}: no record.")
    rows = [{heading(str(name), ids): _counted(value) for name, value in row.items()} for row in records]
    counts = [heading(str(name), ids) for name in frame.columns if all(_is_count(row[name]) for row in records)]
    return html_tables.table_html(rows, caption, numeric=counts)


def heading(name: str, ids: Collection[str | None] = ()) -> str:
    """A column's name as a heading; ids are shown as they are."""
    return name if name in ids else name[:1].upper() + name[1:]


def _counted(value: Any) -> Any:
    return f"{value:,}" if _is_count(value) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def signed(value: float, digits: int | None = None) -> str:
    """A difference with its sign."""
    text = number(abs(value)) if digits is None else f"{abs(value):.{digits}f}"
    return f"{'−' if value < 0 else '+'}{text}"


def short(unit: str) -> str:
    """The unit as it stands behind a figure: a share of whatever is a percentage."""
    return "%" if unit.startswith("%") else unit
