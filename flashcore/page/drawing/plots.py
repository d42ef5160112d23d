"""Figures from records: speed against sequence length beside plain kernels, and the latency of small problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import escape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from flashcore.decision import compare
from flashcore.decision.compare import number
from flashcore.page.drawing.html_tables import by_problem, nothing
from flashcore.page.drawing.svg import COLOURS, FONT_SIZE, figure_html, named, style, titled, with_tips
from flashcore.problem import Problem
from flashcore.records import Trial

__all__ = ["figure_html", "latency_figure", "latency_html", "panels", "point_words", "tflops_figure", "tflops_html"]

MARKERS = ("o", "s", "D", "^", "v", "P")
PEER_DASHES = ((0, (4, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
SMALL_FLOPS = 5e9
"""A GPU problem with less work than this is small: its time is mostly latency."""

LETTER = 0.0165
"""Width of a letter of a bold label, as a share of a figure's width."""


LINE = 4
"""Lengths that make a line, beside which a single point would be clutter."""


def panels(trials: Sequence[Trial]) -> dict[tuple[int, bool, str], dict[str, dict[int, Trial]]]:
    """Timings for the plots: ``{(head_dim, causal, dtype): {backend: {seqlen: trial}}}``.

    Self-attention with equal heads and lengths, without masks besides `causal` and without `batch_invariant`, only; at
    each length the problem with the most work that was timed, the same one for every backend. Where some make a line,
    the table alone has what would be clutter beside it: a backend timed at one length, a panel of few lengths, and
    lengths between those of a line, such as 197.
    """
    chosen: dict[tuple[int, bool, str], dict[int, Problem]] = {}
    timed = [
        t for t in trials
        if compare.tflops(t) is not None and t.backend not in compare.FOR_CHECKS and compare.in_ordinary_mode(t)
    ]  # fmt: skip
    for trial in timed:
        p = trial.problem
        if p.seqlen_q != p.seqlen_k or p.num_heads_q != p.num_heads_kv or p.masks:
            continue
        lengths = chosen.setdefault((p.head_dim, p.causal, p.dtype), {})
        if p.seqlen_q not in lengths or p.flops() > lengths[p.seqlen_q].flops():
            lengths[p.seqlen_q] = p
    found: dict[tuple[int, bool, str], dict[str, dict[int, Trial]]] = {}
    for trial in timed:
        p = trial.problem
        key = (p.head_dim, p.causal, p.dtype)
        if compare.same_problem(chosen.get(key, {}).get(p.seqlen_q), p):
            found.setdefault(key, {}).setdefault(trial.backend or "unnamed", {})[p.seqlen_q] = trial
    for key, lines in found.items():
        if len({s for points in lines.values() for s in points if _doubles(s)}) >= LINE:
            lines = {name: {s: t for s, t in points.items() if _doubles(s)} for name, points in lines.items()}
        if max(map(len, lines.values())) >= LINE:
            found[key] = {backend: points for backend, points in lines.items() if len(points) > 1}
    if len(found) > 1 and any(len(_lengths(lines)) >= LINE for lines in found.values()):
        found = {key: lines for key, lines in found.items() if len(_lengths(lines)) >= LINE}
    return {key: found[key] for key in sorted(found)}


def _doubles(length: int) -> bool:
    """Whether a length is a power of two, as those of a line are."""
    return length & (length - 1) == 0


def _lengths(lines: Mapping[str, Mapping[int, Trial]]) -> set[int]:
    return {length for points in lines.values() for length in points}


def point_words(trial: Trial) -> str:
    """What a plotted timing is, in words: backend, median with its interval, speed, middle of the samples, count."""
    within, middle = compare.interval_us(trial), compare.spread(compare.samples_us(trial))
    parts = [f"{trial.backend or 'unnamed'}: {number(compare.latency_us(trial))} µs"]
    parts += [f"{number(compare.tflops(trial))} TFLOPS"]
    parts += [f"the median within {compare.between(within)} µs"] if within else ["too few samples for an interval"]
    parts += [f"9 of 10 samples within {compare.between(middle)} µs"] if middle else []
    return f"{', '.join(parts)}; n {len(compare.samples_us(trial))}"


