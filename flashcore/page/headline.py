"""The first screen: verdict, why, risk and next step, and the figures that matter with their targets and changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from flashcore import tables
from flashcore.decision import compare
from flashcore.decision.compare import is_figure, number
from flashcore.decision.verdict import Decision, Evidence, GateResult
from flashcore.page.drawing import html_tables, paging_views
from flashcore.page.history.since import Since
from flashcore.problem import parse_problem
from flashcore.records import Trial
from flashcore.surveys.paging import facts

CARD_WORD = {"PASS": "met", "FAIL": "missed", "INCONCLUSIVE": "inconclusive"}
SAVED = "data.saved_percent"
"""The metric of a condition on memory saved."""
CASE = "shared_prefix"
"""The case of memory that the card shows: sequences that begin alike."""


TO_INSTALL = {"fa3": "FlashAttention-3", "fa4": "FlashAttention-4"}
"""Peers that a reader asks for by name, by id; a run without them says so."""
SPEED_THERE = "Speed at the workload that decides"
"""Of a gate on one problem; other problems may run faster, and decide nothing."""
METHODS = {"graph_replay": "in a CUDA graph, back to back"}
"""What a way of timing means for a reader."""


def banner_html(decision: Decision, *, run: str = "") -> str:
    """The verdict in words with its reason, what would change it, the next step, and where the evidence comes from.

    Parameters
    ----------
    run
        Name of the run as the commands take it; without one they mean the latest.
    """
    css = decision.verdict.lower().replace("-", "")
    line = Markup('<p class="fc-{}"><strong>{}</strong> {}</p>').format
    risk = line("risk", "Risk:" if decision.recommended else "To change it:", decision.flip) if decision.flip else ""
    return (
        f'<div class="fc-banner {css}">'
        f'<p class="fc-verdict"><span class="fc-small">Verdict</span> {decision.verdict}</p>'
        f'<div><p class="fc-reason">{escape(decision.reason)}</p>'
        f"{risk}{line('todo', 'Next:', next_step(decision, run))}"
        f'<p class="fc-evidence">{escape(_origin(decision))}</p>'
        "</div></div>"
    )


def _origin(decision: Decision) -> str:
    """Where the evidence comes from and whether it is as it was judged; the page's provenance says it at length."""
    found = decision.based_on
    if found is None:
        return " ".join(filter(None, (decision.evidence, decision.stored)))
    seal = "The seal of this run holds." if found.seal.holds else found.seal.sentence
    return " ".join(filter(None, (found.brief, decision.stored, seal)))


SEALED = "check the evidence"
UNSEALED = "read the verdict again"
"""What the first command of a next step is for, with a seal and without one."""


def sealed(decision: Decision) -> bool:
    """Whether there is a seal to verify; a decision that knows no evidence is taken to be of a run with one."""
    return decision.based_on is None or decision.based_on.seal.digest is not None


def next_step(decision: Decision, run: str = "") -> Markup:
    """What to do now, with the command that does it."""
    code = Markup("<code>{}</code>").format
    command, aim = ("verify", SEALED) if sealed(decision) else ("verdict", UNSEALED)
    verify = Markup("{} by {}").format(aim, code(f"flashcore {command} {run}".strip()))
    if decision.recommended is not None:
        option = decision.recommended
        ship = Markup("ship option {}").format(option.id)
        if option.backend:
            ship += Markup(": {}").format(code(f'flashcore.attention(q, k, v, backend="{option.backend}")'))
        return Markup("{}; then {}.").format(verify, ship)
    if decision.blocking:
        first = decision.blocking[0]
        again = " again, once the kernel is changed" if first.state == "FAIL" else ""
        return Markup("{} measures '{}'{}.").format(code(first.fix), first.title, again)
    if decision.verdict == "GO":
        return Markup("{}.").format(verify)
    return Markup("{} makes the report again.").format(code("flashcore report"))


