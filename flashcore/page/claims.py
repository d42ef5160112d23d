"""The claims audit on the page: each published figure, the verdict on it in words, why, and FlashCore's own figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup, escape

from flashcore.decision import claims
from flashcore.decision.claims.findings import time_words
from flashcore.decision.compare import number
from flashcore.decision.verdict import Evidence
from flashcore.errors import FlashCoreError
from flashcore.page.drawing import html_tables
from flashcore.page.drawing.html_tables import fold

CSS = {"confirmed": "pass", "contradicted": "fail", "impossible": "fail"}
WORDS = {"impossible": "beyond the data sheet"}
"""What a verdict is called on the page, where its own word says more than a data sheet can."""


def claims_html(evidence: Evidence) -> str:
    """The claims that FlashCore ships, audited with this run's records; a sentence where the file cannot be read."""
    try:
        found = claims.audit(
            claims.load_claims(), evidence.gpu_trials, environment=evidence.gpu_environment,
            current_hashes=evidence.current_hashes,
        )  # fmt: skip
    except FlashCoreError as error:
        return html_tables.nothing(f"The claims could not be audited: {error}")
    return audit_html(found)


def audit_html(audits: Sequence[claims.Audit]) -> str:
    """How many claims fell, the table of them, those that did not stand first, and what each check found, folded."""
    if not audits:
        return html_tables.nothing("There is no claim to audit.")
    worst = ("impossible", "contradicted", "undefined", "not checkable", "confirmed")
    rows = [
        {
            "Claim": one.claim.text,
            "Figure": one.claim.figure,
            "Verdict": Markup('<strong class="{}">{}</strong>').format(
                CSS.get(one.verdict, "inconclusive"), WORDS.get(one.verdict, one.verdict)
            ),
            "Reason": Markup("{}{}").format(one.reason, _note(one)),
            "Measured by FlashCore": own_figure(one),
        }
        for one in sorted(audits, key=lambda one: worst.index(one.verdict))
    ]
    counts = Counter(one.verdict for one in audits)
    counted = ", ".join(f"{counts[word]} {WORDS.get(word, word)}" for word in worst if counts[word])
    lead = f"{len(audits)} published figure{'s' if len(audits) != 1 else ''}: {counted}."
    meanings = " ".join(
        f"{WORDS.get(word, word).capitalize()}: {claims.VERDICTS[word]}." for word in worst if counts[word]
    )
    fallen = sum(counts[word] for word in worst[:3])
    parts = (("Claims that do not stand", rows[:fallen]), ("The other claims", rows[fallen:]))
    shown, rest = (
        html_tables.table_html(part, caption, stack=True, css="fc-claims")
        if part else "" for caption, part in parts
    )  # fmt: skip
    table = f'{shown}<p class="fc-note">{escape(meanings)}</p>{fold("The other claims", rest) if rest else ""}'
    checks = [
        {"Claim": f"{one.claim.text} ({one.claim.figure})", "Check": f.check,
         "Outcome": WORDS.get(f.outcome, f.outcome), "Found": f.sentence, "Source": one.claim.source}
        for one in audits for f in one.findings
    ]  # fmt: skip
    every = html_tables.table_html(checks, "What each check of each claim found", stack=True) if checks else ""
    return f'<p class="fc-lead">{escape(lead)}</p>{table}{fold("Every check of every claim", every) if every else ""}'


def own_figure(one: claims.Audit) -> str:
    """What was measured of the same thing here, with the backend that did it; or that nothing was."""
    if not one.of("measurement"):
        return "nothing to measure"  # it follows from the workload
    found = [f for f in one.of("measurement") if f.against is not None]
    if not found:
        return "not measured"
    first = next((f for f in found if f.outcome != "beside"), found[0])
    figure = time_words(first.against) if first.unit in ("µs", "us") else f"{number(first.against)} {first.unit}"
    return f"{figure.strip()}{f' ({first.backend})' if first.backend else ''}"


def _note(one: claims.Audit) -> Markup:
    """What is known of the figure besides: that a sum is right does not make the kernel right."""
    return Markup(' <span class="fc-why">Note: {}</span>').format(one.claim.note) if one.claim.note else Markup("")
