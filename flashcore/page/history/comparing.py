"""Compare two runs: one object that says what became faster, slower, wrong or right, and what limits the comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashcore.page.history.changes import Difference, differences
from flashcore.page.history.interval import CONFIDENCE, MATTERS, USUAL_DRIFT, WORDS
from flashcore.page.history.runs import Snapshot
from flashcore.page.history.timings import Basis, Pair, Row, rows


@dataclass(frozen=True)
class Comparison:
    """Run `now` against run `before`."""

    before: Snapshot
    now: Snapshot
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    drift_percent: dict[str, float]
    """By basis, how far unchanged peers moved between the runs; every interval is widened by it."""
    limits: tuple[str, ...]
    """How far the comparison is honest, as sentences."""

    def drift(self, basis: Basis) -> float:
        """The drift as a share; the usual one where no row was compared on that basis."""
        return self.drift_percent.get(basis, 100 * USUAL_DRIFT) / 100

    @property
    def regressions(self) -> list[str]:
        """Sentences on what fails `--strict`."""
        slower = [f"{sentence(row)}" for row in self.rows if row.regression]
        # Another kind of machine measures other things; on one kind, what was to be measured and is gone is a finding.
        alike = Pair(self.before, self.now).same_machine
        grave = [d for d in self.differences if d.regression and (alike or d.topic != "coverage lost")]
        return [*(d.sentence for d in grave), *slower]

    @property
    def judged(self) -> int:
        """Timings of ours that could be held against each other on one kind of machine."""
        return sum(row.judged for row in self.rows)

    @property
    def summary(self) -> str:
        """One sentence: how many timings of ours took which course."""
        counts = Counter(row.word for row in self.rows if row.role == "ours")
        if not counts:
            return "The runs have no timing of ours in common."
        parts = [f"{counts[word]} {word}" for word in WORDS if counts[word]]
        return f"Of {counts.total()} timings of ours in both runs: {', '.join(parts)}."

    def as_dict(self) -> dict[str, Any]:
        """Plain data for machines."""
        return {
            "before": _run(self.before), "now": _run(self.now), "summary": self.summary,
            "confidence_percent": CONFIDENCE, "regression_beyond_percent": 100 * MATTERS,
            "drift_percent": self.drift_percent, "limits": list(self.limits), "regressions": self.regressions,
            "rows": [row.as_dict() for row in self.rows], "differences": [asdict(d) for d in self.differences],
        }  # fmt: skip


def compare_runs(before: Snapshot, now: Snapshot) -> Comparison:
    """Compare two runs. Never raises for what their records contain."""
    pair = Pair(before, now)
    by_key, drifts = rows(pair)
    found = list(by_key.values())
    used = {row.basis for row in found if row.basis != "none"}
    drift = {basis: 100 * value for basis, value in drifts.items() if basis in used}
    return Comparison(before, now, tuple(found), tuple(differences(pair)), drift, tuple(_limits(pair, found)))


def sentence(row: Row) -> str:
    """One row in words."""
    where = f"{row.backend} at {row.problem.replace(',', ', ')}"
    if row.percent is None or row.interval_percent is None:
        return f"{where}: {row.word}{f'; {row.note}' if row.note else ''}."
    low, high = row.interval_percent
    how = f"relative to {row.peer}" if row.basis == "relative" else "by its absolute latency"
    kernels = "; other kernel source" if row.other_source else ""
    return f"{where}: {row.word}, {signed(row.percent)} % ({signed(low)} to {signed(high)} %) {how}{kernels}."


def signed(value: float) -> str:
    """A figure in % with its sign and one digit."""
    return f"{'−' if value < 0 else '+'}{abs(value):,.1f}"


def _run(run: Snapshot) -> dict[str, Any]:
    return {
        "name": run.name, "date": run.date, "machine": run.machine, "environment": run.environment.get("id"),
        "trials": len(run.trials), "finished": run.finished,
    }  # fmt: skip


def _limits(pair: Pair, found: Sequence[Row]) -> list[str]:
    before, now = pair.before, pair.now
    said = []
    if before.trials and before.trials == now.trials:
        said.append("Both are the same records.")
    if before.date and now.date and before.date > now.date:
        said.append("The first run is the newer one: 'now' is the older of the two.")
    if not pair.same_machine:
        names = [run.machine or "a machine that is not known" for run in (before, now)]
        said.append(
            f"The machines are not known to be alike ({names[0]}, then {names[1]}): only ratios to a common peer are "
            "compared, no latencies, and no row counts as a regression."
        )
    else:
        cards = [run.facts.get("uuid") for run in (before, now)]
        if all(cards) and cards[0] != cards[1]:
            said.append(f"Two cards of one name ({now.machine}): they differ by a little at the same clocks.")
    if pair.peer_software:
        said.append(
            f"The peers' software changed ({', '.join(pair.peer_software)}), so latencies are compared, which hold "
            "clocks and heat too."
        )
    elif any(row.basis == "absolute" for row in found):
        said.append("Rows compared by absolute latency hold clocks and heat too: no peer was timed beside them.")
    versions = [sorted({t.schema_version for t in run.trials}) for run in (before, now)]
    if all(versions) and versions[0] != versions[1]:
        said.append(
            f"The records are of schema versions {versions[0]} and {versions[1]}; what only one has is missing."
        )
    if any(row.other_source for row in found):
        said.append("Where the kernel's source changed, two kernels are compared, and not one kernel on two days.")
    said += [f"{run.name}: {problem}" for run in (before, now) for problem in run.problems]
    said += [
        f"{run.name} is not a finished run, so what it lacks says little." for run in (before, now) if not run.finished
    ]
    return said