def tflops_figure(
    lines: Mapping[str, Mapping[int, Trial]], *, ceilings: Sequence[Trial] = (), top: float | None = None
) -> Figure:
    """TFLOPS against sequence length, one line a backend, labelled at its end, beside a plain product.

    Parameters
    ----------
    lines
        One value of `panels`.
    ceilings
        Trials of kind `ceiling`: what a plain matrix product and a plain copy reached in the same run.
    top
        Upper end of the axis in TFLOPS, for panels that share it.
    """
    lengths = sorted({s for points in lines.values() for s in points})
    with style():
        figure = Figure(figsize=(6.6, 3.9))
        longest = max(len(named(backend)) for backend in lines)
        room = max(0.25, LETTER * (longest + len(" 99.9")))  # for the labels at the ends of the lines
        axes = figure.add_axes((0.105, 0.135, 0.895 - room, 0.80))
        ends: list[tuple[float, str, str, bool]] = []
        looks = _looks(lines)
        for backend, points in lines.items():
            ours, colour, marker, dashes = looks[backend]
            xs = sorted(points)
            ys = [compare.tflops(points[s]) for s in xs]
            (line,) = axes.plot(
                xs, ys, color=colour, marker=marker, linestyle=dashes, linewidth=2.4 if ours else 1.4,
                markersize=6 if ours else 5, markerfacecolor=colour if ours else "none", zorder=4 if ours else 3,
            )  # fmt: skip
            with_tips(line, [f"S={s}, {point_words(points[s])}" for s in xs])
            ends.append((ys[-1], f"{named(backend)} {number(ys[-1])}", colour, ours))
        plain = _plain(lines, ceilings)
        if plain:
            axes.plot(lengths, [plain[s] for s in lengths], color=COLOURS["ink"], linewidth=1.0, zorder=2)
            ends.append((plain[lengths[-1]], f"product {number(plain[lengths[-1]])}", COLOURS["ink"], False))
        limit = top or 1.08 * max(y for y, *_ in ends)
        axes.set_ylim(0, limit)
        axes.set_xscale("log", base=2)
        pad = 1.25
        axes.set_xlim(lengths[0] / pad, lengths[-1] * pad)
        axes.set_xticks(lengths)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _length(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.grid(False)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("Sequence length")
        axes.set_ylabel("TFLOPS")
        gap = limit * 0.075
        places = _apart([y for y, *_ in ends], gap, limit)
        for (y, text, colour, ours), place in zip(ends, places, strict=True):
            axes.annotate(
                text, xy=(lengths[-1] * 1.06, y), xytext=(lengths[-1] * pad * 1.03, place), color=colour,
                va="center", ha="left", fontsize=FONT_SIZE - 0.5, fontweight="bold" if ours else "normal",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": COLOURS["grid"], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2},
            )  # fmt: skip
        return figure


def tflops_html(trials: Sequence[Trial], *, caption: str = "") -> str:
    """The small multiples: one panel for each head_dim, causal or not, on one scale."""
    groups = panels([t for t in trials if not _is_small(t)] or trials)
    if not groups:
        return nothing("No timing is in these records, so there is no speed to plot.")
    ceilings = [t for t in trials if t.kind == "ceiling" and t.status == "ok"]
    values = [compare.tflops(t) for g in groups.values() for points in g.values() for t in points.values()]
    values += [max(r.values()) for g in groups.values() if (r := _plain(g, ceilings))]
    figures = []
    for (head_dim, causal, dtype), lines in groups.items():
        title = f"head_dim {head_dim}, {'causal' if causal else 'not causal'}, {dtype}"
        figure = tflops_figure(lines, ceilings=ceilings, top=1.08 * max(values))
        message = tflops_message(lines, ceilings)
        alt = f"Line plot, TFLOPS against sequence length, {title}. {message}"
        figures.append(titled(figure, title, message, alt))
    below = caption or (
        "Ours are coloured, with filled markers; peers are grey and dashed, with open ones. "
        "The figure behind each name is at the greatest length. Causal problems count half the operations."
        + (
            " Product: what a plain matrix product reached in this run, or a plain copy where that binds. It is no "
            "limit: a kernel that draws less power runs at a higher clock."
            if ceilings
            else ""
        )
    )
    return f'<div class="fc-grid">{"".join(figures)}</div><p class="fc-note">{escape(below)}</p>'


def tflops_message(lines: Mapping[str, Mapping[int, Trial]], ceilings: Sequence[Trial] = ()) -> str:
    """What one panel says, in words and numbers."""
    last = max(s for points in lines.values() for s in points)
    at_end = {b: compare.tflops(points[last]) for b, points in lines.items() if last in points}
    ours = {b: v for b, v in at_end.items() if compare.contends(lines[b][last])}
    peers = {b: v for b, v in at_end.items() if compare.role(lines[b][last]) == "peer"}
    parts = []
    if ours:
        best = max(ours, key=ours.get)
        parts.append(f"At {_length(last)}, {best} reaches {number(ours[best])} TFLOPS")
    if peers:
        best = max(peers, key=peers.get)
        start = "the best peer" if parts else f"At {_length(last)}, the best peer"
        parts.append(f"{start}, {best}, {number(peers[best])}")
    if not parts:
        best = max(at_end, key=at_end.get)
        parts.append(f"At {_length(last)}, {best} reaches {number(at_end[best])} TFLOPS")
    plain = _plain(lines, ceilings)
    if plain:
        parts.append(f"a plain matrix product, {number(plain[last])}")
    return "; ".join(parts) + "."


def latency_figure(group: Sequence[Trial], *, target_us: float | None = None) -> Figure:
    """A dot a backend on a logarithmic axis of µs, a bar over the middle 90 % of samples, the target as a line."""
    trials = sorted((t for t in group if compare.latency_us(t) is not None), key=compare.latency_us)
    with style():
        figure = Figure(figsize=(6.6, 0.95 + 0.42 * len(trials)))
        height = 0.95 + 0.42 * len(trials)
        room = max(0.19, LETTER * max(len(named(t.backend or "unnamed")) for t in trials) + 0.01)  # for the names
        axes = figure.add_axes((room, 0.62 / height, 0.89 - room, 1 - 0.92 / height))
        values = []
        looks = _looks({t.backend or "unnamed": {0: t} for t in trials})
        for row, trial in enumerate(trials):
            ours, colour, marker, _ = looks[trial.backend or "unnamed"]
            value = compare.latency_us(trial)
            low, high = compare.spread(compare.samples_us(trial)) or (value, value)
            values += [low, high, value]
            axes.plot([low, high], [row, row], color=colour, linewidth=2.5, solid_capstyle="round")
            (dot,) = axes.plot(
                [value], [row], color=colour, marker=marker, markersize=8, markerfacecolor=colour if ours else "none"
            )
            with_tips(dot, [point_words(trial)])
            axes.annotate(
                number(value), xy=(high, row), xytext=(9, 0), textcoords="offset points", va="center", ha="left",
                color=colour, fontweight="bold" if ours else "normal", annotation_clip=False,
            )  # fmt: skip
        if target_us is not None:
            values.append(target_us)
            axes.axvline(target_us, color=COLOURS["target"], linewidth=1.6, linestyle=(0, (5, 2)))
            axes.annotate(
                f"target {target_us:g} µs", xy=(target_us, 1), xycoords=("data", "axes fraction"),
                xytext=(0, 4), textcoords="offset points", ha="center", va="bottom", color=COLOURS["target"],
                annotation_clip=False,
            )  # fmt: skip
        low, high = min(values) / 1.35, max(values) * 1.35
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(_log_ticks(low, high))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(len(trials) - 0.4, -0.6)
        axes.set_yticks(range(len(trials)), [named(t.backend or "unnamed") for t in trials])
        axes.tick_params(axis="y", length=0)
        axes.yaxis.grid(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("µs a call, logarithmic")
        return figure


def latency_html(
    trials: Sequence[Trial], *, target_us: float | None = None, target_problem: Problem | None = None
) -> str:
    """A dot plot for each small problem, the target drawn on the problem it was set for."""
    small = [t for t in trials if _is_small(t) and compare.latency_us(t) is not None]
    figures = []
    for label, group in by_problem(small).items():
        target = target_us if compare.same_problem(group[0].problem, target_problem) else None
        best = min(group, key=compare.latency_us)
        message = f"{best.backend} is fastest with {number(compare.latency_us(best))} µs"
        ours = [t for t in group if compare.contends(t)]
        if ours and compare.role(best) != "ours":
            mine = min(ours, key=compare.latency_us)
            message += f"; of ours {mine.backend} takes {number(compare.latency_us(mine))} µs"
        if target is not None:
            met = [str(t.backend) for t in group if compare.latency_us(t) <= target]
            once = met == [best.backend] and compare.role(best) == "ours"  # it was just named, and nobody after it
            whose = "," if once else f"; {', '.join(met) or 'none'}"
            message += f"{whose} within the target of {target:g} µs"
        alt = f"Dot plot, µs a call, {label}. {message}."
        figures.append(titled(latency_figure(group, target_us=target), label, f"{message}.", alt))
    if not figures:
        return nothing("No small problem was timed in these records, so there is no latency to plot.")
    return f'<div class="fc-grid">{"".join(figures)}</div>'


def small_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The timings of problems small enough that latency is what counts."""
    return [t for t in trials if _is_small(t)]


def _is_small(trial: Trial) -> bool:
    if trial.kind != "attention_timing" or trial.problem is None or trial.timing is None:
        return False
    if not compare.in_ordinary_mode(trial):
        return False
    return trial.timing.method != "host" and trial.timing.l2 == "warm" and trial.problem.flops() < SMALL_FLOPS


def _looks(lines: Mapping[str, Mapping[int, Trial]]) -> dict[str, tuple[bool, str, str, object]]:
    """For each backend: whether it is ours, its colour, marker and dashes."""
    fixed = {"wmma": 0, "scalar": 1, "cpu": 2}
    looks, ours_seen, peers_seen = {}, 3, 0
    for backend in sorted(lines):
        trial = next(iter(lines[backend].values()))
        if compare.role(trial) == "ours":
            index = fixed.get(backend)
            if index is None:
                index, ours_seen = ours_seen, ours_seen + 1
            looks[backend] = (True, COLOURS[f"s{index % 6 + 1}"], MARKERS[index % len(MARKERS)], "-")
        else:
            known = sorted(compare.PEERS)
            index = known.index(backend) if backend in known else len(known) + peers_seen
            peers_seen += backend not in known
            marker = MARKERS[::-1][index % len(MARKERS)]
            looks[backend] = (False, COLOURS[f"p{index % 4 + 1}"], marker, PEER_DASHES[index % len(PEER_DASHES)])
    return looks


def _plain(lines: Mapping[str, Mapping[int, Trial]], ceilings: Sequence[Trial]) -> dict[int, float]:
    """TFLOPS of plain kernels, by length: the lower of the matrix product and bandwidth times FLOPs a byte."""
    values = {str(t.data.get("name")): t.data for t in ceilings if compare.is_figure(t.data.get("value"))}
    problems = {s: t.problem for points in lines.values() for s, t in points.items()}
    kind = {"float16": "matmul_fp16", "bfloat16": "matmul_bf16", "float32": "matmul_fp32"}
    product = values.get(kind[next(iter(problems.values())).dtype])
    if product is None or not product["value"] > 0 or product.get("unit") != "TFLOPS":
        return {}
    copy = values.get("copy_bandwidth")
    bytes_a_second = None
    if copy and copy["value"] > 0 and copy.get("unit") in ("TB/s", "GB/s"):
        bytes_a_second = copy["value"] * {"TB/s": 1e12, "GB/s": 1e9}[copy["unit"]]
    plain = {}
    for length, problem in problems.items():
        memory = problem.flops() / problem.bytes() * bytes_a_second / 1e12 if bytes_a_second else math.inf
        plain[length] = min(float(product["value"]), memory)
    return plain


def _apart(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Places for labels: as near as wanted, `gap` apart, none above `top`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [wanted[i] for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    over = places[-1] - top
    if over > 0:
        places[-1] -= over
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    result = [0.0] * len(wanted)
    for position, index in enumerate(order):
        result[index] = places[position]
    return result


def _length(value: float) -> str:
    value = round(value)
    return f"{value // 1024}K" if value >= 1024 and value % 1024 == 0 else str(value)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    return [tick for d in decades for m in steps if low <= (tick := m * 10.0**d) <= high]
