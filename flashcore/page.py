"""The page's own parts: verdict banner, headline figures, gates, what blocks, and what the template needs besides."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from flashcore import html_tables, option_words, tables, verdict
from flashcore.compare import number
from flashcore.problem import parse_problem
from flashcore.records import RunFolder, Trial
from flashcore.verdict import Decision, Evidence, GateResult

if TYPE_CHECKING:
    from pandas import DataFrame

CARD_WORD = {"PASS": "met", "FAIL": "missed", "INCONCLUSIVE": "inconclusive"}


def banner_html(decision: Decision) -> str:
    """The verdict in words with its one-sentence reason, and where the evidence comes from."""
    css = decision.verdict.lower().replace("-", "")
    return (
        f'<div class="fc-banner {css}">'
        f'<p class="fc-verdict"><span class="fc-small">Verdict</span> {decision.verdict}</p>'
        f'<div><p class="fc-reason">{escape(decision.reason)}</p>'
        f'<p class="fc-evidence">{escape(decision.evidence)}</p></div></div>'
    )


def headline_html(decision: Decision) -> str:
    """The figures that matter, each with its target; taken from the gates, so that they cannot contradict them."""
    cards = []
    for metric, title in (
        ("tflops", "Best speed of ours"),
        ("ratio_to_best_peer", "Against the best peer"),
        ("latency_us", "Latency of a small call"),
    ):
        gates = [g for g in decision.gates if g.metric == metric]
        if gates:
            cards.append(_speed_card(title, gates))
    checks = [g for g in decision.gates if g.metric == "correct_percent" and g.required]
    if checks:
        cards.append(_correctness_card(checks))
    return f'<ul class="fc-cards">{"".join(cards)}</ul>'


def _speed_card(title: str, gates: Sequence[GateResult]) -> str:
    first = gates[0]
    value, unit = ("not measured", "") if first.measured is None else (number(first.measured), first.unit)
    where = "" if first.problem in ("", "any") else parse_problem(first.problem).label().replace(",", ", ")
    who = f"{first.backend}{f' against {first.versus}' if first.versus else ''}, " if first.backend else ""
    lines = []
    for gate in gates:
        kind = "Target" if gate.required else "Aim"
        word = f'<strong class="{gate.state.lower()}">{CARD_WORD[gate.state]}</strong>'
        lines.append(f"{kind} {gate.comparison} {gate.threshold:g} {gate.unit}: {word}")
    return _card(title, value, unit, f"{who}{where}", lines)


def _correctness_card(gates: Sequence[GateResult]) -> str:
    # Gates may share checks (one kernel's, and all of ours), so that the widest is counted, and not their sum.
    widest = max(gates, key=lambda gate: gate.n)
    right = round(widest.n * (widest.measured or 0) / 100)
    states = [g.state for g in gates]
    state = "FAIL" if "FAIL" in states else "INCONCLUSIVE" if "INCONCLUSIVE" in states else "PASS"
    passing = states.count("PASS")
    lines = [
        f'Target all of them: <strong class="{state.lower()}">{CARD_WORD[state]}</strong>',
        f"{passing} of {len(gates)} gates on correctness pass",
    ]
    where = f"{widest.title}, against float64"
    return _card("Checks that are right", f"{right:,}", f"of {widest.n:,}", where, lines)


def _card(title: str, value: str, unit: str, where: str, lines: Sequence[str]) -> str:
    below = "".join(f"<p>{line}</p>" for line in lines)
    css = "fc-value" if unit else "fc-value none"
    return (
        f'<li><h2 class="fc-card-title">{escape(title)}</h2><p class="{css}">{escape(value)} '
        f'<span class="fc-unit">{escape(unit)}</span></p><p class="fc-where">{escape(where)}</p>{below}</li>'
    )


def options_html(decision: Decision) -> str:
    """The options: which may ship and what decides; meaning and conditions are folded. Empty for none."""
    if not decision.options:
        return ""
    rows, told = [], option_words.matrix_rows(decision.options)
    for option, row in zip(decision.options, told, strict=True):
        name = Markup('<span class="fc-gate">{}</span><span class="fc-why">Effort: {}. Risk: {}.</span>')
        result = Markup('<strong class="{}">{}</strong><br><span class="fc-why">{}</span>')
        css = {"SHIP": "pass", "DO NOT SHIP": "fail"}.get(option.result, "inconclusive")
        rows.append(
            {
                "Option": name.format(row["Option"], option.effort, option.risk),
                "Result": result.format(css, row["Result"], row["Conditions"]),
                "What decides": option_words.nearest(option),
            }
        )
    table = html_tables.table_html(rows, "Options: what could be shipped", stack=True, css="fc-options")
    kept = ("Option", "What shipping it means", "What would change it")
    meanings = [{name: row[name] for name in kept} for row in told]
    numeric = ["Measured", "Threshold", "Margin"]
    conditions = option_words.condition_rows(decision.options)
    details = html_tables.table_html(meanings, "What each option means, and what would change the decision", stack=True)
    details += html_tables.table_html(conditions, "Every condition of every option", numeric=numeric, stack=True)
    return table + fold("What each option means, what would change the decision, and every condition", details)


def gates_html(decision: Decision) -> str:
    """Every gate: result, measured, threshold, margin, samples, spread, and where the evidence comes from."""
    rows = []
    for gate in decision.gates:
        margin = "–"
        if gate.margin is not None:
            percent = f" ({_signed(gate.margin_percent, 1)} %)" if gate.margin_percent is not None else ""
            margin = f"{_signed(gate.margin)} {_short(gate.unit)}{percent}"
            if gate.metric == "correct_percent":
                margin = "none needed" if gate.margin == 0 else f"{_signed(gate.margin)} %"
        kind = "" if gate.required else " fc-aim"
        name = Markup('<span class="fc-gate">{}</span><span class="fc-kind{}">{}</span><span class="fc-why">{}</span>')
        rows.append(
            {
                "Gate": name.format(
                    gate.title, kind, f"{'Required' if gate.required else 'An aim, not required'}. ", _detail(gate)
                ),
                "Result": Markup('<strong class="{}">{}</strong>').format(gate.state.lower(), gate.state),
                "Measured": "none" if gate.measured is None else f"{number(gate.measured)} {_short(gate.unit)}",
                "Threshold": f"{gate.comparison} {gate.threshold:g} {_short(gate.unit)}",
                "Margin": margin,
                "n": gate.n or "0",
                "5th–95th": f"{number(gate.spread[0])} to {number(gate.spread[1])}" if gate.spread else "–",
                "Evidence": f"recorded {(gate.source or '')[-10:]}".strip()
                if gate.evidence == "recorded"
                else gate.evidence,
            }
        )
    return html_tables.table_html(
        rows,
        "Gates: what was required, and what was measured",
        numeric=["Measured", "Threshold", "Margin", "n", "5th–95th"],
        note="n: samples of a timing, or checks. Margin: distance to the threshold, positive on the passing side. "
        "5th–95th: percentiles of the samples; a threshold between them settles nothing.",
        stack=True,
        css="fc-gates",
    )


def _detail(gate: GateResult) -> str:
    """What the table's other columns do not say."""
    if gate.state == "INCONCLUSIVE" or gate.metric not in ("tflops", "latency_us", "ratio_to_best_peer"):
        return gate.reason
    versus = f" against {gate.versus}" if gate.versus else ""
    return f"{gate.backend}{versus} at {parse_problem(gate.problem).label().replace(',', ', ')}."


