"""Draw what a server asks of decode: tokens a second of public models beside every peer, and decode against dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from markupsafe import escape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from flashcore.decision import advice, compare
from flashcore.decision.compare import is_figure, number
from flashcore.page.drawing.html_tables import Unmeasured, fold, percent, spaced, table_html
from flashcore.page.drawing.svg import COLOURS, FONT_SIZE, named, style, titled, with_tips
from flashcore.records import Trial
from flashcore.surveys.paging import facts, serving_facts
from flashcore.surveys.paging.serving_facts import (
    AS_ROWS,
    CUDA,
    DENSE,
    LENGTHS,
    OURS,
    PEERS,
    PREFIX,
    SERVING,
    SHAPES,
    TENSOR,
    TOKENS,
    Served,
    Shape,
)

COMMAND = "flashcore paging"
"""What measures all of it."""
STATED_BATCH = 64
"""What the sentence is about, where it was measured."""
SHOWN_SHARE = 0.3
"""Of the pages, as the section's other sentences have it."""
SIDES = {"dense": (DENSE, AS_ROWS), "flashinfer": (TENSOR, CUDA)}
BACKENDS = {"dense": "sdpa-cudnn", "flashinfer": "flashinfer"}
STATES = {"failed": "WRONG", "error": "did not finish", "unsupported": "not taken", "unavailable": "not here"}
MARKS = {
    "ours": ("s3", "D", "ours"), "invariant": ("s4", "s", "ours, batch-invariant"),
    "dense": ("p1", "|", "dense cuDNN"), "flashinfer": ("s2", "^", "FlashInfer"),
}  # fmt: skip
SERVED_CAPTION = "Tokens a second, attention alone, by model and batch"
DENSE_CAPTION = "Decode against dense cuDNN"


def serving_html(trials: Sequence[Trial]) -> str:
    """What leads the section: a sentence, how near each step comes to the memory's speed, tokens a second."""
    found = serving_facts.served(trials)
    if not found:
        return Unmeasured("tokens a second of public models, beside dense cuDNN and FlashInfer", command=COMMAND)
    message = serving_message(found)
    alt = f"Dot plot, TB/s of K and V that a decode step reads, by model and batch. {message}"
    title = "How near a decode step comes to the memory’s speed"
    figure = titled(serving_figure(found), title, _speeds(found), alt)
    every = fold("Every way that a served model’s step was timed", _every(found))
    return f'<p class="fc-lead">{escape(message)}</p>{figure}{serving_table(found, trials)}{every}'


def serving_message(found: Sequence[Served]) -> str:
    """The finding, at one batch."""
    batch = STATED_BATCH if any(one.batch == STATED_BATCH for one in found) else max(one.batch for one in found)
    some = [one for one in found if one.batch == batch]
    rates = advice.listed([f"{serving_facts.rate(one.ours):,.0f} tokens/s of {one.model}" for one in some])
    text = f"Attention alone leaves room for {rates} at batch {batch} with {_context(some)} tokens in each sequence"
    shares = [s for one in some if (s := serving_facts.share_of_sheet(one.ours)) is not None]
    told = [f"{_spread(100 * s for s in shares)} % of what the memory reads by its data sheet"] if shares else []
    for side, title in PEERS.items():
        ratios = [one.ours.data[f"over_{side}"] for one in some if is_figure(one.ours.data.get(f"over_{side}"))]
        dense = "dense " if side == "dense" else ""
        told += [f"{_spread(ratios)} times as fast as {dense}{title}"] if ratios else []
    costs = [c for one in some if (c := serving_facts.cost_of_invariance(one)) is not None]
    text += f": {', '.join(told)}." if told else "."
    return f"{text} batch_invariant=True takes {_spread(100 * c for c in costs)} % longer." if costs else text


def _speeds(found: Sequence[Served]) -> str:
    """The largest batch in TB/s, beside what bounds it."""
    fast = max(found, key=lambda one: one.ours.data["tbs"])
    words = f"{fast.model}, batch {fast.batch}: {number(fast.ours.data['tbs'])} TB/s of K and V"
    sheet = fast.ours.data.get("sheet_tbs")
    return f"{words}; the data sheet says {number(sheet)}." if is_figure(sheet) else f"{words}."


