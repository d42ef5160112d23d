"""Published figures, audited: claims as data in, a verdict with its reason for each out; never torch, never a GPU."""

from __future__ import annotations

from flashcore.claims.auditing import VERDICTS, Audit, audit
from flashcore.claims.file import Claim, Claims, Gpu, load_claims, parse_claims
from flashcore.claims.findings import Finding

__all__ = ["VERDICTS", "Audit", "Claim", "Claims", "Finding", "Gpu", "audit", "load_claims", "parse_claims"]
