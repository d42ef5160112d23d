"""The decision on the page: the options, every gate with its margin, what blocks and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

from flashcore.decision import advice, compare
from flashcore.decision.compare import number
from flashcore.decision.verdict import Decision, GateResult
from flashcore.page.anchors import row_id
from flashcore.page.drawing import html_tables, paging_views
from flashcore.page.drawing.html_tables import fold
from flashcore.page.parts import short, signed
from flashcore.problem import parse_problem
from flashcore.surveys.paging import facts

EVIDENCE_AT = {
    "correct_percent": ("correctness", "Correctness"), "tflops": ("speed", "Speed"), "latency_us": ("speed", "Speed"),
    "ratio_to_best_peer": ("speed", "Speed"), "data.saved_percent": ("paging", "Sparse paging"),
}  # fmt: skip
"""Which section of the page shows the records behind a metric: its name, and its heading."""


def options_html(decision: Decision) -> str:
    """The options: which may ship and what decides; meaning and conditions are folded. Empty for none."""
    if not decision.options:
        return ""
    rows, told = [], advice.matrix_rows(decision.options)
    for option, row in zip(decision.options, told, strict=True):
        name = Markup('<span class="fc-gate">{}</span>')
        result = Markup('<strong class="{}">{}</strong><br><span class="fc-why">{}</span>')
        css = {"SHIP": "pass", "DO NOT SHIP": "fail"}.get(option.result, "inconclusive")
        rows.append(
            {
                "Option": name.format(row["Option"]),
                "Result": result.format(css, row["Result"], row["Conditions"]),
                "What decides": advice.nearest(option),
            }
        )
    table = html_tables.table_html(rows, "Options: what could be shipped", stack=True, css="fc-options")
    kept = ("Option", "What shipping it means", "What would change it")
    meanings = [
        {
            **{name: row[name] for name in kept},
            **_judged(row),
        }
        for row in told
    ]
    numeric = ["Measured", "Threshold", "Margin"]
    conditions = advice.condition_rows(decision.options)
    details = html_tables.table_html(meanings, "What each option means, and what would change the decision", stack=True)
    details += html_tables.table_html(conditions, "Every condition of every option", numeric=numeric, stack=True)
    return table + fold("What each option means, what would change the decision, and every condition", details)


def _judged(row: Mapping[str, str]) -> dict[str, str]:
    """Effort and risk under a heading that says whose words they are; nothing where nobody stands for them."""
    if "Judged by" not in row:
        return {}
    return {f"Effort and risk, as {row['Judged by']} judged them": f"{row['Effort']}; {row['Risk'].lower()} risk"}


def gates_html(decision: Decision) -> str:
    """Every gate: result, measured, threshold, margin, samples, interval, and where the evidence comes from."""
    rows = []
    for gate in decision.gates:
        margin = "–"
        if gate.margin is not None:
            percent = f" ({signed(gate.margin_percent, 1)} %)" if gate.margin_percent is not None else ""
            margin = f"{signed(gate.margin)} {short(gate.unit)}{percent}"
            if gate.metric in ("correct_percent", "kept_percent"):
                margin = "none needed" if gate.margin == 0 else f"{signed(gate.margin)} %"
        kind = "" if gate.required else " fc-aim"
        name = Markup('<span class="fc-gate">{}</span><span class="fc-kind{}">{}</span>')
        rows.append(
            {
                "Gate": name.format(gate.title, kind, "Required" if gate.required else "An aim, not required"),
                "Result": Markup('<strong class="{}">{}</strong>').format(gate.state.lower(), gate.state),
                "Measured": _measured(gate),
                "Threshold": f"{gate.comparison} {gate.threshold:g} {short(gate.unit)}",
                "Margin": margin,
                "Evidence": _evidence(gate),
                "On what, and where the threshold comes from": Markup(
                    '<span class="fc-detail">{}</span> <span class="fc-why">{}</span>'
                ).format(_detail(gate), gate.why),
            }
        )
    return html_tables.table_html(
        rows,
        "Gates: what was required, and what was measured",
        numeric=["Measured", "Threshold", "Margin"],
        note="Small, under a figure: the interval that holds the true median in "
        f"{compare.CONFIDENCE:g} of 100 cases, and the number of samples. A threshold inside it settles nothing. "
        "Margin: distance to the threshold, positive on the passing side, and in % of the threshold.",
        stack=True,
        css="fc-gates",
    )


def _measured(gate: GateResult) -> Any:
    """The figure, and below it what stands behind: samples with the interval of the median, or checks."""
    if gate.measured is None:
        return "none"
    behind = f"{compare.between(gate.interval)}, n {gate.n}" if gate.interval else gate.confidence
    return Markup('{} {} <span class="fc-behind">{}</span>').format(number(gate.measured), short(gate.unit), behind)


def _detail(gate: GateResult) -> str:
    """What the table's other columns do not say."""
    if gate.state == "INCONCLUSIVE" or gate.metric not in ("tflops", "latency_us", "ratio_to_best_peer"):
        return gate.reason
    versus = f" against {gate.versus}" if gate.versus else ""
    return f"{gate.backend}{versus} at {parse_problem(gate.problem).label().replace(',', ', ')}."