def serving_figure(found: Sequence[Served]) -> Figure:
    """A row a model and batch, a mark for ours and each peer, a line for the data sheet."""
    with style():
        height = 1.55 + 0.31 * len(found)
        figure = Figure(figsize=(6.6, height))
        axes = figure.add_axes((0.31, 0.62 / height, 0.66, 1 - 1.36 / height))
        for side, (colour, marker, label) in MARKS.items():
            there = [(place, t) for place, one in enumerate(found) if (t := _shown(one, side)) is not None]
            if not there:
                continue
            hollow = {"markerfacecolor": "none", "markeredgewidth": 1.6} if side == "invariant" else {}
            wide = {"markeredgewidth": 2.4} if marker == "|" else {}
            (dots,) = axes.plot(
                [t.data["tbs"] for _, t in there], [place for place, _ in there], marker, linestyle="", label=label,
                color=COLOURS[colour], markersize=13 if marker == "|" else 7, zorder=2 if side == "dense" else 3,
                **hollow, **wide,
            )  # fmt: skip
            with_tips(dots, [f"{found[place].model}, batch {found[place].batch}, {label}: {_tip(t)}"
                             for place, t in there])  # fmt: skip
        sheets = [t for one in found if is_figure(t := one.ours.data.get("sheet_tbs"))]
        if sheets:
            axes.axvline(sheets[-1], color=COLOURS["target"], linewidth=1.5, linestyle=(0, (1, 1.6)),
                         label="data sheet")  # fmt: skip
        axes.set_yticks(range(len(found)), [f"{named(one.model)}, {one.batch}" for one in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlim(0, None)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("TB/s of K and V; rows: model, batch")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.48, 1.0), ncols=3, fontsize=FONT_SIZE - 1.5,
                    columnspacing=1.0, handletextpad=0.3)  # fmt: skip
    return figure


def _shown(one: Served, side: str) -> Trial | None:
    """The fastest record of a side that counts and says what it read."""
    names = {"ours": (OURS,), "invariant": (serving_facts.INVARIANT,), **SIDES}[side]
    trial = one.good(*names)
    return trial if trial is not None and is_figure(trial.data.get("tbs")) else None


def _tip(trial: Trial) -> str:
    return f"{number(trial.data['tbs'])} TB/s, {number(trial.timing.latency_us)} µs a layer, {_rate(trial)} tokens/s"


def _rate(trial: Trial) -> str:
    return f"{serving_facts.rate(trial):,.0f}"


def serving_table(found: Sequence[Served], trials: Sequence[Trial]) -> str:
    """One row a model and batch: the rate, the share of the memory's speed, each peer, what invariant bits cost."""
    best, gone = serving_facts.best_read(trials), serving_facts.absent(trials, SERVING)
    rows = []
    for one in found:
        data = one.ours.data
        rows.append({
            "Model": f"{one.model}, batch {one.batch}", "Tokens/s": _rate(one.ours),
            "µs a layer": number(one.ours.timing.latency_us),
            "Of the data sheet": percent(serving_facts.share_of_sheet(one.ours)),
            "Of the best read": percent(data["tbs"] / best.data["tbs"]) if best else "–",
            **{f"Beside {title}": beside(one.ours, side, one.ways, gone) for side, title in PEERS.items()},
            "batch_invariant costs": _cost(one),
        })  # fmt: skip
    numeric = [name for name in rows[0] if name != "Model"]
    return table_html(rows, SERVED_CAPTION, numeric=numeric, note=_note(found, trials, best, gone))


