"""The status page, part by part: records and a decision in, HTML out, and a PDF that a browser prints.

Each module makes one part of the page, from the headline down to the provenance; `variants` says which parts a reader
gets, and `resources` gives what the template needs. Nothing here measures or imports torch.

Two rooms lie within: `drawing` makes figures and tables of records, for notebooks and the page alike, and `history`
holds runs against each other. Each loads when it is asked for, and so does each part of the page.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "AUDIENCES": "variants",
    "SECTIONS": "variants",
    "Variant": "variants",
    "anchored": "anchors",
    "banner_html": "headline",
    "blockers_html": "decision",
    "chosen": "sections",
    "claims_html": "claims",
    "correctness_html": "proof",
    "drawn": "parts",
    "elsewhere_html": "elsewhere",
    "fold": "drawing.html_tables",
    "gates_html": "decision",
    "headline_html": "headline",
    "machine_html": "proof",
    "opened": "sections",
    "options_html": "decision",
    "proof_html": "proof",
    "resources": "_resources",
    "since_html": "changes",
    "variant": "variants",
}

__all__ = [*_HOMES, "cleaning", "drawing", "history", "pdf", "policy"]


def __getattr__(name: str):
    if name in _HOMES:  # most of them load matplotlib, which comparing two runs does without
        return getattr(import_module(f"flashcore.page.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
