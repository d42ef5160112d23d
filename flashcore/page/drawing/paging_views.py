"""Draw a survey of paging from its records: decode time, accuracy, memory, tokens a second; each defined in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from flashcore.decision import compare
from flashcore.decision.compare import number
from flashcore.page.drawing import serving_views
from flashcore.page.drawing.html_tables import Unmeasured, fold, gathered, percent, spaced, table_html
from flashcore.page.drawing.svg import COLOURS, FONT_SIZE, style, titled, with_tips
from flashcore.records import Trial
from flashcore.surveys.paging import facts
from flashcore.surveys.paging.facts import MEMORY_WORDS, POLICY_WORDS, Decode

if TYPE_CHECKING:
    from flashcore.decision.evidence import Evidence

COMMAND = "flashcore paging"
"""What measures all of this section."""
MEMORY = "Memory of the K/V cache"
LOOKS = {"top_k": ("s1", "o"), "sink_window": ("s2", "^")}
SHOWN_SHARE = 0.3
"""Of the pages: what the sentences are about."""
PATTERN_WORDS = {
    "peaked": "peaked: 16 keys hold 0.9 of the attention", "diffuse": "diffuse: every key counts about alike",
    "drifting": "drifting: recent keys count most", "needle": "needle: one old key holds 0.9",
    "needle, spread thin": "needle spread over all channels, where key bounds cannot see it",
}  # fmt: skip


def paging_html(evidence: Evidence) -> str:
    """The section 'Sparse paging': GPU figures from the run or the recorded one, and what needs no GPU from either."""
    trials = evidence_trials(evidence)
    parts = [
        serving_views.serving_html(trials), serving_views.shapes_html(trials), serving_views.further_html(trials),
        memory_html(trials), decode_html(trials), tokens_html(trials), accuracy_html(trials), troubles_html(trials),
    ]  # fmt: skip
    details = gathered([correctness_html(trials), other_times_html(trials), accuracy_table(trials)])
    title = "Prefill, append, correctness of the paged kernels, and every accuracy figure"
    return source_html(evidence) + gathered(parts) + fold(title, details)


def source_html(evidence: Evidence) -> str:
    """Which of the figures are this machine's own, when it has no GPU; empty otherwise."""
    there = {t.data.get("what") for t in facts.paging_trials(evidence.gpu_trials)}
    own = [w for w in facts.WITHOUT_GPU if w not in there and facts.paging_trials(evidence.trials, w)]
    if evidence.recorded is None or not own:
        return ""
    words = f"Measured live on this machine, which has no GPU and needs none for it: {', '.join(own)}."
    return f'<p class="fc-note">{escape(words)}</p>'


def evidence_trials(evidence: Evidence) -> list[Trial]:
    """Paging records to show: those of the GPU evidence; of what it lacks and any machine can tell, this run's own."""
    found = facts.paging_trials(evidence.gpu_trials)
    if evidence.recorded is None:
        return found
    there = {t.data.get("what") for t in found}
    return found + [
        t for what in facts.WITHOUT_GPU if what not in there for t in facts.paging_trials(evidence.trials, what)
    ]


# ------------------------------------------------------------------------------------------------ memory