def _evidence(gate: GateResult) -> str:
    """Live or recorded, as a link to the section that shows the records."""
    word = f"recorded {(gate.source or '')[-10:]}".strip() if gate.evidence == "recorded" else gate.evidence
    if gate.evidence == "none" or gate.metric not in EVIDENCE_AT:
        return word
    section, heading = EVIDENCE_AT[gate.metric]
    link = '<a href="#{}" data-row="{}"{}>{}<span class="fc-unseen">, shown under {}</span></a>'
    which = Markup(' data-cell="{}"').format(gate.backend) if gate.metric == "latency_us" else ""  # a row a backend
    which += Markup(" data-last") if gate.evidence == "recorded" else ""
    return Markup(link).format(section, _row(gate), which, word, heading)


def _row(gate: GateResult) -> str:
    """The id of the row that holds the figure; `anchors` leads to the section instead where there is none."""
    where = "" if gate.problem in ("", "any") else html_tables.spaced(parse_problem(gate.problem))
    if gate.metric == "correct_percent":
        return row_id(html_tables.AGREEMENT, gate.backend or "")
    if gate.metric == "latency_us":
        return row_id(html_tables.SMALL, where)
    if gate.metric in ("tflops", "ratio_to_best_peer"):
        return row_id(html_tables.AGAINST_PEERS, where)
    return row_id(paging_views.MEMORY, facts.MEMORY_WORDS["shared_prefix"])


def blockers_html(decision: Decision) -> str:
    """What stands between this run and GO, and what to do next: commands to run, or what shipping means."""
    if not decision.blocking:
        return _unblocked(decision)
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
        f'<h3>What to do next</h3><ul class="fc-next">{"".join(runs)}</ul>'
    )


def _unblocked(decision: Decision) -> str:
    """Every required gate passes: then the run is complete and something ships, or the run itself is in the way."""
    if decision.verdict != "GO":
        return (
            f'<h3>What blocks</h3><p class="fc-lead">No gate blocks, but the run does: {escape(decision.reason)}</p>'
            '<h3>What to do next</h3><p class="fc-lead"><code>flashcore report</code> makes the report again; '
            "<code>flashcore report --only PART</code> does one part of this run again.</p>"
        )
    lines = ["Nothing blocks: every required gate passes on fresh evidence."]
    missed = [g.title for g in decision.gates if not g.required and g.state != "PASS"]
    if missed:
        lines.append(f"Aims that are not reached, and not required: {'; '.join(missed)}.")
    said = "".join(f'<p class="fc-lead">{escape(line)}</p>' for line in lines)
    best = decision.recommended
    if best is None:
        return f"<h3>What blocks</h3>{said}"
    return (
        f"<h3>What blocks</h3>{said}<h3>What to do next</h3>"
        f'<p class="fc-lead">Ship option {escape(best.id)}, {escape(best.title)}. {escape(best.means)}</p>'
    )
