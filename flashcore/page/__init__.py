"""The status page, part by part: records and a decision in, HTML out, and a PDF that a browser prints.

Each module makes one part of the page, from the headline down to the provenance; `variants` says which parts a reader
gets, and `resources` what the template needs. Nothing here measures or imports torch; figures come from `drawing`.
"""

from __future__ import annotations

from flashcore.page.anchors import anchored
from flashcore.page.changes import since_html
from flashcore.page.claims import claims_html
from flashcore.page.decision import blockers_html, gates_html, options_html
from flashcore.page.headline import banner_html, headline_html
from flashcore.page.parts import drawn, fold
from flashcore.page.proof import correctness_html, machine_html, proof_html
from flashcore.page.resources import resources
from flashcore.page.sections import chosen, opened
from flashcore.page.variants import AUDIENCES, SECTIONS, Variant, variant

__all__ = [
    "AUDIENCES", "SECTIONS", "Variant", "anchored", "banner_html", "blockers_html", "chosen", "claims_html", "cleaning",
    "correctness_html", "drawn", "fold", "gates_html", "headline_html", "machine_html", "opened", "options_html", "pdf",
    "policy", "proof_html", "resources", "since_html", "variant",
]  # fmt: skip
