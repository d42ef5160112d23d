"""The same kernels on other GPUs: what the recorded runs beside the one that is shown came to, in a sentence each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from markupsafe import escape

from flashcore.decision import verdict
from flashcore.decision.compare import number
from flashcore.decision.evidence import Recorded, recorded_runs, spoken
from flashcore.decision.gates import Gates, load_gates
from flashcore.decision.verdict import Evidence, GateResult
from flashcore.paths import data_dir
from flashcore.records import RunFolder


def elsewhere_html(run: RunFolder, evidence: Evidence, *, recorded_dir: Path | None = None) -> str:
    """A note on each recorded run but the one that the page is about; empty where the page is about none of them.

    Parameters
    ----------
    recorded_dir
        Where the recorded runs lie (default: ``reports/recorded``). They are judged by the project's own gates.
    """
    root = recorded_dir or data_dir("reports") / "recorded"
    shown = evidence.recorded.folder if evidence.recorded is not None else run.name
    runs, _ = recorded_runs(root)
    if shown not in [other.folder for other in runs]:
        return ""
    gates = load_gates()
    said = [_sentence(other, evidence.current_hashes, gates) for other in reversed(runs) if other.folder != shown]
    return "".join(f'<p class="fc-note">{escape(sentence)}</p>' for sentence in said)


def _sentence(other: Recorded, current_hashes: Mapping[str, str], gates: Gates) -> str:
    """What one of them came to, where its kernels are those of today."""
    where = f"on {other.gpu}, recorded {other.date}"
    if not other.kernels:
        return f"A run {where}, does not say which kernel sources were measured."
    if changed := other.changed(current_hashes):
        return f"A run {where}, measured other sources: {spoken(changed)}."
    found = verdict.decide(
        other.trials, gates, environment=other.environment, current_hashes=current_hashes, problems=other.problems
    )
    told = [found.verdict]
    for metric, words in (("tflops", _speed), ("ratio_to_best_peer", _ratio), ("latency_us", _latency)):
        gate = next((g for g in found.gates if g.metric == metric and g.measured is not None), None)
        if gate is not None:
            told.append(words(gate))
    return f"The same kernels {where}: {', '.join(told)}."


def _speed(gate: GateResult) -> str:
    return f"{number(gate.measured)} TFLOPS at the workload that decides"


def _ratio(gate: GateResult) -> str:
    return f"{number(gate.measured)} × {gate.versus or 'the best peer'}"


def _latency(gate: GateResult) -> str:
    return f"{number(gate.measured)} µs for the small call"
