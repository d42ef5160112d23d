"""Judge one gate on the records of one machine: PASS, FAIL, or INCONCLUSIVE with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from flashcore.decision import compare
from flashcore.decision.compare import number
from flashcore.decision.gates import GROUPS, METRIC_KIND, Gate
from flashcore.problem import parse_problem
from flashcore.records import Kind, Trial

State = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True)
class GateResult:
    """What one gate found."""

    id: str
    title: str
    state: State
    threshold: float
    measured: float | None
    """The figure found, also when it settles nothing; None when there is none."""
    margin: float | None
    """`measured` against `threshold` in `unit`, positive on the passing side."""
    unit: str
    n: int
    """Samples behind a timing, checks behind a correctness figure."""
    interval: tuple[float, float] | None
    """Of the median, in `unit`: see `compare.median_interval`. A threshold inside it is neither met nor missed."""
    evidence: Literal["live", "recorded", "none"]
    reason: str
    """One sentence a reader can act on."""
    fix: str | None
    """The command that would settle it; None when it passed."""
    required: bool
    comparison: Literal["at least", "at most"]
    why: str = ""
    metric: str = ""
    problem: str = ""
    backend: str | None = None
    """The backend whose figure decided."""
    versus: str | None = None
    """The peer it was compared with, for a ratio."""
    source: str | None = None
    """GPU and date of recorded evidence."""

    @property
    def margin_percent(self) -> float | None:
        """The margin in % of the threshold: the one basis on which margins are told."""
        return None if self.margin is None or self.threshold == 0 else 100 * self.margin / abs(self.threshold)

    @property
    def confidence(self) -> str:
        """What stands behind the figure, in words."""
        if self.measured is None:
            return "nothing measured"
        if self.interval is None:
            counted = {"correct_percent": "check", "kept_percent": "case"}.get(
                self.metric, "record" if "data." in self.metric else "sample"
            )
            return f"{self.n:,} {counted}{'s' if self.n != 1 else ''}"
        return f"{self.n} samples, the median within {compare.between(self.interval)}"


@dataclass(frozen=True)
class Source:
    """Records of one machine."""

    evidence: Literal["live", "recorded"]
    trials: tuple[Trial, ...]
    environment: Mapping[str, Any]
    current_hashes: Mapping[str, str]

    @cached_property
    def _alike(self) -> dict[tuple, list[int]]:
        """Places of the trials that are alike in all that says which gates they are for and whether they count."""
        found: dict[tuple, list[int]] = {}
        for place, t in enumerate(self.trials):
            role = t.data.get("role") == "peer"
            key = (t.kind, t.backend, role, t.problem, t.status, t.environment, t.source_hash)
            if key in found:
                found[key].append(place)
            else:
                found[key] = [place]
        return found

    def pick(self, kind: Kind, wanted: Callable[[Trial], bool]) -> list[Trial]:
        """The trials of a kind that are wanted, in their order.

        Parameters
        ----------
        wanted
            Asked once for all trials that are alike in backend, role, problem, status, environment and source, so it
            may look at nothing else. A run has many trials and few of which another gate would think otherwise.
        """
        found = [ps for key, ps in self._alike.items() if key[0] == kind and wanted(self.trials[ps[0]])]
        return [self.trials[place] for place in sorted(chain.from_iterable(found))]

    @cached_property
    def _outcomes(self) -> dict[tuple, set[bool | None]]:
        return {}

    def outcomes(self, backend: str | None, trial: Trial) -> set[bool | None]:
        """What came of the checks of a backend on the problem, machine and source of a trial: see `compare.passed`."""
        key = (backend, trial.problem, trial.environment, trial.source_hash)
        if key not in self._outcomes:
            checks = self.pick("correctness", lambda t: (
                t.backend == backend and compare.same_problem(t.problem, trial.problem)
                and t.environment == trial.environment and t.source_hash == trial.source_hash
            ))  # fmt: skip
            self._outcomes[key] = {compare.passed(t) for t in checks}
        return self._outcomes[key]

    def doubt(self, trial: Trial) -> str | None:
        """Why a trial that was measured may not be used, as a clause; None when it may."""
        if not trial.environment or trial.environment != self.environment.get("id"):
            return f"{trial.backend or trial.kind} was measured on another machine than the run's environment names"
        if trial.source_hash is None:
            without = {*compare.WITHOUT_KERNEL, self.adopted}
            if compare.role(trial) == "ours" and trial.backend not in without and trial.backend:
                return f"the record of {trial.backend} does not say which kernel source was measured"
            return None
        kernel = trial.data.get("kernel")
        if isinstance(kernel, str) and kernel in self.current_hashes:
            fresh = self.current_hashes[kernel] == trial.source_hash
        else:
            fresh = trial.source_hash in self.current_hashes.values()
        return (
            None
            if fresh
            else f"{trial.backend or kernel or trial.kind} was measured on other kernel source than the current one"
        )

    @cached_property
    def adopted(self) -> str | None:
        """The backend that is a function of the user's: it has no kernel of ours, and the run names its file's hash."""
        parameters = self.environment.get("parameters")
        kernel = parameters.get("kernel") if isinstance(parameters, dict) else None
        backend = kernel.get("backend") if isinstance(kernel, dict) else None
        return backend if isinstance(backend, str) else None

    @property
    def origin(self) -> str | None:
        if self.evidence == "live":
            return None
        return f"{self.environment.get('gpu')}, {str(self.environment.get('date') or '')[:10] or 'date not known'}"


def judge_gate(gate: Gate, live: Source, recorded: Source | None, has_gpu: bool) -> GateResult:
    """Judge a gate on the run's own records, or on the recorded run's where this one had no GPU for it.

    Parameters
    ----------
    recorded
        Asked only where the run itself measured nothing for the gate, or, of a group of backends, a part of it alone.
    has_gpu
        Whether the run could time anything on a GPU.

    Returns
    -------
    GateResult
        INCONCLUSIVE wherever the records do not settle it, with the command that would.
    """
    timed_here = has_gpu or METRIC_KIND.get(gate.metric) != "attention_timing"
    first = _judge_on(gate, live) if timed_here else None
    if recorded is None:
        reason = "This run had no GPU to measure it on, and there is no recorded run to use instead."
        return first or _open(gate, None, reason)
    if first is None or first.evidence == "none":
        return _judge_on(gate, recorded)
    if first.state != "PASS" or gate.backend not in GROUPS:
        return first
    # Of a group of backends only the CPU's are checked here; the recorded run has those that need a GPU.
    borrowed = _judge_on(gate, recorded)
    return first if borrowed.evidence == "none" else borrowed


def _judge_on(gate: Gate, source: Source) -> GateResult:
    """The gate on the records of one machine; `evidence` is ``none`` where none of them is about it."""
    wanted = source.pick(gate.kind, gate.asks)
    if gate.where or gate.method or gate.l2:
        wanted = [t for t in wanted if gate.takes(t)]
    if all(t.status in ("unsupported", "unavailable") for t in wanted):
        checks = source.pick("correctness", gate.asks)
        why = next((t.reason for t in [*wanted, *checks] if t.status in ("unavailable", "error") and t.reason), None)
        reason = f"There is no record of it{': ' + clause(why) if why else ''}."
        return _open(gate, source, reason, evidence="none")
    if gate.metric == "correct_percent":
        return _judge_correctness(gate, source, wanted)
    if gate.metric == "kept_percent":
        return _judge_kept(gate, source, wanted)
    if gate.metric in METRIC_KIND:
        return _judge_timing(gate, source, wanted)
    return _judge_data(gate, source, wanted)


def _judge_correctness(gate: Gate, source: Source, wanted: list[Trial]) -> GateResult:
    """The share of checks that are right; where none is wrong, one that is in doubt keeps the gate open."""
    right, wrong, doubts = [], [], []
    for trial in wanted:
        if trial.status in ("unsupported", "unavailable"):
            continue
        doubt, outcome = source.doubt(trial), compare.passed(trial)
        if trial.status == "error":
            doubts.append(f"a check of {trial.backend} did not finish ({clause(trial.reason or 'no reason recorded')})")
        elif doubt or outcome is None:
            doubts.append(doubt or f"a check of {trial.backend} recorded no comparison")
        else:
            (right if outcome else wrong).append(trial)
    n = len(right) + len(wrong)
    measured = 100 * len(right) / n if n else None
    who = gate.backend if gate.backend not in GROUPS else None
    if wrong:
        first = wrong[0]
        where = f" at {first.problem.label()}" if first.problem else ""
        found = first.correctness
        detail = f", {found.num_bad:,} of {found.checked:,} elements out of bound" if found and found.checked else ""
        reason = f"{len(wrong)} of {n} checks fail, the first for {first.backend}{where}{detail}."
        result = _result(gate, source, measured, n, None, reason, first.backend)
        if result.state == "FAIL":
            return result
    if doubts:
        return _open(gate, source, _sentence(doubts), measured=measured, n=n, backend=who)
    if n < max(gate.min_count, 1):
        reason = f"Only {n} checks were made; {max(gate.min_count, 1)} settle it."
        return _open(gate, source, reason, measured=measured, n=n, backend=who)
    if wrong:
        return result
    elements = sum(t.correctness.checked for t in right)
    reason = f"{'The only check passes' if n == 1 else f'All {n} checks pass'} ({elements:,} elements compared)."
    return _result(gate, source, measured, n, None, reason, who)


def _judge_kept(gate: Gate, source: Source, wanted: list[Trial]) -> GateResult:
    """Cases of `flashcore invariance`: all records together, so that none can hide behind another."""
    doubts, n, kept, broken = [], 0, 0, []
    for trial in wanted:
        if trial.status in ("unsupported", "unavailable"):
            continue
        cases, of_them = trial.data.get("cases"), trial.data.get("kept")
        doubt = source.doubt(trial) or _other_source(source, trial)
        if trial.status == "error":
            doubts.append(f"the cases of {trial.backend} were not all asked ({clause(trial.reason or 'no reason')})")
        elif doubt or not _is_share(of_them, cases):
            doubts.append(doubt or f"the record of {trial.backend} does not say how many cases it keeps")
        elif trial.status == "failed" and of_them == cases:
            doubts.append(f"the record of {trial.backend} says that it failed, and that every case is kept")
        else:
            n, kept = n + cases, kept + of_them
            if of_them < cases:
                broken.append(trial)
    measured = 100 * kept / n if n else None
    who = ", ".join(dict.fromkeys(str(t.backend) for t in wanted if t.status in ("ok", "failed")))
    if broken:
        names = ", ".join(dict.fromkeys(str(t.backend) for t in broken))
        reason = f"{n - kept:,} of {n:,} cases are broken, by {names}."
        result = _result(gate, source, measured, n, None, reason, broken[0].backend)
        if result.state == "FAIL":
            return result
    if doubts:
        return _open(gate, source, _sentence(doubts), measured=measured, n=n)
    if n < max(gate.min_count, 1):
        reason = f"Only {n:,} cases were asked; {max(gate.min_count, 1):,} settle it."
        return _open(gate, source, reason, measured=measured, n=n)
    if broken:
        return result
    return _result(gate, source, measured, n, None, f"All {n:,} cases are kept, by {who}.", None)


def _is_share(part: Any, whole: Any) -> bool:
    """Whether both are whole numbers, and one is a part of the other."""
    whole_numbers = all(isinstance(one, int) and not isinstance(one, bool) for one in (part, whole))
    return whole_numbers and 0 <= part <= whole and whole > 0


def _other_source(source: Source, trial: Trial) -> str | None:
    """Why a record of several kernels may not be used, as a clause: one of them has another source now."""
    sources = trial.data.get("sources")
    for kernel, hashed in (sources if isinstance(sources, Mapping) else {}).items():
        if hashed not in source.current_hashes.values():
            return f"{trial.backend} was measured on other source of {kernel} than the current one"
    return None


def _judge_timing(gate: Gate, source: Source, wanted: list[Trial]) -> GateResult:
    """The best timing of the gate's backends, or the worst, by its interval, unless a doubt could turn the result."""
    best = gate.reduce != "worst"
    if gate.backend in GROUPS:
        wanted = [t for t in wanted if t.backend not in compare.FOR_CHECKS]
    last = {t.backend: t for t in wanted}  # a later measurement of a backend replaces an earlier one
    found: list[tuple[float, tuple[float, float] | None, int, str, Trial]] = []
    doubts: list[str] = []
    for trial in last.values():
        if trial.status == "unsupported":
            continue
        doubt = _timing_doubt(source, trial)
        doubt = doubt or (gate.metric == "ratio_to_best_peer" and _peer_doubt(source, trial)) or None
        figure = None if doubt else _figure(gate, source, trial)
        if figure is None:
            doubts.append(doubt or f"the timing of {trial.backend} holds no such figure")
        else:
            found.append((*figure, trial))
    # A backend that crashed in its check was never timed, and might have been the best.
    crashed = source.pick("correctness", lambda t: t.status == "error" and t.backend not in last and gate.asks(t))
    for check in crashed:
        doubts.append(f"a check of {check.backend} did not finish ({clause(check.reason or 'no reason recorded')})")
    if not found:
        stale = [f for t in last.values() if (f := _figure(gate, source, t, trusting=True))]
        shown = max(stale, key=lambda f: gate.margin(f[0]), default=(None, None, 0, ""))
        return _open(gate, source, _sentence(doubts) if doubts else "Nothing was measured.",
                     measured=shown[0], interval=shown[1], n=shown[2])  # fmt: skip
    pick = max if best else min
    value, interval, n, versus, trial = pick(found, key=lambda f: gate.margin(f[0]))
    result = replace(_result(gate, source, value, n, interval, "", trial.backend), versus=versus or None)
    reason = _timing_sentence(gate, value, trial.backend, versus)
    needed = max(gate.min_count, compare.FEWEST_SAMPLES)
    if n < needed or interval is None:
        reason += f"; {n} sample{'' if n == 1 else 's'} cannot tell how sure that median is, {needed} can."
        return _undecided(gate, result, reason)
    if interval[0] <= gate.threshold <= interval[1]:
        where = f"the threshold lies within the interval of that median, {compare.between(interval)}"
        return _undecided(gate, result, f"{reason}; {where}, so it is neither met nor missed.")
    if doubts and (best == (result.state == "FAIL")):  # what is in doubt could turn the result
        return _undecided(gate, result, f"{reason}; but {_first(doubts)}.")
    return replace(result, reason=f"{reason}.")


