"""Draw a fleet: each card's distance from the median, the spread of each figure, and which card is off and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape
from matplotlib.figure import Figure

from flashcore.decision import fleet
from flashcore.decision.compare import is_figure, number
from flashcore.decision.fleet import FEWEST, FIGURES, SENSORS, Fleet, Kind
from flashcore.page.drawing.html_tables import fold, nothing, table_html
from flashcore.page.drawing.svg import COLOURS, figure_html, named, style, with_tips
from flashcore.records import Trial

LEAST_RANGE = 2.0
"""Percent on each side of the median that the axis shows at least, so that noise looks like noise."""


WORDS = ("Card", "Node", "State", "Held down by")
"""Columns that hold no figure."""


def section_html(trials: Sequence[Trial], environment: Mapping[str, Any]) -> str:
    """The section of a page: who measured the run, workers that were lost, and the fleet; empty for one process."""
    stated = environment.get("cards")
    cards = [one for one in stated if isinstance(one, Mapping)] if isinstance(stated, list) else []
    found, parts = fleet.judge(trials), []
    if cards:
        counted = Counter(f"{one.get('gpu') or 'a CPU worker'} on {one.get('node')}" for one in cards)
        named = ", ".join(f"{count} × {what}" for what, count in counted.items())
        told = f"This run was measured by {len(cards)} workers: {named}."
        parts.append(f"<p>{escape(told)} Each round of timings is of one card, and each record names it.</p>")
    if lost := [trial for trial in trials if trial.kind == "worker"]:
        items = "".join(f"<li>{escape(trial.reason or 'no reason recorded')}</li>" for trial in lost)
        parts.append(f"<p><strong>Workers lost or refused: {len(lost)}.</strong></p><ul>{items}</ul>")
    return "".join([*parts, whole_html(found) if found.kinds else ""])


def whole_html(found: Fleet) -> str:
    """The finding in sentences, then a plot and tables for each kind of card."""
    if not found.kinds:
        return nothing("No card was measured; 'flashcore fleet' measures all of them.")
    first, *rest = found.sentences()
    parts = [f"<p><strong>{escape(first)}</strong></p>"]
    if rest:
        parts.append(f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in rest)}</ul>")
    return "".join([*parts, *map(_kind_html, found.kinds)])


def _kind_html(kind: Kind) -> str:
    label = " (CPU workers in the place of cards: nothing here is about a GPU)" if kind.cpu else ""
    parts = [f"<h3>{len(kind.cards)} × {escape(kind.name)}{label}</h3>"]
    if len(kind.cards) > 1 and kind.spreads:
        parts.append(figure_html(spread_figure(kind), spread_words(kind), caption="Each card against the median."))
    parts.append(table_html(_spread_rows(kind), f"Spread over {len(kind.cards)} × {kind.name}",
                            numeric=("Least", "Median", "Greatest", "Spread", "Off beyond"), stack=True))  # fmt: skip
    rows = _card_rows(kind)
    figures = [column for column in rows[0] if column not in WORDS]
    parts.append(table_html(rows, f"Every card of {kind.name}", numeric=figures, css="fc-fleet"))
    if bits := _bits_rows(kind):
        parts.append(fold("The bits of every card", table_html(bits, "A hash of the bits of each result")))
    return "".join(parts)


def spread_words(kind: Kind) -> str:
    """What the plot says, for a reader who does not see it."""
    parts = [f"{one.title} {number(one.least)} to {number(one.most)} {one.unit}, median {number(one.median)}"
             for one in kind.spreads]  # fmt: skip
    off = f"; off are {', '.join(one.card for one in kind.off)}" if kind.off else "; no card is off"
    return f"{len(kind.cards)} × {kind.name}: {'; '.join(parts)}{off}."


def spread_figure(kind: Kind) -> Figure:
    """A line for each figure, a dot for each card at its distance from the median in percent, better to the right."""
    off = {one.card for one in kind.off}
    with style():
        shown = Figure(figsize=(6.6, 0.9 + 0.42 * len(kind.spreads)), layout="constrained")
        axes = shown.subplots()
        reach = LEAST_RANGE
        for row, one in enumerate(reversed(kind.spreads)):
            sign = -1.0 if one.name in FIGURES and FIGURES[one.name].better == "less" else 1.0
            for trial in kind.cards:
                value = fleet.figure(trial, one.name)
                if value is None:
                    continue
                percent = sign * 100 * (value / one.median - 1)
                reach = max(reach, abs(percent))
                name = fleet.card_name(trial)
                odd = name in off
                (dot,) = axes.plot([percent], [row], "D" if odd else "o", markersize=8 if odd else 6,
                                   color=COLOURS["target"] if odd else COLOURS["s1"], linestyle="none")  # fmt: skip
                with_tips(dot, [f"{name} on {trial.node}: {number(value)} {one.unit}, {percent:+.1f} %"])
            if len(kind.cards) >= FEWEST and one.name in FIGURES:
                limit = sign * 100 * (one.limit / one.median - 1)
                axes.plot([limit, limit], [row - 0.3, row + 0.3], color=COLOURS["muted"], linewidth=1.2)
        axes.axvline(0.0, color=COLOURS["muted"], linewidth=0.8)
        axes.set_xlim(-1.15 * reach, 1.15 * reach)
        axes.set_ylim(-0.6, len(kind.spreads) - 0.4)
        axes.set_yticks(range(len(kind.spreads)), [named(one.title) for one in reversed(kind.spreads)])
        axes.set_xlabel("% from the median; right is better")
    return shown


def _spread_rows(kind: Kind) -> list[dict[str, Any]]:
    rows = []
    for one in kind.spreads:
        judges = len(kind.cards) >= FEWEST and one.name in FIGURES
        rows.append({
            "Figure": f"{one.title}, {one.unit}", "Least": number(one.least), "Median": number(one.median),
            "Greatest": number(one.most), "Spread": f"{one.percent:.1f} %",
            "Off beyond": number(one.limit) if judges else "–",
        })  # fmt: skip
    for name, (least, median, most) in kind.sensors.items():
        title, unit = SENSORS[name]
        rows.append({
            "Figure": f"{title} under load, {unit}", "Least": f"{least:,.0f}", "Median": f"{median:,.0f}",
            "Greatest": f"{most:,.0f}", "Spread": f"{most - least:,.0f} {unit}", "Off beyond": "–",
        })  # fmt: skip
    return rows or [{"Figure": "nothing was measured"}]


def _sensed(value: Any) -> str:
    return f"{value:,.0f}" if is_figure(value) else "not known"


def _card_rows(kind: Kind) -> list[dict[str, Any]]:
    off = {one.card for one in kind.off}
    well = "as the others" if len(kind.cards) >= FEWEST else "not judged"
    rows = []
    for trial in kind.cards:
        name, load = fleet.card_name(trial), trial.data.get("load") or {}
        row: dict[str, Any] = {
            "Card": name,
            "Node": str(trial.node),
            "State": "OFF" if name in off else well,
        }
        for one in kind.spreads:
            value = fleet.figure(trial, one.name)
            row[f"{one.title} ({one.unit})"] = "not measured" if value is None else number(value)
        for key, (title, unit) in SENSORS.items():
            if key in kind.sensors:
                row[f"{title} ({unit})"] = _sensed(load.get(key))
        row["Held down by"] = ", ".join(map(str, load.get("throttle_reasons") or ())) or "–"
        rows.append(row)
    return rows


def _bits_rows(kind: Kind) -> list[dict[str, str]]:
    """One row a card, one column a backend: a hash of the bits that it gave, or several of what changed."""
    given = {fleet.card_name(trial): trial.data.get("bits") or {} for trial in kind.cards}
    backends = list(dict.fromkeys(backend for bits in given.values() for backend in bits))
    if not backends:
        return []
    return [{"Card": name, **{b: " / ".join(bits.get(b, ())) for b in backends}} for name, bits in given.items()]
