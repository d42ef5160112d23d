"""Audit claims: published figures against physics, arithmetic, each other, and what a run measured.

A claim is confirmed when arithmetic, a data sheet or this run agrees with it. That says its numbers are consistent, or
were measured again; it does not say that the original measurement was made right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flashcore.decision.claims import checks
from flashcore.decision.claims.file import Claim, Claims
from flashcore.decision.claims.findings import Finding
from flashcore.decision.claims.measured import Run, measured_roof, measurement
from flashcore.decision.claims.physics import physics
from flashcore.decision.judging import Source
from flashcore.records import Trial

Verdict = Literal["impossible", "contradicted", "undefined", "confirmed", "not checkable"]
VERDICTS: dict[str, str] = {
    "confirmed": "arithmetic, the data sheet or this run agrees with it; that does not show how it was measured",
    "contradicted": "arithmetic, another claim, the data sheet or this run's measurement says otherwise",
    "impossible": "beyond what the data sheet of its GPU allows",
    "undefined": "it leaves out what anybody would need to check it",
    "not checkable": "nothing here speaks for it or against it",
}
"""The verdicts on a claim, and what each one means."""
REFUTED = ("impossible", "contradicted")
ORDER = ("physics", "arithmetic", "contradiction", "definition", "measurement")
"""The checks, as they are listed."""
_WORST_FIRST = ("impossible", "contradicted", "undefined", "confirmed")


@dataclass(frozen=True)
class Audit:
    """One claim, the verdict on it, and what each check found."""

    claim: Claim
    verdict: Verdict
    reason: str
    """What settled it, in a sentence or two."""
    findings: tuple[Finding, ...]

    def of(self, check: str) -> tuple[Finding, ...]:
        """The findings of one check."""
        return tuple(finding for finding in self.findings if finding.check == check)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and for a page."""
        claim = self.claim
        findings = [{**asdict(f), "interval": f.interval and list(f.interval)} for f in self.findings]
        return {
            "id": claim.id, "text": claim.text, "source": claim.source, "note": claim.note, "quantity": claim.quantity,
            "value": float(claim.value), "unit": claim.unit, "claimed": claim.figure, "attributed_to": claim.backend,
            "gpu": claim.gpu, "verdict": self.verdict, "reason": self.reason, "findings": findings,
        }  # fmt: skip

    def to_trial(self) -> Trial:
        """The audit of the claim as a record of kind `claim`."""
        return Trial(kind="claim", problem=self.claim.workload, data=self.as_dict())


def audit(
    claims: Claims,
    trials: Sequence[Trial] = (),
    *,
    environment: Mapping[str, Any] | None = None,
    current_hashes: Mapping[str, str] | None = None,
) -> list[Audit]:
    """Check every claim of a file by itself, against the others, and against a run's records.

    Parameters
    ----------
    claims
        What `load_claims` read.
    trials
        Records of the run to compare with; none leaves the measurements out.
    environment
        That run's `environment.json`: which GPU it had, and which records are of it.
    current_hashes
        Kernel name to hash of its source now; a timing of another source settles nothing. None takes each as current.

    Returns
    -------
    list of Audit
        One for each claim, in the file's order. Never raises for what the trials contain.
    """
    if current_hashes is None:
        current_hashes = {t.source_hash: t.source_hash for t in trials if t.source_hash}
    run = Run(Source("live", tuple(trials), environment or {}, current_hashes), claims.gpus)
    alone = {claim.id: _by_itself(claim, claims, run) for claim in claims}
    fallen = frozenset(id_ for id_, found in alone.items() if any(f.outcome in REFUTED for f in found))
    others = checks.same_thing(claims)
    audits = []
    for claim in claims:
        pairs = [checks.against(claim, other, fallen=other.id in fallen) for other in others[claim.id]]
        together = [*checks.links(claim, claims, fallen=fallen), *filter(None, pairs), *checks.definition(claim)]
        audits.append(_judge(claim, sorted([*alone[claim.id], *together], key=lambda f: ORDER.index(f.check))))
    return audits


def _by_itself(claim: Claim, claims: Claims, run: Run) -> list[Finding]:
    """What needs no other claim to be right."""
    gpu = run.sheet if claim.gpu is None else claims.gpu(claim.gpu)
    return [
        *physics(claim, gpu), *measured_roof(claim, run), *checks.arithmetic(claim), *measurement(claim, claims, run),
    ]  # fmt: skip


def _judge(claim: Claim, findings: Sequence[Finding]) -> Audit:
    """The worst outcome that settles anything, with what settled it as the reason."""
    outcomes = {finding.outcome for finding in findings}
    verdict = next((word for word in _WORST_FIRST if word in outcomes), "not checkable")
    if verdict == "not checkable":
        rest = [f.sentence for f in findings if f.check == "measurement"]
        return Audit(claim, verdict, " ".join(["No second figure for it is given.", *rest[:1]]), tuple(findings))
    wanted = REFUTED if verdict == "impossible" else (verdict,)
    telling = [f for f in findings if f.outcome in wanted]
    if verdict == "undefined":
        telling += [f for f in findings if f.check == "physics" and f.outcome == "beside"]
    first = {f.check: f for f in reversed(telling)}
    sentences = [f.sentence for f in telling if first[f.check] is f]
    return Audit(claim, verdict, " ".join(sentences[:2]), tuple(findings))