def _timing_doubt(source: Source, trial: Trial) -> str | None:
    """Why this timing may not be used, as a clause; asked of ours and of peers alike."""
    name = trial.backend
    if trial.status == "unavailable":
        return f"{name} was not available ({clause(trial.reason or 'no reason recorded')})"
    if trial.status != "ok":
        return f"the timing of {name} did not succeed ({clause(trial.reason or 'no reason recorded')})"
    doubt = source.doubt(trial)
    if doubt:
        return doubt
    wrong = compare.contradiction(trial)
    if wrong:
        return wrong
    outcomes = source.outcomes(name, trial)
    if False in outcomes:
        return f"{name} computes wrong results on this problem, so its speed does not count"
    if not outcomes or None in outcomes:
        return f"no finished correctness check of {name} on this problem stands beside its speed"
    return None


def _peer_doubt(source: Source, trial: Trial) -> str | None:
    """Why the fastest peer is not known, as a clause: one that was planned or tried here has no figure to compare with.

    A peer counts under the same terms as ours: right on this problem, its figures of one piece, of the same round. One
    that does not take the problem says `unsupported`, and has no right result there either.
    """

    def of_a_peer(t: Trial) -> bool:
        return compare.role(t) == "peer" and compare.same_problem(t.problem, trial.problem)

    right_checks = {str(t.backend) for t in source.pick("correctness", of_a_peer) if compare.passed(t)}
    timings = source.pick("attention_timing", of_a_peer)
    # One that was to be measured, or takes this problem, was there to be timed.
    timed: dict[str, list[Trial]] = {name: [] for name in (*_planned_peers(source), *sorted(right_checks))}
    for peer in timings:
        if peer.status not in ("unsupported", "unavailable"):
            timed.setdefault(str(peer.backend), []).append(peer)
    refusing = {str(peer.backend) for peer in timings if peer.status == "unsupported"}
    right = {name for name, found in timed.items() if found or name not in refusing or _is_right(source, name, trial)}
    if not right:
        return f"no peer was timed in the same round as {trial.backend}"
    doubts: dict[str, tuple[str, Trial]] = {}
    fastest = math.inf
    for name in right:
        if not timed[name]:
            return f"the run has no timing of peer {name} here, which it was to measure"
        peer = timed[name][-1]
        if compare.ratio(trial, peer) is None:
            return f"the timing of peer {name} cannot be compared with {trial.backend}"
        if doubt := _timing_doubt(source, peer):
            doubts[name] = doubt, peer
        else:
            fastest = min(fastest, peer.timing.latency_us)
    for doubt, peer in doubts.values():
        # A peer in doubt whose every figure is slower than a sound one's would not have been the fastest.
        if min([peer.timing.latency_us, *peer.timing.samples_us]) <= fastest:
            return f"the fastest peer is not known, since {doubt}"
    return None


