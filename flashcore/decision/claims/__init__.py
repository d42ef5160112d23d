"""Published figures, audited: claims as data in, a verdict with its reason for each out.

`file` reads the claims, `physics` holds them against what a chip can do, `checks` against each other, and `measured`
against a run; `auditing` puts it together. Nothing here imports torch or needs a GPU.
"""

from __future__ import annotations

from flashcore.decision.claims.auditing import VERDICTS, Audit, audit
from flashcore.decision.claims.file import Claim, Claims, Gpu, load_claims, parse_claims
from flashcore.decision.claims.findings import Finding

__all__ = ["VERDICTS", "Audit", "Claim", "Claims", "Finding", "Gpu", "audit", "findings", "load_claims", "parse_claims"]
