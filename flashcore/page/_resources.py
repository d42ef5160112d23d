"""What the template `index.html.j2` needs besides the notebook's cells: the head, the records, the provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashcore.decision import verdict
from flashcore.decision.verdict import Decision, Evidence
from flashcore.page.drawing import fleet_views
from flashcore.page.headline import banner_html
from flashcore.page.parts import drawn
from flashcore.page.provenance import provenance_html
from flashcore.page.variants import SHORT, Variant
from flashcore.paths import data_dir
from flashcore.records import MARK, RunFolder

MOST_RECORD_BYTES = 1_200_000
"""Of all records in a page, which stays under 2 MB; those of the recorded run give way first."""


def resources(
    run: RunFolder,
    decision: Decision,
    evidence_html: Sequence[Mapping[str, str]] = (),
    *,
    variant: Variant | None = None,
    left_out: Sequence[str] = (),
    damaged: Sequence[str] = (),
) -> dict[str, Any]:
    """What the template wants under the name `flashcore`.

    Parameters
    ----------
    evidence_html
        ``{"title", "html"}`` of each executed notebook, its body through `evidence.html.j2`.
    left_out
        Titles of executed notebooks that would have made the page too large.
    damaged
        Names of executed notebooks whose file cannot be read.
    """
    evidence, variant = verdict.gather(run), variant or Variant()
    environment = evidence.environment
    notebooks = {str(t.data.get("name")): t for t in evidence.trials if t.kind == "notebook"}  # the last one counts
    gpu = evidence.gpu_environment.get("gpu")
    return {
        "run": run.name,
        "title": variant.title,
        "short": SHORT,
        "organisation": variant.organisation,
        "logo": variant.logo,
        "page_title": ", ".join(filter(None, [f"{decision.verdict}: {variant.title}", gpu, variant.organisation])),
        "summary": summary(decision),
        "decision": decision.as_dict(),
        "banner": banner_html(decision, run=run.name),
        "gpu": gpu,
        "recorded": None
        if evidence.recorded is None
        else {"gpu": evidence.recorded.gpu, "date": evidence.recorded.date},
        "date": str(environment.get("date") or "")[:16].replace("T", " "),
        "fleet": _fleet(evidence) if variant.has("fleet") else "",
        "evidence": list(evidence_html) if variant.has("evidence") else None,
        "left_out": list(left_out),
        "damaged": list(damaged),
        "failed": {n: t.reason or "no reason recorded" for n, t in notebooks.items() if t.status != "ok"},
        "provenance": provenance_html(run.name, decision, evidence) if variant.has("provenance") else None,
        "records": embedded_records(run, evidence),
        "too_large": None if _size(run.records_path) <= MOST_RECORD_BYTES else f"{_size(run.records_path) / 1e6:,.1f}",
    }


def _fleet(evidence: Evidence) -> str:
    """The section on a run's cards; empty for a run of one process."""
    return drawn("The cards", lambda: fleet_views.section_html(evidence.trials, evidence.environment))


def summary(decision: Decision) -> str:
    """The page in two or three sentences, for whoever is sent it: verdict, reason, and where the figures come from."""
    return " ".join(filter(None, [f"{decision.verdict}.", decision.reason, decision.evidence]))


def embedded_records(run: RunFolder, evidence: Evidence) -> list[dict[str, str]]:
    """The records behind the page, each file as the text that it is: of the run, and of the recorded run it shows.

    Those of a run that would make the page too large to be mailed are left out; the page says where they lie.
    """
    found = []
    text = _text(run.records_path) if _size(run.records_path) <= MOST_RECORD_BYTES else ""
    if text.strip():
        found.append({"id": "fc-records", "file": f"{run.name}-records.jsonl", "label": "the records of this run",
                      "text": _safe(text)})  # fmt: skip
    recorded = evidence.recorded
    if recorded is not None:
        text = _text(data_dir("reports") / "recorded" / recorded.folder / "records.jsonl")
        if text.strip() and len(text) + sum(len(f["text"]) for f in found) <= MOST_RECORD_BYTES:
            found.append({"id": "fc-records-recorded", "file": f"recorded-{recorded.folder}-records.jsonl",
                          "label": f"the records of the recorded run ({recorded.gpu}, {recorded.date})",
                          "text": _safe(text)})  # fmt: skip
    return found


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _text(path: Path) -> str:
    """A records file as it is: only a line feed ends its lines."""
    try:
        return path.read_bytes().removeprefix(MARK).decode(errors="replace")
    except OSError:
        return ""


def _safe(text: str) -> str:
    """JSON lines that no HTML parser ends early: in JSON a ``<`` stands in strings alone, where it may be escaped."""
    return text.replace("<", "\\u003c")