def blockers_html(decision: Decision) -> str:
    """What stands between this run and GO, and the commands to run next."""
    if not decision.blocking:
        if decision.verdict == "GO":
            return '<p class="fc-lead">Nothing blocks: every required gate passes on fresh evidence.</p>'
        return f'<p class="fc-lead">No gate blocks, but the run does: {escape(decision.reason)}</p>'
    groups: dict[tuple[str, str], list[GateResult]] = {}
    commands: dict[str | None, list[GateResult]] = {}
    for gate in decision.blocking:
        groups.setdefault((gate.state, gate.reason), []).append(gate)
        commands.setdefault(gate.fix, []).append(gate)
    items = []
    for (state, reason), gates in groups.items():
        verb = ("fails", "fail") if state == "FAIL" else ("is not settled", "are not settled")
        names = "; ".join(g.title for g in gates)
        items.append(f"<li><strong>{escape(names)}</strong> {verb[len(gates) > 1]}. {escape(reason)}</li>")
    runs = []
    for command, gates in commands.items():
        what = "all of them" if len(commands) == 1 else "; ".join(g.title for g in gates)
        when = " again, after a change to the kernel" if all(g.state == "FAIL" for g in gates) else ""
        runs.append(f"<li><code>{escape(command)}</code> measures {escape(what)}{when}.</li>")
    return (
        f'<h3>What blocks</h3><ol class="fc-blockers">{"".join(items)}</ol>'
        f'<h3>What to run next</h3><ul class="fc-next">{"".join(runs)}</ul>'
    )