def headline_html(decision: Decision, evidence: Evidence, since: Since | None = None) -> str:
    """The figures of the first screen; speed and correctness come from the gates, so they cannot contradict them.

    Memory is shown where paging is what ships; else how many planted bugs were found.
    """
    of = {m: [g for g in decision.gates if g.metric == m] for m in ("tflops", "ratio_to_best_peer", "latency_us")}
    checks = [g for g in decision.gates if g.metric == "correct_percent" and g.required]
    cards = []
    if of["tflops"] or of["ratio_to_best_peer"]:
        cards.append(_speed_card(of["tflops"], of["ratio_to_best_peer"], evidence, since))
    if of["latency_us"]:
        gates = of["latency_us"]
        timed = _timing_of(gates[0], evidence)
        lines = [*map(_target, gates), *_other_calls(timed), _delta(since, "latency_us")]
        where = ", ".join(filter(None, [_where(gates[0]), _how(timed)]))
        cards.append(_card("Latency of a small call", *_figure(gates[0]), where, lines))
    if checks:
        cards.append(_correctness_card(checks, since))
    if any(c.metric == SAVED for o in decision.options if o.recommended for c in o.conditions):
        cards.append(_memory_card(decision, evidence, since))
    elif planted := tables.fault_counts(evidence.gpu_trials):
        cards.append(_bugs_card(planted))
    return f'<ul class="fc-cards">{"".join(cards)}</ul>'


def _speed_card(
    speeds: Sequence[GateResult], ratios: Sequence[GateResult], evidence: Evidence, since: Since | None
) -> str:
    first = (speeds or ratios)[0]
    lines = []
    if speeds and ratios:
        ratio = ratios[0]
        if ratio.measured is None:
            text = "Against the best peer: not measured"
        else:
            other = ratio.backend not in (None, first.backend) or ratio.problem != first.problem
            whose = f", {ratio.backend} at {_problem(ratio)}" if other else ""
            text = f"{number(ratio.measured)} × the best peer, {_peer(ratio, evidence)}{whose}"
        lines.append(f'<span class="fc-second">{escape(text)}</span>')
    if ratios:
        lines.append(escape(_asked_for(ratios[0], evidence)))
    if speeds:
        lines.append(_elsewhere(first, evidence))
    lines += [_target(g) for g in speeds]
    lines += [_target(g, " the peer") for g in ratios]
    words = {m: since.deltas[m].word for m in ("tflops", "ratio_to_best_peer") if since and m in since.deltas}
    lines.append(_delta(since, "tflops" if "tflops" in words else "ratio_to_best_peer"))
    if len(set(words.values())) > 1:
        lines.append(_delta(since, "ratio_to_best_peer", "Against the peer "))
    where = ", ".join(filter(None, [_where(first), _how(_timing_of(first, evidence))]))
    title = SPEED_THERE if _problem(first) else "Best speed of ours"
    return _card(title, *_figure(first), where, lines)


def _elsewhere(gate: GateResult, evidence: Evidence) -> str:
    """The highest speed of ours at any other problem, where it is above the gate's: plots show it further down."""
    decides = None if gate.problem in ("", "any") else parse_problem(gate.problem)
    rates = [
        (rate, t) for t in evidence.gpu_trials
        if compare.contends(t) and compare.in_ordinary_mode(t) and (rate := compare.tflops(t)) is not None
        and not compare.same_problem(t.problem, decides)
    ]  # fmt: skip
    if decides is None or gate.measured is None or not rates:
        return ""
    rate, trial = max(rates, key=lambda found: found[0])
    if rate <= gate.measured:
        return ""
    label = trial.problem.label().replace(",", ", ")
    return f"Up to {escape(number(rate))} TFLOPS at other problems: {escape(trial.backend)}, {escape(label)}"


def _peer(ratio: GateResult, evidence: Evidence) -> str:
    """The best peer's id with the version of what it calls: as its timing says, or of cuDNN the run's environment."""
    timed = [t for t in evidence.gpu_trials if t.kind == "attention_timing" and t.backend == ratio.versus]
    version = next((t.data["version"] for t in reversed(timed) if t.data.get("version")), None)
    before = evidence.gpu_environment.get("before")
    if version is None and ratio.versus == "sdpa-cudnn" and isinstance(before, Mapping) and before.get("cudnn"):
        version = f"cuDNN {html_tables.version_words('cudnn', before['cudnn'])}"
    return f"{ratio.versus} ({version})" if version else ratio.versus or "not named"


