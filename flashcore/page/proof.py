"""The proof on the page: checks of results, planted bugs, what the compiler made, and the machine before and after."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from flashcore import tables
from flashcore.decision.verdict import Evidence
from flashcore.page.anchors import row_id
from flashcore.page.drawing import html_tables, invariance_views
from flashcore.page.drawing.html_tables import fold
from flashcore.page.parts import frame_html
from flashcore.records import Trial
from flashcore.surveys.invariance import facts as invariance

MOST_OPEN = 8
"""Rows of checks that stand open; more are folded behind the sentence that says what they came to."""


def correctness_html(evidence: Evidence) -> str:
    """The checks of this run, and those of the recorded run where this one had no GPU."""
    parts = []
    for heading, trials in _sources(evidence):
        said, table = html_tables.correctness_sentence(trials), html_tables.correctness_table(trials)
        if len({t.backend for t in trials if t.kind == "correctness" and t.status != "unavailable"}) > MOST_OPEN:
            table = fold("Every implementation, and its error nearest the bound", table)
        parts += [heading, f"<p>{escape(said)}</p>" if said else "", table, html_tables.findings_table(trials)]
    return "".join(parts)


def proof_html(evidence: Evidence) -> str:
    """What stands behind the checks: planted bugs found, clean runs silent, repeats alike, memory checked."""
    parts = []
    for heading, trials in _sources(evidence):
        promises = _diagnoses_html(trials) + _told_html(trials) + _promises_html(trials) + _invariance_html(trials)
        if not any(t.kind == "fault" for t in trials):
            parts += [heading, promises] if promises else []
            continue
        clean, ids = tables.clean_runs_table(trials), {t.backend for t in trials}
        parts += [heading, Markup("<p><strong>Planted bugs.</strong> {}.</p>").format(tables.faults_sentence(trials))]
        parts.append(frame_html(clean.drop(columns=["dtypes", "seeds"], errors="ignore"), "Runs with nothing planted"))
        found = frame_html(tables.fault_matrix(trials), "Planted bugs, and where bisection found them", ids=ids)
        parts.append(fold("Every planted bug", found))
        parts.append(_exploits_html(trials))
        parts.append(promises)
        repeats = frame_html(tables.determinism_table(trials), "The same inputs again: the same bits or not")
        memory = frame_html(tables.sanitizer_table(trials), "compute-sanitizer")
        parts.append(fold("Repeated runs, and compute-sanitizer", repeats + memory))
    return "".join(parts) or html_tables.nothing("No planted bug is in these records; notebook 02 plants them.")


def _exploits_html(trials: Sequence[Trial]) -> str:
    """Ways to look fast or right without being so, and what saw through each; empty for a run that planted none."""
    if not any(t.kind == "exploit" for t in trials):
        return ""
    said = Markup("<p><strong>Exploits.</strong> {}.</p>").format(tables.exploits_sentence(trials))
    return str(said) + fold(
        "Every exploit", frame_html(tables.exploits_table(trials), "Exploits, and what caught them")
    )


def _diagnoses_html(trials: Sequence[Trial]) -> str:
    """What outputs alone told of functions that were diagnosed; empty for a run that diagnosed none."""
    found = tables.diagnoses_table(trials)
    if not len(found):
        return ""
    said = Markup("<p><strong>Diagnosis.</strong> {}.</p>").format("; ".join(found["finding"]))
    return str(said) + frame_html(found, "Functions diagnosed from their outputs alone", ids=set(found["backend"]))


def _told_html(trials: Sequence[Trial]) -> str:
    """What outputs alone told of planted bugs, and of right code; empty for a run that did not ask."""
    proofs = tables.proofs_of(trials)
    if not proofs:
        return ""
    said = Markup("<p><strong>Told from outputs alone.</strong> The same bugs once more, with every stage hidden: {}."
                  "</p>").format(tables.diagnosis_sentence(proofs))  # fmt: skip
    ids = {t.backend for t in proofs}
    counts = frame_html(tables.diagnosis_counts(proofs), "Planted bugs and right code, told from outputs", ids=ids)
    untold = [t for t in proofs if t.data.get("outcome") in ("elsewhere", "missed")]
    failed = frame_html(tables.diagnosis_table(untold), "Bugs that outputs did not tell", ids=ids) if untold else ""
    alike = {str(t.data["expected"]): str(t.data["looks_alike"]) for t in proofs if t.data.get("looks_alike")}
    reasons = "".join(Markup("<li>{}: {}.</li>").format(stage, why) for stage, why in sorted(alike.items()))
    why = f"<p>Stages that no output tells apart:</p><ul>{reasons}</ul>" if reasons else ""
    return str(said) + fold("Every implementation that was asked", counts + failed + why)


def _promises_html(trials: Sequence[Trial]) -> str:
    """Which promises of attention each implementation keeps; empty for a run that asked for none."""
    asked = tables.promises_of(trials)
    if not asked:
        return ""
    ids = {t.backend for t in asked}
    said = Markup("<p><strong>Promises of attention.</strong> {}. ‘Not promised’ is no fault: the table says who keeps "
                  "a promise that binds nobody.</p>").format(tables.conform_sentence(asked))  # fmt: skip
    table = frame_html(tables.conform_table(asked), "Promises: kept, broken or refused", ids=ids)
    breaks = tables.conform_breaks_table(asked)
    why = frame_html(breaks, "What was not kept, and on which case") if len(breaks) else ""
    return str(said) + fold("Every promise", table + why)


def _invariance_html(trials: Sequence[Trial]) -> str:
    """Whose bits are the same in every batch, in how many cases; empty for a run that asked nobody."""
    asked = invariance.records_of(trials)
    if not asked:
        return ""
    said = Markup("<p><strong>The same bits in every batch.</strong> {}. {}.</p>").format(
        invariance.promised(asked), invariance.PROMISE
    )
    said += _cost_html(trials)
    ids = {t.backend for t in asked}
    table = frame_html(invariance.table(asked), "Cases kept, of those asked, by the two ways compared", ids=ids)
    breaks = invariance.breaks_table(asked)
    why = frame_html(breaks, "Breaks, made smaller, and the Python that asks each again") if len(breaks) else ""
    others = invariance.unpromised(asked)
    told = f"{others[:1].upper()}{others[1:]}. " if others else ""
    meaning = f'<p class="fc-note">{escape(f"{told}{invariance.COMPARED}")}.</p>'
    return str(said) + fold("Every pair of ways", meaning + table + why)


def _cost_html(trials: Sequence[Trial]) -> Markup:
    """What the mode costs, with a link to its table among the speeds; empty where it was not timed."""
    costs = invariance_views.costs(trials)
    if not costs:
        return Markup("")
    row = row_id(invariance_views.CAPTION, invariance_views.row_heading(costs[0], costs))
    link = '<p>{} <a href="#speed" data-row="{}">What each problem costs</a> stands under Speed.</p>'
    return Markup(link).format(invariance_views.sentence(costs), row)


def machine_html(evidence: Evidence) -> str:
    """Builds, ceilings and environment of this run, and of the recorded one."""
    parts = [
        fold("Every kernel as compiled: registers, spills, shared memory", html_tables.build_table(evidence.trials))
    ]
    for (heading, trials), environment in zip(
        _sources(evidence), (evidence.environment, evidence.gpu_environment), strict=False
    ):
        machine = fold("The machine before and after the run", html_tables.environment_table(environment))
        parts += [heading, html_tables.ceilings_table(trials), machine]
    return "".join(parts)


def _sources(evidence: Evidence) -> list[tuple[str, Sequence[Trial]]]:
    if evidence.recorded is None:
        return [("", evidence.trials)]
    recorded = f"Recorded on {evidence.recorded.gpu}, {evidence.recorded.date}"
    return [
        ("<h3>Live, on this machine</h3>", evidence.trials),
        (f"<h3>{escape(recorded)}</h3>", evidence.recorded.trials),
    ]