def _is_right(source: Source, name: str, trial: Trial) -> bool:
    """Whether a check of that backend passed on the problem of `trial`."""
    checks = source.pick("correctness", lambda t: (
        t.backend == name and compare.same_problem(t.problem, trial.problem)
    ))  # fmt: skip
    return any(compare.passed(t) for t in checks)


def _planned_peers(source: Source) -> list[str]:
    """Peers that the run was to measure and that were installed, as its environment says; older runs do not say."""
    parameters = source.environment.get("parameters")
    planned = parameters.get("peers") if isinstance(parameters, Mapping) else None
    return [str(name) for name in planned] if isinstance(planned, list) else []


def _figure(
    gate: Gate, source: Source, trial: Trial, *, trusting: bool = False
) -> tuple[float, tuple[float, float] | None, int, str] | None:
    """The gate's metric of one timing as (value, interval of the median, samples, versus), or None.

    With `trusting` the fastest peer of the round counts, whatever speaks against it: a figure to show, not to judge by.
    """
    latency = compare.latency_us(trial)
    if latency is None:
        return None
    n, bounds = len(compare.samples_us(trial)), compare.interval_us(trial)
    if gate.metric == "latency_us":
        return latency, bounds, n, ""
    if gate.metric == "tflops":
        value = compare.tflops(trial)
        if value is None:
            return None
        scale = value * latency
        return value, (scale / bounds[1], scale / bounds[0]) if bounds else None, n, ""
    peers = source.pick("attention_timing", lambda t: (
        compare.role(t) == "peer" and compare.same_problem(t.problem, trial.problem)
    ))  # fmt: skip
    fastest_first = sorted((t for t in peers if compare.interleaved(trial, t)), key=compare.latency_us)
    best = next((t for t in fastest_first if trusting or _timing_doubt(source, t) is None), None)
    found = None if best is None else compare.ratio(trial, best)
    return None if found is None else (found.value, found.interval, found.n, found.other.backend)


