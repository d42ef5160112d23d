"""History on the page: what changed since the run before, and the trend of many runs as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import escape

from flashcore.decision import compare
from flashcore.decision.compare import number
from flashcore.decision.gates import load_gates
from flashcore.errors import FlashCoreError
from flashcore.page.drawing import html_tables, plots
from flashcore.page.drawing.svg import COLOURS, FONT_SIZE, named, style, titled, with_tips
from flashcore.page.history.comparing import Comparison, signed
from flashcore.page.history.runs import Snapshot, newest, previous, read
from flashcore.page.history.since import Since, since
from flashcore.page.history.timings import Row
from flashcore.page.history.trend import Point, trend
from flashcore.records import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 12
"""Lines of a list on the page; the rest are counted."""
MOST_DATES = 6
MOST_RUNS = 12
"""Runs that the trend on a page goes back."""
MOST_LINES = 3
"""Backends of ours that the caption of a trend names."""
NOTHING_WORSE = (
    "Nothing: no timing of ours is slower by more than 3 % with separated intervals, and no check fails anew."
)


def since_last_run(run: RunFolder) -> Since | None:
    """What changed since the run before; None when no such run is known, or when it cannot be read."""
    try:
        before = previous(run)
        return since(read(run), before, gates=load_gates()) if before is not None else None
    except FlashCoreError:  # a page is worth having without its history
        return None


def since_body(found: Since) -> str:
    """What changed, in words: figures, what became worse, what else changed, and every row folded away."""
    comparison, before = found.comparison, found.before
    parts = [
        f'<p class="fc-lead">Compared with <code>{escape(before.name)}</code> of {escape(before.day)} on '
        f"{escape(before.machine or 'a machine that is not known')}. {escape(comparison.summary)}</p>",
    ]
    if found.deltas:
        rows = [
            {"Figure": _TITLES.get(d.metric, d.metric), "Then": f"{number(d.before)} {d.unit}",
             "Now": f"{number(d.now)} {d.unit}", "In words": d.sentence}
            for d in found.deltas.values()
        ]  # fmt: skip
        parts.append(html_tables.table_html(rows, "The headline figures, then and now", numeric=["Then", "Now"]))
    worse = comparison.regressions
    parts.append("<h3>What became worse</h3>")
    parts.append(_list(worse) if worse else html_tables.nothing(NOTHING_WORSE))
    other = [d.sentence for d in comparison.differences if not d.regression]
    if other:
        parts += ["<h3>What else changed</h3>", _list(other)]
    if comparison.limits:
        parts += ["<h3>How far this comparison goes</h3>", _list(comparison.limits)]
    table = rows_table(comparison)
    if table:
        parts.append(html_tables.fold("Every timing of ours", table))
    return "".join(parts)


_TITLES = {
    "tflops": "Speed at the workload that decides",
    "ratio_to_best_peer": "Against the best peer",
    "latency_us": "Latency of a small call",
    "correct_percent": "Checks that are right",
}


def rows_table(comparison: Comparison) -> str:
    """One row a backend of ours and problem; empty text when there is none."""
    rows = [
        {
            "Backend": row.backend,
            "Problem": row.problem.replace(",", ", "),
            "In words": f"{row.word}{'; other kernel source' if row.other_source else ''}",
            "Change of speed": _percent(row),
            "99 % interval": _interval(row),
            "Compared": f"relative to {row.peer}" if row.basis == "relative" else row.note or row.basis,
            "µs then": number(row.before_us),
            "µs now": number(row.now_us),
        }
        for row in comparison.rows
        if row.role == "ours"
    ]
    if not rows:
        return ""
    drift = ", ".join(f"{value:.1f} % ({basis})" for basis, value in comparison.drift_percent.items())
    note = (
        "Speed: the ratio to the peer of the same round where there is one. µs are medians, and hold the clocks and "
        "the heat of their day too. Intervals are bootstrapped from the samples of each run"
        + (f" and widened by how far unchanged peers moved: {drift}." if drift else ".")
    )
    numeric = ["Change of speed", "99 % interval", "µs then", "µs now"]
    return html_tables.table_html(rows, "Timings of ours, then and now", numeric=numeric, note=note)


def trend_figure(points: Sequence[Point]) -> Figure:
    """TFLOPS of each backend from run to run, a bar over the middle 90 % of its samples.

    Runs stand in the order of their dates, evenly spaced, since several of one day would lie on each other.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point.backend, []).append(point)
    runs = list(dict.fromkeys((p.date, p.run) for p in points))
    places = {run: place for place, run in enumerate(runs)}
    with style():
        figure = Figure(figsize=(6.6, 3.9))
        longest = max(len(named(name)) for name in lines)
        room = max(0.25, plots.LETTER * (longest + len(" 99.9")))  # for the labels at the ends
        axes = figure.add_axes((0.105, 0.135, 0.895 - room, 0.80))
        looks = plots._looks({name: {0: group[0].trial} for name, group in lines.items()})
        ends, greatest = [], 0.0
        for name, group in lines.items():
            ours, colour, marker, dashes = looks[name]
            xs, ys = [places[p.date, p.run] for p in group], [p.tflops for p in group]
            for x, point in zip(xs, group, strict=True):
                bounds = compare.spread(compare.samples_us(point.trial))
                if bounds is not None:
                    rates = [point.trial.problem.flops() / us / 1e6 for us in bounds]
                    if math.isfinite(sum(rates)):
                        axes.plot([x, x], rates, color=colour, linewidth=1.2, zorder=3)
                        greatest = max(greatest, *rates)
            (line,) = axes.plot(
                xs, ys, color=colour, marker=marker, linestyle=dashes, linewidth=2.4 if ours else 1.4,
                markersize=6 if ours else 5, markerfacecolor=colour if ours else "none", zorder=4 if ours else 3,
            )  # fmt: skip
            with_tips(line, [f"{p.run}, {p.day}, {plots.point_words(p.trial)}" for p in group])
            ends.append((xs[-1], ys[-1], f"{named(name)} {number(ys[-1])}", colour, ours))
            greatest = max(greatest, *ys)
        last, limit = len(runs) - 1, 1.08 * greatest
        axes.set_ylim(0, limit)
        axes.set_xlim(-0.3, last + 0.3)
        step = -(-len(runs) // MOST_DATES)
        ticks = list(range(0, len(runs), step))
        one_day = len({date[:10] for date, _ in runs}) == 1 and len(runs) > 1 and runs[0][0]
        axes.set_xticks(ticks, [runs[t][0][slice(11, 16) if one_day else slice(5, 10)] or "?" for t in ticks])
        axes.xaxis.grid(False)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(f"Runs of {runs[0][0][:10]}, by time (UTC)" if one_day else "Runs, by month and day")
        axes.set_ylabel("TFLOPS")
        for (x, y, text, colour, ours), place in zip(
            ends, plots._apart([y for _, y, *_ in ends], limit * 0.075, limit), strict=True
        ):
            axes.annotate(
                text, xy=(x + 0.05, y), xytext=(last + 0.4, place), color=colour, va="center", ha="left",
                fontsize=FONT_SIZE - 0.5, fontweight="bold" if ours else "normal", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": COLOURS["grid"], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2},
            )  # fmt: skip
        return figure


def trend_html(machines: Mapping[str, Sequence[Point]]) -> str:
    """A figure for each machine that has at least two runs of the problem."""
    figures = []
    for machine, points in machines.items():
        if len({p.run for p in points}) < 2:
            continue
        message = trend_message(points)
        title = f"{machine}, {html_tables.spaced(points[0].trial.problem)}"
        alt = f"Line plot, TFLOPS from run to run, {title}. {message}"
        figures.append(titled(trend_figure(points), title, message, alt))
    if not figures:
        return html_tables.nothing(
            "There are no two runs of one machine that timed this problem, so there is no trend."
        )
    return f'<div class="fc-grid">{"".join(figures)}</div>'


def trend_beside(run: RunFolder) -> str:
    """The trend of a run's machine over the newest runs of its folder, up to this one; empty with fewer than two."""
    own = Snapshot(run.name, (), run.environment())
    try:
        runs = [
            s
            for s in newest(run.path.resolve().parent, MOST_RUNS)
            if s.machine == own.machine and (s.date < own.date or s.name == own.name)
        ]
    except FlashCoreError:  # as for the run before
        return ""
    points = trend(runs).get(own.machine or "", [])
    if len({p.run for p in points}) < 2:
        return ""
    return f"<h3>From run to run</h3>{trend_html({str(own.machine): points})}"


def trend_message(points: Sequence[Point]) -> str:
    """What one figure says, in words and numbers: where each backend of ours and the fastest peer began and ended."""
    first: dict[str, Point] = {}
    last: dict[str, Point] = {}
    for point in points:
        first.setdefault(point.backend, point)
        last[point.backend] = point
    ours = [n for n, p in last.items() if compare.role(p.trial) == "ours"]
    peers = [n for n, p in last.items() if compare.role(p.trial) == "peer"]
    best = max(peers, key=lambda n: last[n].tflops, default=None)
    days = [points[0].day, points[-1].day]
    span = f"{len({p.run for p in points})} runs, {days[0]}" + (f" to {days[1]}" if days[1] != days[0] else "")
    parts = []
    fastest = sorted(ours, key=lambda n: -last[n].tflops)
    for name in [*fastest[:MOST_LINES], *([best] if best else [])]:
        a, b = first[name], last[name]
        moved = f"{number(a.tflops)}, then {number(b.tflops)} TFLOPS" if a is not b else f"{number(b.tflops)} TFLOPS"
        parts.append(f"{name} {moved} ({b.word}{', other kernel source' if b.other_source else ''})")
    if len(ours) > MOST_LINES:
        parts.append(f"and {len(ours) - MOST_LINES} more of ours below them")
    return f"{span}. {'; '.join(parts)}. A word in brackets holds the last run against the one before it."


def _list(sentences: Sequence[str]) -> str:
    shown = [f"<li>{escape(s)}</li>" for s in sentences[:MOST_ROWS]]
    if len(sentences) > MOST_ROWS:
        shown.append(f"<li>and {len(sentences) - MOST_ROWS} more; <code>flashcore compare</code> lists them.</li>")
    return f"<ul>{''.join(shown)}</ul>"


def _percent(row: Row) -> str:
    return "–" if row.percent is None else f"{signed(row.percent)} %"


def _interval(row: Row) -> str:
    if row.interval_percent is None:
        return "–"
    return f"{signed(row.interval_percent[0])} to {signed(row.interval_percent[1])} %"
