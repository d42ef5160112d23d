"""Draw a survey of models from its records: the time of whole steps, attention's share of it, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import escape
from matplotlib.figure import Figure

from flashcore.decision import compare
from flashcore.decision.compare import number
from flashcore.page.drawing.html_tables import Unmeasured, fold, table_html
from flashcore.page.drawing.svg import COLOURS, FONT_SIZE, figure_html, named, style
from flashcore.records import Trial
from flashcore.surveys.models import facts
from flashcore.surveys.models.facts import LEFT_OUT, OURS, WAY_WORDS, Steps

if TYPE_CHECKING:
    from flashcore.decision.evidence import Evidence

MODE_WORDS = {"eager": "eager", "compiled": "torch.compile", "graph": "torch.compile in a CUDA graph"}
MEANING = (
    "Whole steps of random decoders, from tokens to logits, by who computes attention. It would be bad for our bar to "
    "be longer than another's, and worse for its tokens to differ where more than noise decides them."
)
WHAT_WORDS = {"prefill": "prefill", "decode": "decode", "tokens": "generating"}


def model_html(evidence: Evidence) -> str:
    """The part 'In a model' of the section on speed; empty for runs that never measured one."""
    own, shown = facts.model_trials(evidence.trials), facts.model_trials(evidence.gpu_trials)
    if not own and not shown:
        return ""
    smoke = smoke_html(own) if evidence.recorded is not None or not facts.steps(shown) else ""
    figures = steps_html(shown)
    details = f"{steps_table(shown)}{generated_table(shown)}"
    if details:
        details = fold("Every step and mode, and the tokens that were compared", details)
    heading = f"<h3>In a model</h3><p>{escape(MEANING)}</p>"
    return heading + smoke + figures + troubles_html(shown or own) + details


def smoke_html(trials: Sequence[Trial]) -> str:
    """What a run without a GPU shows: that all of it runs, and that tokens agree; no speed."""
    seen = facts.tokens(trials, smoke=True)
    if not seen.records:
        return ""
    state = "the same tokens" if not seen.wrong else f"WRONG in {seen.wrong} of {seen.records} comparisons"
    words = (
        f"A smoke test on this machine, which has no GPU: tiny models, {state} in {seen.agreed} of {seen.decided} "
        f"places that noise does not decide ({seen.positions} were compared). It says nothing about speed."
    )
    return f'<p class="fc-note">{escape(words)}</p>'


# -------------------------------------------------------------------------------------------------------- times


def steps_html(trials: Sequence[Trial]) -> str:
    """A figure for each model and kind of step, in the mode in which it is quickest."""
    found = facts.steps(trials)
    if not found:
        return Unmeasured("times of whole models", command="flashcore model")
    figures = []
    for one in found:
        message = steps_message(one)
        mode = one.shown()[0]
        alt = f"Bar chart, ms a step by who computes attention; {one.title}, {one.what}, {MODE_WORDS[mode]}. {message}"
        caption = (
            f"<figcaption><strong>{escape(f'{one.title}: {WHAT_WORDS.get(one.what, one.what)}')}</strong> "
            f"{escape(message)}</figcaption>"
        )
        svg = figure_html(steps_figure(one), alt)
        figures.append(f'<figure class="fc-figure">{caption}{svg}</figure>')
    seen = facts.tokens(trials, smoke=False)
    note = (
        "Random decoders (RMSNorm, rotary positions, SwiGLU) in bfloat16. Each time is the median of steps on an idle "
        "GPU, interleaved round by round. The light part of a bar is the time of the same step with attention and its "
        "cache left out; the dark part is attention's share. Decode reads our pages on one side, and a static dense "
        "cache on the other, both full. "
        f"Tokens were compared before: {seen.agreed:,} of {seen.decided:,} greedy tokens are the same, counting only "
        "places where the best logit leads by more than twice the noise of torch's own attention."
    )
    return f'<div class="fc-grid">{"".join(figures)}</div><p class="fc-note">{escape(note)}</p>'


def steps_message(one: Steps) -> str:
    """What one figure says."""
    mode, ways = one.shown()
    mine, peer = ways.get(OURS), facts.best_peer(ways)
    if mine is None:
        return "FlashCore was not timed here."
    parts = [f"{_rate(mine)} tokens/s in {MODE_WORDS[mode]}"]
    if peer is not None and (ratio := facts.faster(mine, peer)):
        value, interval = ratio
        spread = f" ({compare.between(interval)})" if interval else ""
        parts.append(f"{number(value)}{spread} times as fast as with {WAY_WORDS.get(_way(peer), _way(peer))}")
    share = mine.data.get("attention_share")
    if compare.is_figure(share):
        parts.append(f"attention is {100 * share:.0f} % of the step")
        if peer is not None and compare.is_figure(other := peer.data.get("attention_share")):
            parts[-1] += f", and {100 * other:.0f} % there"
    return "; ".join(parts) + "."


def steps_figure(one: Steps) -> Figure:
    """A bar a way, the part that attention takes filled with the way's colour."""
    _, ways = one.shown()
    order = sorted((w for w in ways if w != LEFT_OUT), key=lambda way: (way != OURS, ways[way].timing.latency_us))
    with style():
        height = 0.95 + 0.42 * len(order)
        figure = Figure(figsize=(6.6, height))
        axes = figure.add_axes((0.30, 0.62 / height, 0.67, 1 - 0.72 / height))
        longest = max(ways[way].timing.latency_us for way in order) / 1e3
        for place, way in enumerate(order):
            total = ways[way].timing.latency_us / 1e3
            share = ways[way].data.get("attention_share")
            share = min(max(float(share), 0.0), 1.0) if compare.is_figure(share) else 0.0
            colour = COLOURS["s1" if way == OURS else "p1"]
            rest, look = total * (1 - share), {"edgecolor": colour, "linewidth": 1.4}
            axes.barh(place, rest, 0.55, color="none", **look)
            axes.barh(place, total - rest, 0.55, left=rest, color=colour, **look)
            axes.annotate(f"{number(total)} ms", xy=(total, place), xytext=(6, 0), textcoords="offset points",
                          va="center", color=colour, fontweight="bold" if way == OURS else "normal",
                          fontsize=FONT_SIZE - 1)  # fmt: skip
        axes.set_yticks(range(len(order)), [named(WAY_WORDS.get(way, way)) for way in order])
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlim(0, 1.28 * longest)
        axes.tick_params(axis="y", length=0)
        axes.yaxis.grid(False)
        axes.set_xlabel("ms a step: filled is attention")
    return figure