def _judge_data(gate: Gate, source: Source, wanted: list[Trial]) -> GateResult:
    """A figure that records hold under a name in `data`, the best of them or the worst."""
    key = gate.metric.removeprefix("data.")
    values, doubts = [], []
    for trial in wanted:
        if trial.status in ("unsupported", "unavailable"):
            continue
        value = trial.data.get(key)
        doubt = source.doubt(trial)
        if trial.status != "ok" or doubt:
            doubts.append(doubt or f"a record did not succeed ({clause(trial.reason or 'no reason recorded')})")
        elif not compare.is_figure(value):
            doubts.append(f"a record holds no number under '{key}'")
        else:
            values.append(float(value))
    if not values or len(values) < gate.min_count:
        few = f"Only {len(values)} {'record was' if len(values) == 1 else 'records were'} found."
        reason = _sentence(doubts) if doubts else few
        return _open(gate, source, reason, n=len(values))
    best = gate.reduce == "best"
    value = (max if best else min)(values, key=gate.margin)
    result = _result(gate, source, value, len(values), None, "", None)
    which = "The only record" if len(values) == 1 else f"The {'best' if best else 'worst'} of {len(values)} records"
    reason = f"{which} has {_with_unit(value, gate.unit)}; {_limit(gate)}."
    if doubts and (best == (result.state == "FAIL")):
        return _undecided(gate, result, f"{reason} But {_first(doubts)}.")
    return replace(result, reason=reason)