def _asked_for(ratio: GateResult, evidence: Evidence) -> str:
    """How the kernel stands to the peers that a reader asks for by name; one that the run looked for is named as well.

    A run from before such a peer was known holds no record of it, and cannot be asked.
    """
    mine, told = _timing_of(ratio, evidence), []
    missing: dict[str, list[str]] = {}
    for name, title in TO_INSTALL.items():
        records = [t for t in evidence.gpu_trials if t.backend == name]
        beside = [t for t in records if mine and compare.interleaved(mine, t)]
        found = compare.ratio(mine, beside[-1]) if beside else None
        if found is not None:
            told.append(f"{number(found.value)} × {title}")
        elif records:
            why = "not installed" if all(t.status == "unavailable" for t in records) else "not timed beside it"
            missing.setdefault(why, []).append(title)
    for why, titles in missing.items():
        names = " and -".join([titles[0], *(title.removeprefix("FlashAttention-") for title in titles[1:])])
        told.append(f"{names} {'were' if len(titles) > 1 else 'was'} {why}")
    return "; ".join(told) + "." if told else ""


def _timing_of(gate: GateResult, evidence: Evidence) -> Trial | None:
    """The timing behind a gate's figure: the last of its backend on its problem."""
    trials = evidence.gpu_trials if gate.evidence == "recorded" else evidence.trials
    wanted = None if gate.problem in ("", "any") else parse_problem(gate.problem)
    found = [
        t for t in trials
        if t.kind == "attention_timing" and t.backend == gate.backend and compare.same_problem(t.problem, wanted)
        and compare.latency_us(t) is not None
    ]  # fmt: skip
    return found[-1] if found else None


def _how(timed: Trial | None) -> str:
    return METHODS.get(timed.timing.method, "") if timed else ""


OTHER_CALLS = {
    "launch_us": "Without a graph, the host takes {} µs to launch it",
    "eager_us": "Launched one by one, each call takes the GPU {} µs",
    "single_us": "One call alone takes {} µs until the host knows that it is over",
}
"""Other times of the same call that a timing may hold, in words."""


def _other_calls(timed: Trial | None) -> list[str]:
    """What else was measured of the same call."""
    found = {words: timed.timing.more(key) for key, words in OTHER_CALLS.items()} if timed else {}
    return [words.format(number(figure)) for words, figure in found.items() if is_figure(figure)]


def _bugs_card(planted: Mapping[str, Mapping[str, int]]) -> str:
    """How many of the bugs that were planted to try the checker it found."""
    ran = {backend: outcomes for backend, outcomes in planted.items() if set(outcomes) != {"not run"}}
    total = sum(sum(outcomes.values()) for outcomes in ran.values())
    found = sum(n for outcomes in ran.values() for word, n in outcomes.items() if word.startswith("found"))
    state = "pass" if found == total and total else "fail"
    lines = [f'Target all of them: <strong class="{state}">{"met" if state == "pass" else "missed"}</strong>']
    by_crash = sum(outcomes.get("found by its crash", 0) for outcomes in ran.values())
    many = f"{len(ran)} part{'s' if len(ran) != 1 else ''} of ours"
    where = f"put into {many} to try the checker; found at the stage where each was put"
    where += f", {by_crash} by a crash" if by_crash else ""
    return _card("Planted bugs found", f"{found:,}", f"of {total:,}", where, lines)


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
    where = f"if {_shared_percent(trial)} of each prompt is shared: paged K/V cache against a dense one"
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


def _shared_percent(trial: Trial) -> str:
    """Which part of each sequence's pages all of them share, as the record's counts of pages say it."""
    data = trial.data
    counts = [data.get(name) for name in ("pages_shared", "pages_used", "sequences")]
    if not all(is_figure(count) for count in counts) or not counts[2]:
        return "a part"
    shared, used, sequences = counts
    whole = shared + (used - shared) / sequences
    return f"{100 * shared / whole:.0f} %" if whole else "a part"


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