def correctness_html(evidence: Evidence) -> str:
    """The checks of this run, and those of the recorded run where this one had no GPU."""
    parts = []
    for heading, trials in _sources(evidence):
        parts += [heading, html_tables.correctness_table(trials), html_tables.findings_table(trials)]
    return "".join(parts)


def proof_html(evidence: Evidence) -> str:
    """What stands behind the checks: planted bugs found, clean runs silent, repeats alike, memory checked."""
    parts = []
    for heading, trials in _sources(evidence):
        if not any(t.kind == "fault" for t in trials):
            continue
        clean = tables.clean_runs_table(trials)
        parts += [heading, Markup("<p><strong>Planted bugs.</strong> {}.</p>").format(tables.faults_sentence(trials))]
        parts.append(_frame_html(clean.drop(columns=["dtypes", "seeds"], errors="ignore"), "Runs with nothing planted"))
        found = _frame_html(tables.fault_matrix(trials), "Planted bugs, and where bisection found them")
        parts.append(fold("Every planted bug", found))
        repeats = _frame_html(tables.determinism_table(trials), "The same inputs again: the same bits or not")
        memory = _frame_html(tables.sanitizer_table(trials), "compute-sanitizer")
        parts.append(fold("Repeated runs, and compute-sanitizer", repeats + memory))
    return "".join(parts) or html_tables.nothing("No planted bug is in these records; notebook 02 plants them.")


def _frame_html(frame: DataFrame, caption: str) -> str:
    rows = [{str(name).capitalize(): value for name, value in row.items()} for row in frame.to_dict("records")]
    return html_tables.table_html(rows, caption) if rows else html_tables.nothing(f"{caption}: no record.")


def machine_html(evidence: Evidence) -> str:
    """Builds, ceilings and environment of this run, and of the recorded one."""
    parts = [html_tables.build_table(evidence.trials)]
    for (heading, trials), environment in zip(
        _sources(evidence), (evidence.environment, evidence.gpu_environment), strict=False
    ):
        machine = fold("The machine before and after the run", html_tables.environment_table(environment))
        parts += [heading, html_tables.ceilings_table(trials), machine]
    return "".join(parts)


def fold(summary: str, content: str) -> str:
    """Content that shows only its summary until the reader asks for it."""
    return f'<details class="fc-fold inline"><summary>{escape(summary)}</summary>{content}</details>'


def _sources(evidence: Evidence) -> list[tuple[str, Sequence[Trial]]]:
    if evidence.recorded is None:
        return [("", evidence.trials)]
    recorded = f"Recorded on {evidence.recorded.gpu}, {evidence.recorded.date}"
    return [
        ("<h3>Live, on this machine</h3>", evidence.trials),
        (f"<h3>{escape(recorded)}</h3>", evidence.recorded.trials),
    ]


def resources(run: RunFolder, decision: Decision, evidence_html: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """What the template `index.html.j2` wants under the name `flashcore`.

    Parameters
    ----------
    evidence_html
        ``{"title", "html"}`` of each executed notebook, its body through `evidence.html.j2`.
    """
    evidence = verdict.gather(run)
    environment = evidence.environment
    notebooks = {str(t.data.get("name")): t for t in evidence.trials if t.kind == "notebook"}  # the last one counts
    failed = {name: t.reason or "no reason recorded" for name, t in notebooks.items() if t.status != "ok"}
    parameters = environment.get("parameters") or {}
    variables = (("PROFILE", "profile"), ("BACKEND", "backends"), ("PROBLEM", "problems"))
    chosen = [
        f"{variable}={shlex.quote(str(parameters[key]))}"
        for variable, key in variables
        if parameters.get(key) not in (None, "all", "default")
    ]
    command = " ".join(["make report", *chosen])
    return {
        "run": run.name,
        "title": "FlashCore status report",
        "decision": decision.as_dict(),
        "banner": banner_html(decision),
        "environment": environment,
        "gpu": evidence.gpu_environment.get("gpu"),
        "recorded": None
        if evidence.recorded is None
        else {"gpu": evidence.recorded.gpu, "date": evidence.recorded.date},
        "date": str(environment.get("date") or "")[:16].replace("T", " "),
        "evidence": list(evidence_html),
        "failed": failed,
        "command": command,
        "records": "\n".join(t.model_dump_json() for t in evidence.trials),
    }


def _signed(value: float, digits: int | None = None) -> str:
    text = number(abs(value)) if digits is None else f"{abs(value):.{digits}f}"
    return f"{'−' if value < 0 else '+'}{text}"


def _short(unit: str) -> str:
    return "%" if unit.startswith("%") else unit
