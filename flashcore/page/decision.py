"""The decision on the page: the options, every gate with its margin, what blocks and what to do next."""

from __future__ import annotations

from markupsafe import Markup, escape

from flashcore import html_tables, option_words
from flashcore.compare import number
from flashcore.page.parts import fold, short, signed
from flashcore.problem import parse_problem
from flashcore.verdict import Decision, GateResult

EVIDENCE_AT = {
    "correctness": "correctness", "attention_timing": "speed", "bisection": "correctness", "fault": "correctness",
    "sanitizer": "correctness", "gemm_candidate": "survey", "paging": "paging", "claim": "claims",
}  # fmt: skip
"""Where on the page the records of a kind are shown; of any other kind under 'provenance'."""


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
            percent = f" ({signed(gate.margin_percent, 1)} %)" if gate.margin_percent is not None else ""
            margin = f"{signed(gate.margin)} {short(gate.unit)}{percent}"
            if gate.metric == "correct_percent":
                margin = "none needed" if gate.margin == 0 else f"{signed(gate.margin)} %"
        kind = "" if gate.required else " fc-aim"
        name = Markup('<span class="fc-gate">{}</span><span class="fc-kind{}">{}</span><span class="fc-why">{}</span>')
        rows.append(
            {
                "Gate": name.format(
                    gate.title, kind, f"{'Required' if gate.required else 'An aim, not required'}. ", _detail(gate)
                ),
                "Result": Markup('<strong class="{}">{}</strong>').format(gate.state.lower(), gate.state),
                "Measured": "none" if gate.measured is None else f"{number(gate.measured)} {short(gate.unit)}",
                "Threshold": f"{gate.comparison} {gate.threshold:g} {short(gate.unit)}",
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