def _result(
    gate: Gate, source: Source | None, measured: float | None, n: int, interval: tuple[float, float] | None,
    reason: str, backend: str | None,
) -> GateResult:  # fmt: skip
    """What the gate found, PASS or FAIL by its margin; `backend` is whose figure decided."""
    margin = gate.margin(measured) if measured is not None else None
    state = "PASS" if margin is not None and margin >= 0 else "FAIL"
    return GateResult(
        id=gate.id, title=gate.title, state=state, threshold=gate.threshold, measured=measured, margin=margin,
        unit=gate.unit, n=n, interval=interval, evidence=source.evidence if source else "none", reason=reason,
        fix=None if state == "PASS" else gate.measure, required=gate.required, comparison=gate.comparison, why=gate.why,
        metric=gate.metric, problem=gate.problem, backend=backend, source=source.origin if source else None,
    )  # fmt: skip


def _undecided(gate: Gate, result: GateResult, reason: str) -> GateResult:
    """The same result, INCONCLUSIVE for this reason, with the command that would settle it."""
    return replace(result, state="INCONCLUSIVE", reason=reason, fix=gate.measure)


def _open(
    gate: Gate, source: Source | None, reason: str, *, measured: float | None = None,
    interval: tuple[float, float] | None = None, n: int = 0, backend: str | None = None, evidence: str | None = None,
) -> GateResult:  # fmt: skip
    """A gate that is not settled, with the figure that does not settle it; ``evidence="none"`` where there is none."""
    result = _undecided(gate, _result(gate, source, measured, n, interval, reason, backend), reason)
    return replace(result, evidence="none", source=None) if evidence == "none" else result