def _note(found: Sequence[Served], trials: Sequence[Trial], best: Trial | None, gone: Mapping[str, str]) -> str:
    models = {one.model: one.ours for one in found}
    page = next(iter(models.values())).problem.page_size
    shapes = "; ".join(
        f"{name} {t.data['layers']} layers, {t.problem.num_heads_q} query heads on {t.problem.num_heads_kv}, head_dim "
        f"{t.problem.head_dim}" for name, t in models.items()
    )  # fmt: skip
    cards = advice.listed([str(t.data["card"]) for t in models.values() if t.data.get("card")])
    told = [
        "Attention alone: batch / (layers × time of one layer’s step). No projection, MLP, sampling or append in it, "
        "so no server reaches it.",
        f"{shapes}" + (f"; as their cards say ({cards})." if cards else "."),
        f"bfloat16, pages of {page} tokens in any order. One layer’s cache is there; all layers’ may not fit a card.",
        "Shares: bytes of K and V over the time, of the data sheet’s bandwidth and of the best read in this run"
        + (f" ({number(best.data['tbs'])} TB/s by {_who(best)})." if best else "."),
        "Beside: how many times as fast ours is in the same rounds as cuDNN over contiguous K and V, and as the better "
        "of FlashInfer’s two kernels over the same pages. batch_invariant costs: how much longer that mode takes.",
    ]  # fmt: skip
    refused = serving_facts.refusals(trials, SERVING)
    return " ".join([*told, *_absent(gone), *(f"{name}, refused: {reason}." for name, reason in refused.items())])


def _absent(gone: Mapping[str, str]) -> list[str]:
    """A sentence on each backend that was not there, with what mends it."""
    return [f"Not here: {backend} ({reason.rstrip('.')})." for backend, reason in gone.items()]


def _who(trial: Trial) -> str:
    where = trial.data.get("shape") or spaced(trial.problem)
    batch = f", batch {trial.data['batch']}" if trial.data.get("batch") else ""
    by = "cuDNN" if trial.backend == BACKENDS["dense"] else trial.variant if trial.backend == "flashinfer" else "ours"
    return f"{by} at {where}{batch}"


def beside(ours: Trial | None, side: str, ways: Mapping[str, Trial], gone: Mapping[str, str]) -> str:
    """How many times as fast as a side ours is, or why there is no figure."""
    over = ours.data.get(f"over_{side}") if ours is not None else None
    if is_figure(over):
        return f"{number(over)} ×"
    if BACKENDS[side] in gone:
        return STATES["unavailable"]
    states = [t.status for name, t in ways.items() if name.startswith(SIDES[side]) and t.status != "ok"]
    return STATES.get(states[0], "–") if states else "–"


def _cost(one: Served) -> str:
    cost = serving_facts.cost_of_invariance(one)
    if cost is not None:
        return f"{100 * cost:+.1f} %".replace("-", "−")
    return {**STATES, "unsupported": "refused"}.get(one.invariant.status, "–") if one.invariant else "–"


def _every(found: Sequence[Served]) -> str:
    """The time of every way at each model and batch, or what came of it."""
    names = list(dict.fromkeys([OURS, *(name for one in found for name in one.ways)]))
    rows = [
        {"Model": f"{one.model}, batch {one.batch}", **{f"{name}, µs": _us(one.ways.get(name)) for name in names}}
        for one in found
    ]  # fmt: skip
    note = "Median time of one layer's step, all in the same rounds."
    return table_html(rows, "Served models, every way", numeric=list(rows[0])[1:], note=note)


def _us(trial: Trial | None) -> str:
    """The median of a way that counts, else its state in a word."""
    if trial is None:
        return "–"
    return number(trial.timing.latency_us) if serving_facts.counts(trial) else _state(trial)


def _state(trial: Trial) -> str:
    return STATES.get(trial.status, "not of a GPU")


# ------------------------------------------------------------------------------------------------ against dense


def shapes_html(trials: Sequence[Trial]) -> str:
    """Decode against dense cuDNN at every shape, dtype and page size."""
    found = serving_facts.shapes(trials)
    if not found:
        return Unmeasured("decode against dense cuDNN at each page size", command=COMMAND)
    every = fold("Every time of decode against dense", _every_shape(found, trials))
    return f"<p>{escape(shapes_message(found))}</p>{shapes_table(found, trials)}{every}"


