"""The verdict in words, and the four figures that matter, each with its target and its change since the last run."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import escape

from flashcore.decision.compare import is_figure, number
from flashcore.decision.verdict import Decision, Evidence, GateResult
from flashcore.drawing import paging_views
from flashcore.history.since import Since
from flashcore.paging_survey import facts
from flashcore.problem import parse_problem
from flashcore.records import Trial

CARD_WORD = {"PASS": "met", "FAIL": "missed", "INCONCLUSIVE": "inconclusive"}
SAVED = "data.saved_percent"
"""The metric of a condition on memory saved."""
CASE = "shared_prefix"
"""The case of memory that the card shows: sequences that begin alike."""


def banner_html(decision: Decision) -> str:
    """The verdict in words with its one-sentence reason, and where the evidence comes from."""
    css = decision.verdict.lower().replace("-", "")
    origin = " ".join(filter(None, (decision.evidence, decision.stored, decision.seal)))
    return (
        f'<div class="fc-banner {css}">'
        f'<p class="fc-verdict"><span class="fc-small">Verdict</span> {decision.verdict}</p>'
        f'<div><p class="fc-reason">{escape(decision.reason)}</p>'
        f'<p class="fc-evidence">{escape(origin)}</p>'
        "</div></div>"
    )


def headline_html(decision: Decision, evidence: Evidence, since: Since | None = None) -> str:
    """The four figures; those of speed and correctness come from the gates, so that they cannot contradict them."""
    of = {m: [g for g in decision.gates if g.metric == m] for m in ("tflops", "ratio_to_best_peer", "latency_us")}
    checks = [g for g in decision.gates if g.metric == "correct_percent" and g.required]
    cards = []
    if of["tflops"] or of["ratio_to_best_peer"]:
        cards.append(_speed_card(of["tflops"], of["ratio_to_best_peer"], since))
    if of["latency_us"]:
        gates = of["latency_us"]
        lines = [*map(_target, gates), _delta(since, "latency_us")]
        cards.append(_card("Latency of a small call", *_figure(gates[0]), _where(gates[0]), lines))
    if checks:
        cards.append(_correctness_card(checks, since))
    cards.append(_memory_card(decision, evidence, since))
    return f'<ul class="fc-cards">{"".join(cards)}</ul>'


def _speed_card(speeds: Sequence[GateResult], ratios: Sequence[GateResult], since: Since | None) -> str:
    first = (speeds or ratios)[0]
    lines = []
    if speeds and ratios:
        ratio = ratios[0]
        if ratio.measured is None:
            text = "Against the best peer: not measured"
        else:
            other = ratio.backend not in (None, first.backend) or ratio.problem != first.problem
            whose = f", {ratio.backend} at {_problem(ratio)}" if other else ""
            text = f"{number(ratio.measured)} × the best peer, {ratio.versus or 'not named'}{whose}"
        lines.append(f'<span class="fc-second">{escape(text)}</span>')
    lines += [_target(g) for g in speeds]
    lines += [_target(g, " the peer") for g in ratios]
    words = {m: since.deltas[m].word for m in ("tflops", "ratio_to_best_peer") if since and m in since.deltas}
    lines.append(_delta(since, "tflops" if "tflops" in words else "ratio_to_best_peer"))
    if len(set(words.values())) > 1:
        lines.append(_delta(since, "ratio_to_best_peer", "Against the peer "))
    return _card("Best speed of ours", *_figure(first), _where(first), lines)


def _correctness_card(gates: Sequence[GateResult], since: Since | None) -> str:
    # Gates may share checks (one kernel's, and all of ours), so that the widest is counted, and not their sum.
    widest = max(gates, key=lambda gate: gate.n)
    right = round(widest.n * (widest.measured or 0) / 100)
    states = [g.state for g in gates]
    state = "FAIL" if "FAIL" in states else "INCONCLUSIVE" if "INCONCLUSIVE" in states else "PASS"
    lines = [
        f'Target all of them: <strong class="{state.lower()}">{CARD_WORD[state]}</strong>',
        f"{states.count('PASS')} of {len(gates)} gates on correctness pass",
        _delta(since, "correct_percent"),
    ]
    return _card("Checks that are right", f"{right:,}", f"of {widest.n:,}", f"{widest.title}, against float64", lines)


def _memory_card(decision: Decision, evidence: Evidence, since: Since | None) -> str:
    trial = _memory(paging_views.evidence_trials(evidence), _machines(evidence))
    asked = [(o, c) for o in decision.options for c in o.conditions if c.metric == SAVED]
    lines = []
    for option, condition in asked[:1]:
        word = CARD_WORD[condition.state]
        told = f'<strong class="{condition.state.lower()}">{word}</strong>'
        lines.append(f"Option {escape(option.id)} asks {condition.comparison} {condition.threshold:g} %: {told}")
    title = "Memory saved"
    if trial is None:
        return _card(title, "not measured", "", "run 'flashcore paging' to measure it", lines)
    percent = trial.data["saved_percent"]
    where = f"paged K/V cache, {facts.MEMORY_WORDS[CASE]}, against a dense one"
    before = _memory(since.before.trials, {since.before.environment.get("id")}) if since else None
    if before is not None:
        moved = percent - before.data["saved_percent"]
        change = f"{'+' if moved > 0 else '−'}{abs(moved):.1f} points" if abs(moved) >= 0.05 else "the same"
        lines.append(f'<span class="fc-delta">{change} since {escape(since.before.day)}</span>')
    return _card(title, f"{percent:.1f}".replace("-", "−"), "%", where, lines)


def _memory(trials: Sequence[Trial], machines: set) -> Trial | None:
    """The record of memory saved with a shared prefix that counts: the last one, if it holds a figure."""
    found = [t for t in facts.measured(trials, "memory", "case") if t.data.get("case") == CASE]
    usable = [t for t in found if is_figure(t.data.get("saved_percent")) and t.environment in machines]
    return usable[-1] if usable else None


def _machines(evidence: Evidence) -> set:
    return {e.get("id") for e in (evidence.environment, evidence.gpu_environment) if e.get("id")}


def _figure(gate: GateResult) -> tuple[str, str]:
    return ("not measured", "") if gate.measured is None else (number(gate.measured), gate.unit)


def _problem(gate: GateResult) -> str:
    return "" if gate.problem in ("", "any") else parse_problem(gate.problem).label().replace(",", ", ")


def _where(gate: GateResult) -> str:
    return ", ".join(filter(None, [gate.backend, _problem(gate)]))


def _target(gate: GateResult, of: str = "") -> str:
    kind = "Target" if gate.required else "Aim"
    word = f'<strong class="{gate.state.lower()}">{CARD_WORD[gate.state]}</strong>'
    return f"{kind} {gate.comparison} {gate.threshold:g} {escape(gate.unit)}{of}: {word}"


def _delta(since: Since | None, metric: str, lead: str = "") -> str:
    """How the figure changed since the last run; empty without one."""
    found = since.deltas.get(metric) if since else None
    return f'<span class="fc-delta">{escape(lead + found.sentence)}</span>' if found else ""


def _card(title: str, value: str, unit: str, where: str, lines: Sequence[str]) -> str:
    below = "".join(f"<p>{line}</p>" for line in lines if line)
    css = "fc-value" if unit else "fc-value none"
    return (
        f'<li><h2 class="fc-card-title">{escape(title)}</h2><p class="{css}">{escape(value)} '
        f'<span class="fc-unit">{escape(unit)}</span></p><p class="fc-where">{escape(where)}</p>{below}</li>'
    )