def _timing_sentence(gate: Gate, value: float, name: str | None, versus: str) -> str:
    """What was reached and how far it lies from the threshold, as a clause without a full stop."""
    margin = gate.margin(value)
    side = "above" if (margin >= 0) == (gate.at_least is not None) else "below"
    far = f"{100 * abs(margin) / abs(gate.threshold):.1f} %" if gate.threshold else _with_unit(abs(margin), gate.unit)
    found = {
        "latency_us": f"{name} takes {_with_unit(value, gate.unit)} a call",
        "ratio_to_best_peer": f"{name} has {number(value)} times the speed of {versus}",
    }.get(gate.metric, f"{name} reaches {_with_unit(value, gate.unit)}")
    where = f" at {parse_problem(gate.problem).label().replace(',', ', ')}"
    return f"{found}{where}, {far} {side} the threshold of {_exact(gate)}"


def _limit(gate: Gate) -> str:
    return f"{gate.comparison} {_exact(gate)} is needed"


def _exact(gate: Gate) -> str:
    return f"{gate.threshold:g} {gate.unit}".strip()


def _with_unit(value: float, unit: str) -> str:
    return f"{number(value)} {unit}".strip()


def _first(doubts: list[str]) -> str:
    """The first of several clauses, and how many more there are."""
    return f"{doubts[0]} ({len(doubts) - 1} more like this)" if len(doubts) > 1 else doubts[0]


def _sentence(doubts: list[str]) -> str:
    """The same as a sentence."""
    told = _first(doubts)
    return f"{told[:1].upper()}{told[1:]}."


def clause(sentence: str) -> str:
    """A sentence without its full stop and on one line, to stand inside another one."""
    return " ".join(str(sentence).split()).rstrip(".")