def shapes_message(found: Sequence[Shape]) -> str:
    """How many cells are at least as fast as dense cuDNN, and how the ratios spread."""
    cells = [t for one in found for t in one.pages.values() if serving_facts.counts(t)]
    told = []
    for side, title in PEERS.items():
        ratios = [t.data[f"over_{side}"] for t in cells if is_figure(t.data.get(f"over_{side}"))]
        if ratios:
            dense, fast = "dense " if side == "dense" else "", sum(r >= 1 for r in ratios)
            spread = f"{_spread(ratios)} times its speed"
            told.append(f"at least as fast as {dense}{title} in {fast} of {len(ratios)} cells ({spread})")
    if not told:
        return "Decode over pages: no cell could be compared with dense attention or FlashInfer."
    return f"Decode over pages is {' and '.join(told)}."


def shapes_table(found: Sequence[Shape], trials: Sequence[Trial]) -> str:
    """One row a shape and dtype: how many times as fast as each peer ours is at each page size."""
    gone = serving_facts.absent(trials, SHAPES)
    sizes = sorted({size for one in found for size in one.pages})
    rows = []
    for one in found:
        row = {"Shape": spaced(one.problem), "cuDNN, µs": number(one.dense.timing.latency_us) if one.dense else "–"}
        for side, title in PEERS.items():
            for size in sizes:
                cell = one.pages.get(size)
                row[f"{title}, page {size}"] = _cell(cell, one, side, size, gone)
        rows.append(row)
    note = (
        "How many times as fast as dense cuDNN (contiguous K and V), and as the better FlashInfer kernel over the same "
        "pages, ours is: medians of the same rounds, above 1 is faster. One query token a sequence; page: tokens in "
        "a page, in any order in memory; caches rotated past the L2 cache where they are small."
    )
    return table_html(rows, DENSE_CAPTION, numeric=list(rows[0])[1:], note=" ".join([note, *_absent(gone)]))


def _cell(cell: Trial | None, one: Shape, side: str, size: int, gone: Mapping[str, str]) -> str:
    if cell is None:
        return "–"
    if not serving_facts.counts(cell):
        return _state(cell)
    ways = {n: t for n, t in one.ways.items() if side == "dense" or n.endswith(f"page {size}")}
    return beside(cell, side, ways, gone)


def _every_shape(found: Sequence[Shape], trials: Sequence[Trial]) -> str:
    """One row a shape, dtype and page size: times, what was read, and the ratios with half of the rounds' own."""
    best, rows = serving_facts.best_read(trials), []
    for one in found:
        for size, trial in sorted(one.pages.items()):
            fine = serving_facts.counts(trial) and is_figure(trial.data.get("tbs"))
            quartiles = trial.timing.more("quartiles_us") if fine else None
            rows.append({
                "Shape": f"{spaced(one.problem)}, page {size}", "µs": _us(trial),
                "Quartiles": compare.between(quartiles) if quartiles else "–",
                "TB/s": number(trial.data["tbs"]) if fine else "–",
                "Of the best read": percent(trial.data["tbs"] / best.data["tbs"]) if fine else "–",
                **{f"{name}, µs": _us(one.ways.get(name)) for name in (DENSE, AS_ROWS)},
                **{f"{name}, µs": _us(one.ways.get(f"{name}, page {size}")) for name in (TENSOR, CUDA)},
                **{f"Beside {title}": _within(trial, side, fine) for side, title in PEERS.items()},
            })  # fmt: skip
    if not rows:
        return ""
    note = "In brackets: half of the rounds' ratios."
    return table_html(rows, "Decode against dense, every time", numeric=list(rows[0])[1:], note=note)


def _within(trial: Trial, side: str, fine: bool) -> str:
    over, quartiles = trial.data.get(f"over_{side}"), trial.data.get(f"over_{side}_quartiles")
    if not fine or not is_figure(over):
        return "–"
    return f"{number(over)} ×" + (f" ({compare.between(quartiles)})" if quartiles else "")


