"""Draw what bits that are the same in every batch cost a prefill: its time without the mode, with it, and peers'."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import escape

from flashcore.decision import compare
from flashcore.decision.compare import Ratio, number
from flashcore.measure.workloads import ordinary
from flashcore.page.drawing.html_tables import spaced, table_html
from flashcore.problem import Problem
from flashcore.records import Trial
from flashcore.surveys.invariance import facts

if TYPE_CHECKING:
    from flashcore.decision.evidence import Evidence

HEADING = "What the same bits in every batch cost"
CAPTION = "Prefill without batch_invariant and with it"
PEER_TITLES = {"fa3": "FlashAttention-3", "sdpa-cudnn": "cuDNN"}
STATES = {"failed": "WRONG", "error": "did not finish", "unsupported": "not taken", "unavailable": "not installed"}
NOTE = (
    "Medians of graph replay. Cost: how much longer the same backend takes with batch_invariant, sample by sample in "
    f"the same rounds. Within: holds the true cost in {compare.CONFIDENCE:g} of 100 cases. Beside: how many times as "
    "fast ours is in that mode as the peer, which promises no such bits; above 1 ours is faster. Every result was "
    "checked against float64, in the mode too. No gate of the project's own depends on these."
)


@dataclass(frozen=True)
class Cost:
    """One of ours at one problem in the batch-invariant mode, and what was timed beside it."""

    invariant: Trial
    plain: Trial | None
    """The same backend at the same problem in the ordinary mode."""
    speed: Ratio | None
    """Of the mode beside the ordinary one: below 1 the mode takes longer. None where the two cannot be compared."""
    peers: Mapping[str, Ratio]
    """How many times as fast the mode is as each peer of `PEER_TITLES` at the same problem, where both count."""
    states: Mapping[str, str]
    """What came of the other peers, in a word."""

    @property
    def share(self) -> float | None:
        """How much longer the mode takes, as a share of the ordinary mode's time."""
        return None if self.speed is None else 1 / self.speed.value - 1

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of `share`."""
        within = None if self.speed is None else self.speed.interval
        return None if within is None else (1 / within[1] - 1, 1 / within[0] - 1)


def costs(trials: Iterable[Trial]) -> list[Cost]:
    """Each backend of ours at each problem that was to be timed in the mode on a GPU, in the order of the records.

    Of several timings the last counts. A problem that a backend does not take is left out.
    """
    found: dict[tuple[str | None, Problem], Trial] = {}
    gone: dict[str | None, Trial] = {}
    for trial in trials:
        if trial.kind != "attention_timing":
            continue
        if trial.problem is None:
            gone[trial.backend] = trial
        elif trial.timing is None or trial.timing.method != "host":
            found[trial.backend, trial.problem] = trial
    return [
        _cost(trial, found, gone) for (_, problem), trial in found.items()
        if problem.batch_invariant and compare.contends(trial) and trial.status not in ("unsupported", "unavailable")
    ]  # fmt: skip


def _cost(
    trial: Trial, found: Mapping[tuple[str | None, Problem], Trial], gone: Mapping[str | None, Trial]
) -> Cost:  # fmt: skip
    problem = ordinary(trial.problem)
    plain = found.get((trial.backend, problem))
    ratios, states = {}, {}
    for name in PEER_TITLES:
        peer = found.get((name, problem))
        if (ratio := _beside(trial, peer)) is not None:
            ratios[name] = ratio
        elif (there := peer or gone.get(name)) is not None and there.status != "ok":
            states[name] = STATES.get(there.status, "–")
    return Cost(trial, plain, _beside(trial, plain), ratios, states)


def _beside(trial: Trial, other: Trial | None) -> Ratio | None:
    """The speed of a timing beside one of the ordinary mode, over the same sequences in the same rounds."""
    if other is None or trial.data.get("lengths") != other.data.get("lengths"):
        return None
    return compare.speed_beside(trial, other)


def cost_html(evidence: Evidence) -> str:
    """The part on the mode of the section on speed; empty for a run that timed no problem in it."""
    trials = evidence.gpu_trials
    found = costs(trials)
    if not found:
        return ""
    kept = (
        ' <a href="#correctness">Correctness</a> says in how many cases the bits are the same.'
        if facts.records_of(trials)
        else " Whether the bits are the same was not asked in this run."
    )
    return f"<h3>{HEADING}</h3><p>{escape(sentence(found))}{kept}</p>{_table(found)}"


def cost_table(trials: Sequence[Trial]) -> str:
    """One row a problem that was timed in the mode, with the sentence above it; empty where there is none."""
    found = costs(trials)
    return f"<p>{escape(sentence(found))}</p>{_table(found)}" if found else ""


def sentence(found: Sequence[Cost]) -> str:
    """The cost of the mode as a geometric mean with its range, and how the mode stands to FlashAttention-3."""
    shares = [share for one in found if (share := one.share) is not None]
    if not shares:
        return "batch_invariant=True was timed, and no time without it stands beside it."
    mean = _mean(1 + share for share in shares) - 1
    told = f"With batch_invariant=True a prefill takes {_percent(mean)} more time"
    if len(shares) > 1:
        told += (
            f" in the geometric mean of {len(shares)} problems, between {_percent(min(shares))} and "
            f"{_percent(max(shares))}"
        )
    beside = []
    for name, title in PEER_TITLES.items():
        ratios = [one.peers[name].value for one in found if name in one.peers]
        if ratios:
            of = f" in the geometric mean of {len(ratios)}" if len(ratios) > 1 else ""
            beside.append(f"{number(_mean(ratios))} times as fast as {title}{of}")
    return f"{told}{'; in that mode ours is ' * bool(beside)}{' and '.join(beside)}."


def _table(found: Sequence[Cost]) -> str:
    rows = [{"Problem": row_heading(one, found), **_row(one)} for one in found]
    return table_html(rows, CAPTION, numeric=list(rows[0])[1:], note=NOTE)


def row_heading(one: Cost, found: Sequence[Cost]) -> str:
    """What names a row: the problem, and the backend where there are several."""
    problem = spaced(ordinary(one.invariant.problem))
    return f"{one.invariant.backend}, {problem}" if len({c.invariant.backend for c in found}) > 1 else problem


def _row(one: Cost) -> dict[str, str]:
    within = one.interval
    return {
        "Ordinary, µs": _us(one.plain),
        "TFLOPS": number(rate) if one.plain and (rate := compare.tflops(one.plain)) is not None else "–",
        "Batch-invariant, µs": _us(one.invariant),
        "Cost": _percent(one.share) if one.share is not None else "not measured",
        "Within": f"{_percent(within[0], 2)} to {_percent(within[1], 2)}" if within else "–",
        **{f"Beside {title}": _peer(one, name) for name, title in PEER_TITLES.items()},
    }


def _us(trial: Trial | None) -> str:
    if trial is None:
        return "–"
    latency = compare.latency_us(trial)
    return number(latency) if latency is not None else STATES.get(trial.status, "–")


def _peer(one: Cost, name: str) -> str:
    found = one.peers.get(name)
    if found is None:
        return one.states.get(name, "–")
    return f"{number(found.value)} ×" + (f" ({compare.between(found.interval)})" if found.interval else "")


def _mean(values: Iterable[float]) -> float:
    """The geometric mean, which is the same whichever of two times is divided by the other."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %".replace("-", "−")