def _rate(trial: Trial) -> str:
    rate = trial.data.get("tokens_per_s")
    return f"{rate:,.0f}" if compare.is_figure(rate) else "not known"


def _way(trial: Trial) -> str:
    return str(trial.backend)


def steps_table(trials: Sequence[Trial]) -> str:
    """Every timing of every step."""
    rows = []
    for one in facts.steps(trials):
        for mode, ways in one.by_mode.items():
            mine = ways.get(OURS)
            for way, trial in ways.items():
                ratio = facts.faster(mine, trial) if mine is not None and way not in (OURS, LEFT_OUT) else None
                share = trial.data.get("attention_share")
                rows.append({
                    "Model": f"{one.title} ({one.words})", "Step": _work(trial), "Mode": MODE_WORDS[mode],
                    "Attention": WAY_WORDS.get(way, way), "ms": number(trial.timing.latency_us / 1e3),
                    "Tokens/s": _rate(trial),
                    "Attention's share": f"{100 * share:.1f} %" if compare.is_figure(share) else "–",
                    "FlashCore is faster by": _ratio_words(ratio), "Same tokens": _agreed(trial),
                })  # fmt: skip
    if not rows:
        return ""
    numeric = ["ms", "Tokens/s", "Attention's share", "FlashCore is faster by", "Same tokens"]
    return table_html(rows, "Whole steps of models", numeric=numeric)


def _work(trial: Trial) -> str:
    data = trial.data
    kind = "tokens of a prompt" if data.get("what") == "prefill" else "tokens in the cache"
    return f"{WHAT_WORDS.get(data.get('what'), '–')}, {data.get('batch')} sequences, {data.get('length')} {kind}"


def _ratio_words(ratio: tuple[float, tuple[float, float] | None] | None) -> str:
    if ratio is None:
        return "–"
    value, interval = ratio
    return f"{number(value)} × ({compare.between(interval)})" if interval else f"{number(value)} ×"


def _agreed(trial: Trial) -> str:
    data = trial.data
    if not isinstance(data.get("decided"), int):
        return "–"
    return f"{data.get('agreed'):,} of {data['decided']:,} decided, of {data.get('positions'):,}"


def generated_table(trials: Sequence[Trial]) -> str:
    """Greedy tokens after prompts, by way."""
    rows = [
        {
            "Model": str(t.data.get("title")), "Attention": WAY_WORDS.get(_way(t), _way(t)),
            "Generated": f"{t.data.get('generated')} tokens after prompts of {t.data.get('length')}, "
                         f"{t.data.get('batch')} sequences",
            "Same tokens": _agreed(t), "Largest difference of a logit": number(t.data.get("worst_logit")),
            "Noise of torch's attention": number(t.data.get("noise")),
            "State": "right" if t.status == "ok" else "WRONG",
        }
        for t in facts.model_trials(trials)
        if t.data.get("what") == "tokens" and t.status in ("ok", "failed") and not facts.is_smoke(t)
    ]  # fmt: skip
    numeric = ["Same tokens", "Largest difference of a logit", "Noise of torch's attention"]
    return table_html(rows, "Greedy tokens, over a cache that grows", numeric=numeric) if rows else ""


def troubles_html(trials: Sequence[Trial]) -> str:
    """What is wrong, did not finish or is not here, in words; empty when there is none."""
    rows = [
        {
            "Model": str(t.data.get("title")), "Step": WHAT_WORDS.get(t.data.get("what"), "–"),
            "Mode": MODE_WORDS.get(t.data.get("mode"), "–"), "Attention": WAY_WORDS.get(_way(t), _way(t)),
            "State": "WRONG" if t.status == "failed" else t.status, "Reason": t.reason or "no reason recorded",
        }
        for t in facts.troubles(trials)
    ]  # fmt: skip
    return table_html(rows, "Models: what is wrong, or could not be measured", stack=True) if rows else ""