def memory_html(trials: Sequence[Trial]) -> str:
    """Bars of what paging keeps against dense caches, and the definitions in a table."""
    found = [t for t in facts.measured(trials, "memory", "case") if t.data.get("baseline_bytes")]
    if not found:
        return Unmeasured("memory of a paged cache", command=COMMAND)
    saved = [(MEMORY_WORDS.get(t.data["case"], t.data["case"]), t.data["saved_percent"]) for t in found]
    message = "; ".join(f"{name}: {_saved(value)}" for name, value in saved)
    with style():
        height = 1.0 + 0.62 * len(found)
        figure = Figure(figsize=(6.6, height))
        axes = figure.add_axes((0.25, 0.62 / height, 0.70, 1 - 0.72 / height))
        for place, trial in enumerate(found):
            kept, dense = trial.data["resident_bytes"] / 2**30, trial.data["baseline_bytes"] / 2**30
            axes.barh(place - 0.19, dense, 0.32, color="none", edgecolor=COLOURS["p1"], linewidth=1.4)
            axes.barh(place + 0.19, kept, 0.32, color=COLOURS["s1"], linewidth=0)
            axes.annotate(_saved(trial.data["saved_percent"]), xy=(kept, place + 0.19), xytext=(6, 0), va="center",
                          textcoords="offset points", color=COLOURS["s1"], fontweight="bold")  # fmt: skip
            word = trial.data.get("baseline", "dense")
            axes.annotate(word, xy=(0, place - 0.19), xytext=(6, 0), textcoords="offset points", va="center",
                          color=COLOURS["p1"], fontsize=FONT_SIZE - 2)  # fmt: skip
        axes.set_yticks(range(len(found)), [name for name, _ in saved])
        axes.set_ylim(len(found) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.yaxis.grid(False)
        top = max(t.data["baseline_bytes"] for t in found)
        room = max(t.data["resident_bytes"] + 0.55 * top for t in found)  # for the words behind a bar
        axes.set_xlim(0, max(1.05 * top, room) / 2**30)
        axes.set_xlabel("GiB of K and V, one layer: filled is paged")
    alt = f"Bar chart of memory, paged against dense caches. {message}."
    rows = [
        {
            "Case": MEMORY_WORDS.get(t.data["case"], t.data["case"]),
            "Saved": f"{t.data['saved_percent']:.1f} %".replace("-", "−"),
            "Pages hold": _bytes(t.data["resident_bytes"]), "Dense would": _bytes(t.data["baseline_bytes"]),
            "Table and bounds": _bytes(t.data.get("overhead_bytes", 0)),
            "What is counted": str(t.data.get("definition", "not said")),
        }
        for t in found
    ]  # fmt: skip
    note = (
        "How much is saved follows from how much the sequences share and how unlike their lengths are; where they "
        "share nothing, paging costs the empty part of each last page. No page is left out here: this saving loses "
        "nothing."
    )
    numeric = ["Saved", "Pages hold", "Dense would", "Table and bounds"]
    return titled(figure, "Memory saved depends on what is shared", f"{message}.", alt) + table_html(
        rows, MEMORY, numeric=numeric, note=note, stack=True
    )


def _saved(percent: float) -> str:
    return f"{percent:.1f} % saved" if percent >= 0 else f"costs {-percent:.1f} % more"


# ------------------------------------------------------------------------------------------------ decode


def decode_html(trials: Sequence[Trial]) -> str:
    """Decode time against the share of pages, one figure a shape, beside dense attention and the floor."""
    found = facts.decodes(trials)
    if not found:
        return Unmeasured("decode time against the share of pages", command=COMMAND)
    figures = []
    for one in found:
        message, label = decode_message(one), spaced(one.problem)
        alt = f"Line plot, µs of a decode step against the share of pages attended to, {label}. {message}"
        figures.append(titled(decode_figure(one), f"Decode, {label}", message, alt))
    note = (
        "One layer's attention for one new token a sequence, pages in shuffled order, caches rotated so that the L2 "
        "cache holds none of them; median of graph replays, interleaved with dense cuDNN over contiguous K and V. "
        "Choosing the pages is part of each time but that of 'all pages'. Floor: the bytes of K and V attended to, at "
        "the speed at which this GPU was measured to read memory in the same run."
    )
    return f'<div class="fc-grid">{"".join(figures)}</div><p class="fc-note">{escape(note)}</p>' + decode_table(found)


def decode_message(one: Decode) -> str:
    """What one shape's figure says."""
    parts = []
    if one.every:
        parts.append(f"All pages: {number(one.every.timing.latency_us)} µs")
        if one.every.data.get("of_floor"):
            parts[-1] += f", {100 * one.every.data['of_floor']:.0f} % of the speed of reading alone"
    if one.peer:
        parts.append(f"dense cuDNN: {number(one.peer.timing.latency_us)} µs{_beside_dense(one)}")
    some = one.nearest("top_k", SHOWN_SHARE)
    if some:
        share = f"{100 * some.data.get('pages_share', SHOWN_SHARE):.0f} % of the pages, chosen by key bounds"
        parts.append(f"{share}: {number(some.timing.latency_us)} µs")
        if some.data.get("of_dense"):
            parts[-1] += f", {number(some.data['of_dense'])} of the time with all"
    return "; ".join(parts) + "."


def _beside_dense(one: Decode) -> str:
    """How much longer or shorter a step over all pages takes than dense attention, where both were timed together."""
    ratio = one.every.data.get("over_peer") if one.every else None
    if not compare.is_figure(ratio) or ratio <= 0:
        return ""
    percent = 100 * (1 / ratio - 1)
    word = "longer" if percent > 0 else "less"
    return f", beside which all pages take {abs(percent):.1f} % {word}"


def decode_figure(one: Decode) -> Figure:
    """Lines by policy, a point for all pages, dense attention as a dashed line, the floor as a dotted one."""
    with style():
        figure = Figure(figsize=(6.6, 3.9))
        axes = figure.add_axes((0.12, 0.145, 0.86, 0.80))
        for policy, points in one.selected.items():
            colour, marker = LOOKS[policy]
            (line,) = axes.plot(
                [100 * t.data["pages_share"] for t in points], [t.timing.latency_us for t in points],
                marker=marker, color=COLOURS[colour], markersize=7, linewidth=1.8, label=POLICY_WORDS[policy],
            )  # fmt: skip
            with_tips(line, [_step_words(t, f"{100 * t.data['pages_share']:.0f} % of the pages") for t in points])
        if one.every:
            (dot,) = axes.plot([100], [one.every.timing.latency_us], "D", color=COLOURS["s3"], markersize=9,
                               label="all pages")  # fmt: skip
            with_tips(dot, [_step_words(one.every, "all pages")])
        if one.peer:
            value = one.peer.timing.latency_us
            axes.axhline(value, color=COLOURS["p1"], linewidth=1.5, linestyle=(0, (4, 2)), label="dense cuDNN")
        if one.floor_us:
            axes.plot([0, 100], [0, one.floor_us], color=COLOURS["target"], linewidth=1.5, linestyle=(0, (1, 1.6)),
                      label="floor")  # fmt: skip
        axes.set_xlim(0, 104)
        axes.set_ylim(0, None)
        axes.margins(y=0.1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlabel("Pages attended to, share of all")
        axes.set_ylabel("µs a step, one layer")
        top = max([t.timing.latency_us for ts in one.selected.values() for t in ts] + [
            t.timing.latency_us for t in (one.every, one.peer) if t])  # fmt: skip
        axes.set_ylim(0, 1.45 * top)  # room for the names
        axes.legend(frameon=False, loc="upper left", fontsize=FONT_SIZE - 1.5, ncols=2, columnspacing=1.2)
    return figure


def _step_words(trial: Trial, what: str) -> str:
    """What a plotted step is, in words: its median, and the quartiles that its record keeps."""
    timing = trial.timing
    quartiles = timing.more("quartiles_us")
    spread = f", half of the samples within {compare.between(quartiles)} µs" if quartiles else ""
    return f"{what}: {number(timing.latency_us)} µs{spread}"


def decode_table(found: Sequence[Decode]) -> str:
    """Every timing of every shape, folded."""
    rows = []
    for one in found:
        steps = [t for group in one.selected.values() for t in group]
        for trial in filter(None, [one.every, *steps, one.peer]):
            data, policy = trial.data, trial.data.get("policy")
            quartiles = trial.timing.more("quartiles_us") or ()
            rows.append({
                "Shape": spaced(one.problem), "How": POLICY_WORDS.get(policy, trial.variant or "–"),
                "By": trial.backend, "Pages": f"{100 * data.get('pages_share', 1):.0f} %",
                "µs": number(trial.timing.latency_us), "Quartiles": " to ".join(map(number, quartiles)) or "not known",
                "Floor, µs": number(data.get("floor_us")), "Of the floor's speed": percent(data.get("of_floor")),
                "Over all pages": _ratio(data.get("of_dense")), "Speed beside cuDNN": _ratio(data.get("over_peer")),
            })  # fmt: skip
    numeric = ["Pages", "µs", "Quartiles", "Floor, µs", "Of the floor's speed", "Over all pages", "Speed beside cuDNN"]
    table = table_html(rows, "Decode, every shape and selection", numeric=numeric)
    return fold("Every decode time", table)


# ------------------------------------------------------------------------------------------------ tokens a second


def tokens_html(trials: Sequence[Trial]) -> str:
    """Tokens a second of attention alone against the batch, one figure a model shape."""
    groups = facts.tokens_by_shape(trials)
    if not groups:
        return Unmeasured("tokens a second, attention only", command=COMMAND)
    figures = []
    for name, group in groups.items():
        message = tokens_message(group)
        alt = f"Line plot, tokens a second of attention only against the batch, shape {name}. {message}"
        title = f"Tokens a second, attention only: {'the report’s shape' if name == 'report' else 'a model’s shape'}"
        figures.append(titled(tokens_figure(group), title, message, alt))
    note = (
        "Attention only: batch / (layers x time of one layer's decode attention). No projection, no MLP, no sampling "
        "and no append is in it, so no server reaches it; it bounds what attention leaves room for."
    )
    return f'<div class="fc-grid">{"".join(figures)}</div><p class="fc-note">{escape(note)}</p>'


def tokens_message(group: Sequence[Trial]) -> str:
    """The stated batch's figure, with the shape it is of."""
    stated = next((t for t in group if t.data.get("stated")), group[-1])
    data = stated.data
    words = f"Batch {data['batch']}: {data['tokens_per_s']:,.0f} tokens/s with all pages"
    if data.get("sparse_tokens_per_s"):
        words += f", {data['sparse_tokens_per_s']:,.0f} with {100 * data['sparse_share']:.0f} % of them"
    shape = str(data.get("definition", f", , {data.get('layers')} layers")).split(", ", 2)[-1].split(":")[0]
    return f"{words} (attention only; {shape})."


def tokens_figure(group: Sequence[Trial]) -> Figure:
    """All pages, and the share selected, on logarithmic axes."""
    with style():
        figure = Figure(figsize=(6.6, 3.7))
        axes = figure.add_axes((0.20, 0.15, 0.78, 0.80))
        batches = [t.data["batch"] for t in group]
        tips = [_rate_words(t, "all pages", t.data["tokens_per_s"]) for t in group]
        _line(axes, batches, [t.data["tokens_per_s"] for t in group], "s3", "D", "all pages", tips)
        some = [t for t in group if t.data.get("sparse_tokens_per_s")]
        if some:
            label = f"{100 * some[0].data['sparse_share']:.0f} % of the pages, choice included"
            rates = [t.data["sparse_tokens_per_s"] for t in some]
            tips = [_rate_words(t, label, rate, spread=False) for t, rate in zip(some, rates, strict=True)]
            _line(axes, [t.data["batch"] for t in some], rates, "s1", "o", label, tips)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(batches, list(map(str, batches)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("Batch, sequences")
        axes.set_ylabel("Tokens/s, attention only")
        axes.legend(frameon=False, loc="lower right", fontsize=FONT_SIZE - 1)
    return figure


def _line(axes: Axes, x: list, y: list, colour: str, marker: str, label: str, tips: list[str]) -> None:
    (line,) = axes.plot(x, y, marker=marker, color=COLOURS[colour], markersize=7, linewidth=1.8, label=label)
    with_tips(line, tips)


def _rate_words(trial: Trial, what: str, rate: float, *, spread: bool = True) -> str:
    """What a plotted rate is, in words; the quartiles that its record keeps are of the step over all pages."""
    quartiles = trial.timing.more("quartiles_us") if spread and trial.timing else None
    within = ""
    if quartiles and all(quartiles):
        low, high = (rate * trial.timing.latency_us / q for q in reversed(quartiles))
        within = f", half of the samples within {low:,.0f} to {high:,.0f}"
    return f"{what}, batch {trial.data['batch']}: {rate:,.0f} tokens/s{within}"


# ------------------------------------------------------------------------------------------------ accuracy


def accuracy_html(trials: Sequence[Trial]) -> str:
    """Attention recalled at the shown share of pages: a mark a policy and pattern, LOST in words where it is lost."""
    found = facts.measured(trials, "accuracy", "pattern", "policy", "share")
    shown = [t for t in found if t.data.get("share") == SHOWN_SHARE] or found
    if not shown:
        return Unmeasured("what leaving pages out loses", command=COMMAND)
    patterns = list(dict.fromkeys(t.data["pattern"] for t in shown))
    with style():
        height = 1.25 + 0.62 * len(patterns)
        figure = Figure(figsize=(6.6, height))
        axes = figure.add_axes((0.27, 0.62 / height, 0.69, 1 - 1.05 / height))
        for trial in shown:
            colour, marker = LOOKS.get(trial.data["policy"], ("s4", "s"))
            place = patterns.index(trial.data["pattern"]) + (-0.17 if trial.data["policy"] == "top_k" else 0.17)
            least, mean = 100 * trial.data["mass_least"], 100 * trial.data["mass_mean"]
            axes.plot([least, mean], [place, place], color=COLOURS[colour], linewidth=2.2)
            (dot,) = axes.plot([mean], [place], marker=marker, color=COLOURS[colour], markersize=8)
            policy = POLICY_WORDS.get(trial.data["policy"], trial.data["policy"])
            with_tips(dot, [f"{policy}: {mean:.0f} % of the attention on average, {least:.0f} % at least"])
            if trial.data["pattern"].startswith("needle"):
                word, side = facts.verdict_on_needle(trial).replace(" queries", ""), 1 if mean < 75 else -1
                at = mean if side > 0 else least
                beside = side > 0 or least > 45  # else no room is left of the line, and the word stands on it
                axes.annotate(word, xy=(at if beside else mean, place), xytext=(9 * side, 0) if beside else (0, 5),
                              textcoords="offset points", va="center" if beside else "bottom",
                              ha="left" if side > 0 else "right", color=COLOURS["target" if "LOST" in word else "s3"],
                              fontsize=FONT_SIZE - 2, fontweight="bold")  # fmt: skip
        for policy, (colour, marker) in LOOKS.items():
            axes.plot([], [], marker=marker, color=COLOURS[colour], markersize=8, linestyle="",
                      label=POLICY_WORDS[policy])  # fmt: skip
        axes.set_yticks(range(len(patterns)), [p.replace(", ", ",\n") for p in patterns])
        axes.set_ylim(len(patterns) - 0.5, -0.5)
        axes.set_xlim(-3, 103)
        axes.tick_params(axis="y", length=0)
        axes.yaxis.grid(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlabel("Attention recalled: mark mean, line to the least")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.38, 1.0), ncols=2, fontsize=FONT_SIZE - 1.5,
                    columnspacing=1.0, handletextpad=0.3)  # fmt: skip
    message, share = accuracy_message(shown), 100 * shown[0].data["share"]
    alt = f"Dot plot, attention recalled with {share:g} % of the pages, by pattern and policy. {message}"
    note = (
        "Constructed patterns, judged in float64: "
        + "; ".join(PATTERN_WORDS.get(p, p) for p in patterns)
        + ". Recalled: the share of the dense softmax that falls on keys selected. Lost: a query with less than half "
        "of it answers from other keys than dense attention does."
    )
    title = f"What {share:g} % of the pages keep of attention"
    return titled(figure, title, message, alt) + f'<p class="fc-note">{escape(note)}</p>'


def accuracy_message(shown: Sequence[Trial]) -> str:
    """Which policy keeps the needle, and how far the outputs are off, in words."""
    parts = []
    for trial in shown:
        if trial.data["pattern"] in ("needle", "needle, spread thin"):
            where = "the needle" if trial.data["pattern"] == "needle" else "one spread over all channels"
            policy = POLICY_WORDS.get(trial.data["policy"], trial.data["policy"])
            word = facts.verdict_on_needle(trial)
            parts.append(f"{policy}: {where} {word}, output off by {100 * trial.data['error_mean']:.0f} %")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else "No needle was tried."


def accuracy_table(trials: Sequence[Trial]) -> str:
    """Every pattern, policy and share."""
    rows = [
        {
            "Pattern": t.data["pattern"], "Policy": POLICY_WORDS.get(t.data["policy"], t.data["policy"]),
            "Pages asked for": f"{100 * t.data['share']:g} %", "Pages taken": percent(t.data.get("pages_share")),
            "Recalled, mean": percent(t.data.get("mass_mean")), "Recalled, least": percent(t.data.get("mass_least")),
            "Output error, mean": percent(t.data.get("error_mean")),
            "Output error, largest": percent(t.data.get("error_largest")),
            "In words": facts.verdict_on_needle(t) if "needle" in t.data["pattern"] else _lost_words(t),
        }
        for t in facts.measured(trials, "accuracy", "pattern", "policy", "share")
    ]  # fmt: skip
    if not rows:
        return ""
    note = "Output error: distance from the dense output over its length. Both over all sequences and query heads."
    return table_html(rows, "Accuracy of leaving pages out", numeric=list(rows[0])[2:-1], note=note)


def _lost_words(trial: Trial) -> str:
    lost, queries = trial.data.get("lost", 0), trial.data.get("queries", 0)
    return f"{lost} of {queries} queries keep less than half" if lost else "every query keeps at least half"


# ------------------------------------------------------------------------------------------------ the rest


def correctness_html(trials: Sequence[Trial]) -> str:
    """One row a paged backend: how many cases of the matrix are right."""
    rows = [
        {
            "Backend": backend, "Result": f"WRONG in {one['wrong']}" if one["wrong"] else "all right"
            if one["right"] else "takes none of the cases",
            "Cases right": f"{one['right']} of {one['right'] + one['wrong']}", "Not supported": one["unsupported"],
            "Elements compared": f"{one['elements']:,}", "Worst error over its bound": number(one["worst"]),
            "Of": ", ".join(one["groups"]) or "–",
        }
        for backend, one in facts.checks_by_backend(trials).items()
    ]  # fmt: skip
    if not rows:
        return Unmeasured("correctness of attention over pages", command=COMMAND)
    note = (
        "Pages of 16 to 256 tokens in shuffled order, lengths from 0 up and around page ends, shared prefixes, dropped "
        "pages, policies, groups of 1 to 8 heads. NaN lies in every slot without a token and in the outputs."
    )
    numeric = ["Cases right", "Not supported", "Elements compared", "Worst error over its bound"]
    return table_html(rows, "Attention over pages against float64", numeric=numeric, note=note)


def other_times_html(trials: Sequence[Trial]) -> str:
    """Paged prefill beside dense, and the append of a token."""
    rows = []
    for trial in facts.timed(trials, "prefill"):
        if trial.data.get("over_dense"):
            against = f"{number(trial.data['over_dense'])} × as fast as {trial.data.get('dense')} without pages"
            rows.append({"What": f"prefill through a page table, {spaced(trial.problem)}",
                         "By": trial.backend, "µs": number(trial.timing.latency_us),
                         "Against": against})  # fmt: skip
    for trial in facts.timed(trials, "append"):
        many = trial.data.get("sequences", "not known")
        rows.append({"What": f"append of one token to {many} sequences, one layer, key bounds kept", "By": "append",
                     "µs": number(trial.timing.latency_us), "Against": "10 µs is the aim"})  # fmt: skip
    if not rows:
        return Unmeasured("paged prefill and append", command=COMMAND)
    return table_html(rows, "Prefill and append", numeric=["µs"], note="Medians of graph replays.")


def troubles_html(trials: Sequence[Trial]) -> str:
    """What failed or did not finish, in words; empty when nothing did."""
    rows = [
        {
            "What": str(t.data.get("what")), "By": t.backend or "–", "Where": _where(t),
            "State": "WRONG" if t.status == "failed" else t.status, "Reason": t.reason or "no reason recorded",
        }
        for t in facts.troubles(trials)
    ]  # fmt: skip
    return table_html(rows, "Paging: what failed, or could not be measured", stack=True) if rows else ""


def _where(trial: Trial) -> str:
    data = trial.data
    named = data.get("case") or data.get("group") or data.get("pattern")
    return str(named or (spaced(trial.problem) if trial.problem else "–"))


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _ratio(value: Any) -> str:
    return f"{number(value)} ×" if isinstance(value, int | float) else "–"