def further_html(trials: Sequence[Trial]) -> str:
    """What serving has beside one query token over sequences of one length; empty where none of it was measured."""
    best = serving_facts.best_read(trials)
    rows = [*_length_rows(trials), *_token_rows(trials), *_prefix_rows(trials)]
    if not rows:
        return ""
    rows += [*_page_rows(trials), *_append_rows(trials)]
    missing = BACKENDS["flashinfer"] in serving_facts.absent(trials, SHAPES)
    shown = [
        {
            "What": what, "µs": number(t.timing.latency_us),
            "Of the best read": percent(t.data["tbs"] / best.data["tbs"]) if best and t.data.get("tbs") else "–",
            "Beside FlashInfer": _within(t, "flashinfer", True) if t.data["what"] != SHAPES or not missing
            else STATES["unavailable"], "In words": words,
        }
        for what, t, words in rows
    ]  # fmt: skip
    note = (
        "One layer, our decode kernel. Of the best read: bytes of K and V, each page counted once, over the time, "
        "beside the best read of the run; more than 100 % comes from the L2 cache."
    )
    numeric = ["µs", "Of the best read", "Beside FlashInfer"]
    return table_html(shown, "Decode as servers have it", numeric=numeric, note=note, stack=True)


Rows = list[tuple[str, Trial, str]]


def _length_rows(trials: Sequence[Trial]) -> Rows:
    ours = serving_facts.further(trials, LENGTHS).get(OURS)
    if ours is None:
        return []
    low, problem = ours.data.get("shortest", 0), ours.problem
    words = f"{ours.data.get('tokens', 0):,} tokens in all"
    return [(f"{problem.batch} sequences of {low:,} to {problem.seqlen_k:,} tokens", ours, words)]


def _token_rows(trials: Sequence[Trial]) -> Rows:
    found = serving_facts.further(trials, TOKENS)
    rows: Rows = []
    for name, trial in found.items():
        if is_figure(trial.data.get("over_one")):
            words = f"{number(1 / trial.data['over_one'])} of the time of one query token"
            if is_figure(trial.data.get("over_dense")):
                words += f", {number(1 / trial.data['over_dense'])} of what dense cuDNN takes for one"
            rows.append((f"{name} a sequence, {spaced(trial.problem)}", trial, words))
    return rows


def _prefix_rows(trials: Sequence[Trial]) -> Rows:
    ours = serving_facts.further(trials, PREFIX).get("prefix shared")
    if ours is None:
        return []
    over, problem = ours.data.get("over_apart"), ours.problem
    words = f"{number(over)} × as fast as with nothing shared" if is_figure(over) else "nothing to compare with"
    what = f"{problem.batch} sequences that share {ours.data.get('prefix', 0):,} of {problem.seqlen_k:,} tokens"
    return [(what, ours, words)]


def _page_rows(trials: Sequence[Trial]) -> Rows:
    """From the decode steps that leave pages out, the first shape's."""
    for one in facts.decodes(trials):
        some = one.nearest("top_k", SHOWN_SHARE)
        if some is not None and is_figure(some.data.get("over_peer")) and some.data["over_peer"] > 0:
            words = f"{number(1 / some.data['over_peer'])} of dense cuDNN's time, choice included"
            what = f"{100 * SHOWN_SHARE:.0f} % of the pages, chosen by their bounds, {spaced(one.problem)}"
            return [(what, some, words)]
    return []


def _append_rows(trials: Sequence[Trial]) -> Rows:
    return [
        (f"append of one token to each of {t.data.get('sequences', 'some')} sequences", t, "key bounds kept")
        for t in facts.timed(trials, "append")
    ]


# ------------------------------------------------------------------------------------------------ words


def _context(some: Sequence[Served]) -> str:
    return advice.listed(sorted({f"{one.ours.problem.seqlen_k:,}" for one in some}))


def _spread(values: Iterable[float]) -> str:
    shown = [number(value) for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"
