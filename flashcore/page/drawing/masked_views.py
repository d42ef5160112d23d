"""Draw the speed of problems with masks from a sweep's records: ours, each peer, what each is held against, the aim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import escape

from flashcore.decision import compare
from flashcore.decision.compare import Ratio, number
from flashcore.measure.workloads import BESIDE, WORKLOADS, Workload
from flashcore.page.drawing.html_tables import table_html
from flashcore.problem import Problem
from flashcore.records import Trial

if TYPE_CHECKING:
    from flashcore.decision.evidence import Evidence

HEADING = "Masks that models use"
PEER_TITLES = {"fa3": "FlashAttention-3", "fa4": "FlashAttention-4"}
MEANING = (
    "Ragged batches, windows, sinks and softcaps, all causal and in bfloat16. It would be bad for ours to be slower "
    "than a peer, for a ragged batch to cost more than its sequences as a dense one, or for time not to fall with the "
    "window."
)
NOTE = (
    "Medians of graph replay; TFLOPS count the queries and keys that are real and visible. A ratio above 1 is faster, "
    "in the same rounds, with its interval. Beside another problem it is of operations a second: 1 beside another "
    "window means that time goes with the work. The aims in brackets are the project's own: a margin over what that "
    "peer reached on an H100 before these masks were built, or what a mask may cost. No gate depends on them."
)
STATES = {"failed": "WRONG", "error": "did not finish", "unsupported": "not taken", "unavailable": "not installed"}

Timed = Mapping[Problem, Mapping[str, Trial]]


def masked_html(evidence: Evidence) -> str:
    """The part on masks of the section on speed; empty for runs that timed none of these problems."""
    table = masked_table(evidence.gpu_trials)
    return f"<h3>{HEADING}</h3><p>{escape(MEANING)}</p>{table}" if table else ""


def masked_table(trials: Sequence[Trial]) -> str:
    """One row a workload that ours was timed at, or should have been; empty where there is none."""
    timed = _by_problem(trials)
    gone = {t.backend: t for t in trials if t.kind == "attention_timing" and t.problem is None}
    shown = [w for w in WORKLOADS if any(compare.contends(t) for t in timed.get(w.problem, {}).values())]
    rows = [_row(workload, timed, gone) for workload in shown]
    if not any(_mine(timed, w.problem) or _state(_ours(timed, w.problem)) for w in shown):
        return ""
    numeric = [
        "Ours, µs",
        "TFLOPS",
        *(f"{title}, µs" for title in PEER_TITLES.values()),
        "Best peer",
        "Speed beside it",
    ]
    reasons = dict.fromkeys(
        f"{PEER_TITLES[name]} at {w.words}: {compare.first_line(t.reason)}"
        for w in shown for name, t in timed[w.problem].items() if name in PEER_TITLES and t.status == "unsupported"
    )  # fmt: skip
    note = " ".join([NOTE, *(["Not taken: " + "; ".join(reasons) + "."] if reasons else [])])
    return table_html(rows, HEADING, numeric=numeric, note=note)


def _by_problem(trials: Sequence[Trial]) -> Timed:
    """Timings by problem and backend, the last of each; of sequences as long as the workload says."""
    kinds = {w.problem: w.lengths for w in WORKLOADS if w.problem.lengths}
    found: dict[Problem, dict[str, Trial]] = {}
    for trial in trials:
        if trial.kind != "attention_timing" or trial.problem is None or trial.backend is None:
            continue
        if trial.problem in kinds and trial.data.get("lengths") != kinds[trial.problem]:
            continue
        found.setdefault(trial.problem, {})[trial.backend] = trial
    return found


def _ours(timed: Timed, problem: Problem) -> list[Trial]:
    return [t for t in timed.get(problem, {}).values() if compare.contends(t)]


def _mine(timed: Timed, problem: Problem) -> Trial | None:
    """Our fastest timing that counts."""
    mine = [t for t in _ours(timed, problem) if compare.latency_us(t) is not None]
    return min(mine, key=compare.latency_us, default=None)


def _state(trials: Sequence[Trial]) -> str:
    """What came of timings of ours of which none counts, in a word; empty where ours does not take the problem."""
    states = {t.status for t in trials}
    return next((STATES[s] for s in ("failed", "error") if s in states), "")


def _row(workload: Workload, timed: Timed, gone: Mapping[str | None, Trial]) -> dict[str, str]:
    group = timed[workload.problem]
    mine = _mine(timed, workload.problem)
    best = compare.ratio_to_best_peer(mine, group.values()) if mine else None
    row = {
        "Workload": workload.words,
        "Ours, µs": number(compare.latency_us(mine)) if mine else _state(_ours(timed, workload.problem)) or "–",
        "TFLOPS": number(compare.tflops(mine)) if mine else "–",
    }
    for name, title in PEER_TITLES.items():
        row[f"{title}, µs"] = _peer_us(group.get(name) or gone.get(name))
    row["Best peer"] = f"{_words(best)}, {PEER_TITLES.get(best.other.backend, best.other.backend)}" if best else "–"
    row["Held against"], row["Speed beside it"] = _aim(workload, mine, timed)
    return row


def _peer_us(trial: Trial | None) -> str:
    if trial is None:
        return "–"
    latency = compare.latency_us(trial)
    return number(latency) if latency is not None else STATES.get(trial.status, "–")


def _aim(workload: Workload, mine: Trial | None, timed: Timed) -> tuple[str, str]:
    """What a workload is held against, and how fast ours is beside it, with the aim in brackets."""
    beside = workload.against in ("", BESIDE)
    if beside and workload.beside is None:
        return "–", "–"
    aim = f" [aim {workload.aim:g}]" if workload.aim is not None else ""
    if beside:
        what, found = workload.beside_words, None
        # The same backend, whose two kernels are compared.
        other = timed.get(workload.beside, {}).get(mine.backend or "") if mine else None
        found = compare.speed_beside(mine, other) if other else None
    else:
        what = PEER_TITLES.get(workload.against, workload.against)
        other = timed[workload.problem].get(workload.against)
        found = compare.ratio(mine, other) if mine and other else None
    return what, f"{_words(found) if found else 'not measured'}{aim}"


def _words(ratio: Ratio) -> str:
    within = f" ({compare.between(ratio.interval)})" if ratio.interval else ""
    return f"{number(ratio.value)} ×{within}"
