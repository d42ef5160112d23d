"""Compare the timings of two runs: each backend and problem that both measured, relative to a peer where there is one.

Two runs differ in clocks, heat and often in the very card, which a ratio to a peer of the same round cancels. Where no
peer serves, the latencies themselves are compared, and the row says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flashcore.decision import compare
from flashcore.page.history import interval
from flashcore.page.history.interval import Change, Figure, Word
from flashcore.page.history.runs import Snapshot
from flashcore.problem import Problem
from flashcore.records import Trial

PEER_ORDER = ("sdpa-cudnn", "sdpa-flash", "fa3", "fa4", "sdpa-math")
"""Which peer a ratio is taken to, when several serve."""
SOFTWARE_OF_PEERS = ("torch", "cudnn", "cublaslt", "cuda_runtime")
"""A peer is the same code in both runs when these are."""

Basis = Literal["relative", "absolute", "none"]


@dataclass(frozen=True)
class Row:
    """What became of one backend on one problem."""

    backend: str
    role: str
    """`ours` or `peer`."""
    problem: str
    word: Word
    basis: Basis
    """`relative`: the ratio to `peer`, interleaved with it in both runs. `absolute`: the latencies as they are."""
    peer: str | None
    percent: float | None
    """Change of speed on that basis, in %; above 0 is faster."""
    interval_percent: tuple[float, float] | None
    """Interval of it, from 99 % intervals of each run, widened by the drift."""
    drift_percent: float | None
    before_us: float | None
    now_us: float | None
    """Median latencies. They hold the clocks and the heat of their day too: beside a ratio they are not judged."""
    absolute_percent: float | None
    """Change of speed by these latencies alone, in %; None when the runs are not of one machine."""
    before_ratio: float | None
    now_ratio: float | None
    """Latency of `peer` over this backend's."""
    samples: tuple[int, int]
    other_source: bool
    """Whether the kernel's source changed, so that this compares two kernels."""
    same_machine: bool
    note: str = ""
    """Why it was not compared, or what to know about how it was."""

    @property
    def regression(self) -> bool:
        """A backend of ours that is slower by more than 3 % on the same kind of machine, with separated intervals."""
        beyond = self.percent is not None and self.percent < -100 * interval.MATTERS
        return self.word == "slower" and beyond and self.role == "ours" and self.same_machine

    @property
    def judged(self) -> bool:
        """Whether the samples gave an answer that may count against a backend of ours."""
        return self.role == "ours" and self.same_machine and self.word != "not compared"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "regression": self.regression}


@dataclass(frozen=True)
class Pair:
    """Two runs to compare, and what their machines allow."""

    before: Snapshot
    now: Snapshot

    @property
    def same_machine(self) -> bool:
        """Whether both ran on a GPU (without one, a CPU) of the same name; not when either does not say."""
        a, b = self.before, self.now
        return a.machine is not None and (a.gpu, a.machine) == (b.gpu, b.machine)

    @property
    def peer_software(self) -> list[str]:
        """What changed under the peers, such as ``cudnn 91900 → 92000``; they are no common measure then."""
        a, b = self.before.facts, self.now.facts
        return [f"{n} {a[n]} → {b[n]}" for n in SOFTWARE_OF_PEERS if a.get(n) and b.get(n) and a[n] != b[n]]


@dataclass(frozen=True)
class Judged:
    """Two timings held against each other, before the drift between their runs is known."""

    row: Row
    before: Figure | None = None
    now: Figure | None = None

    def change(self, drift: float) -> Change | None:
        return interval.change(self.before, self.now, drift=drift) if self.before and self.now else None

    def with_drift(self, drift: float) -> Row:
        found = self.change(drift)
        if found is None:
            return self.row
        bounds = (100 * (found.low - 1), 100 * (found.high - 1))
        changes = {"word": found.word, "percent": 100 * (found.value - 1), "interval_percent": bounds}
        row = Row(**{**vars(self.row), **changes, "drift_percent": 100 * drift})
        return replace(row, note="; ".join(filter(None, (row.note, _peer_moved(row)))))


def rows(pair: Pair, *, problem: Problem | None = None) -> tuple[dict[tuple, Row], dict[Basis, float]]:
    """A row for each backend and problem timed in both runs, by the key of `timed`; and the drift by basis.

    Parameters
    ----------
    problem
        The only problem of which rows are wanted; the drift is that of all.
    """
    before, now = timed(pair.before.trials), timed(pair.now.trials)
    found: dict[tuple, Judged] = {}
    for key, trial in now.items():
        absent = key in before and {before[key].status, trial.status} <= {"unsupported", "unavailable"}
        wanted = problem is None or key[-1] == problem_key(problem) or compare.role(trial) == "peer"
        if key in before and wanted and not absent:
            found[key] = judge(pair, before[key], trial)
    unchanged = [one for key, one in found.items() if _same_version(before[key], now[key])]
    drifts = drifts_of(pair, unchanged)
    chosen = {key: one for key, one in found.items() if problem is None or key[-1] == problem_key(problem)}
    return {key: one.with_drift(drifts[one.row.basis]) for key, one in chosen.items()}, drifts


def drifts_of(pair: Pair, found: Iterable[Judged]) -> dict[Basis, float]:
    """By how much the peers, which nobody of us changed, moved between the runs, beyond their own intervals."""
    controls: dict[Basis, dict[tuple, Change]] = {"relative": {}, "absolute": {}, "none": {}}
    if pair.same_machine and not pair.peer_software:
        for one in found:
            row = one.row
            if row.role == "peer" and (moved := one.change(0.0)) is not None:
                pairing = (row.problem, frozenset({row.backend, row.peer}))  # two peers relative to each other are one
                controls[row.basis].setdefault(pairing, moved)
    return {basis: interval.drift(moved.values()) for basis, moved in controls.items()}


def timed(trials: Sequence[Trial]) -> dict[tuple, Trial]:
    """Timings by backend, variant and problem, whatever came of them; of several the last, as on the page."""
    return {
        (t.backend, t.variant, problem_key(t.problem)): t
        for t in trials
        if t.kind == "attention_timing" and t.problem is not None and compare.role(t) != "reference"
    }


def problem_key(problem: Problem) -> tuple:
    """Equal for problems that are the same mathematics, as `compare.same_problem` has it."""
    fields = problem.model_dump(exclude={"page_size", "softmax_scale"})
    return (*fields.values(), f"{problem.scale:.9g}")


def judge(pair: Pair, before: Trial, now: Trial, *, backend: str | None = None) -> Judged:
    """Hold two timings against each other.

    Parameters
    ----------
    backend
        Name for the row; default that of `now`. The two may be different backends, as `best of ours` then and now.
    """
    then_us, now_us = compare.latency_us(before), compare.latency_us(now)
    name = backend or f"{now.backend or 'unnamed'}{f' ({now.variant})' if now.variant else ''}"
    both = then_us is not None and now_us is not None
    plain: dict[str, Any] = {
        "backend": name, "role": compare.role(now), "problem": now.problem.label(), "word": "not compared",
        "basis": "none", "peer": None, "percent": None, "interval_percent": None, "drift_percent": None,
        "before_us": then_us, "now_us": now_us,
        "absolute_percent": 100 * (then_us / now_us - 1) if both and pair.same_machine else None,
        "before_ratio": None, "now_ratio": None, "samples": (0, 0), "same_machine": pair.same_machine,
        "other_source": bool(before.source_hash and now.source_hash and before.source_hash != now.source_hash),
    }  # fmt: skip
    why_not = _doubt(pair.before, before, "before") or _doubt(pair.now, now, "now") or _unlike(before, now)
    if why_not:
        return Judged(Row(**{**plain, "absolute_percent": None}, note=why_not))
    peers = _common_peers(pair, before, now) if not pair.peer_software else []
    if peers:
        peer, then_peer, now_peer = peers[0]
        then_samples, now_samples = ratios(before, then_peer), ratios(now, now_peer)
        shown = {
            "basis": "relative", "peer": peer,
            "before_ratio": compare.latency_us(then_peer) / then_us, "now_ratio": compare.latency_us(now_peer) / now_us,
        }  # fmt: skip
        note = "" if pair.same_machine else "other machines: only the ratio to the peer is compared, and no regression"
    elif pair.same_machine:
        then_samples, now_samples = speeds(before), speeds(now)
        shown, note = {"basis": "absolute"}, _no_peer(pair)
    else:
        note = f"the machines are not the same, and {_no_peer(pair)}"
        return Judged(Row(**plain, note=note))
    figures = interval.figure(then_samples, side="before"), interval.figure(now_samples, side="now")
    samples = (len(then_samples), len(now_samples))
    if None in figures or interval.change(*figures, drift=0.0) is None:
        fewest = f"{samples[0]} and {samples[1]} usable samples; {interval.FEWEST_SAMPLES} each are needed"
        return Judged(Row(**{**plain, **shown, "word": "too noisy to say", "samples": samples}, note=fewest))
    return Judged(Row(**{**plain, **shown, "samples": samples}, note=note), *figures)


def ratios(trial: Trial, peer: Trial) -> list[float]:
    """The peer's latency over the trial's, round by round; a slow call stops early, so the longer list is cut."""
    return [p / t for t, p in zip(compare.samples_us(trial), compare.samples_us(peer), strict=False)]


def speeds(trial: Trial) -> list[float]:
    """Calls a µs, one a sample."""
    return [1.0 / s for s in compare.samples_us(trial)]


def _doubt(run: Snapshot, trial: Trial, when: str) -> str | None:
    """Why a timing cannot be used, as a clause."""
    then = "then" if when == "before" else "now"
    if trial.status != "ok":
        state = {"failed": "wrong", "error": "not finished"}.get(trial.status, trial.status)
        return f"it was {state} {then} ({compare.first_line(trial.reason, most=120)})"
    if compare.latency_us(trial) is None:
        return f"its record holds no usable latency {then}"
    known = run.environment.get("id")
    if known and trial.environment and trial.environment != known:
        return f"it was measured {then} on another machine than the run's environment names"
    return None


def _unlike(before: Trial, now: Trial) -> str | None:
    how = [f"{t.timing.method}, L2 {t.timing.l2 or 'not stated'}".replace("_", " ") for t in (before, now)]
    return f"it was timed in another way ({how[0]} then, {how[1]} now)" if how[0] != how[1] else None


def _common_peers(pair: Pair, before: Trial, now: Trial) -> list[tuple[str, Trial, Trial]]:
    """Peers interleaved with the backend in both runs, the preferred one first; none whose own version changed."""
    then, today = _peers(pair.before, before), _peers(pair.now, now)
    order = {name: place for place, name in enumerate(PEER_ORDER)}
    same = [name for name in then.keys() & today.keys() if _same_version(then[name], today[name])]
    names = sorted(same, key=lambda name: (order.get(name, len(order)), name))
    return [(name, then[name], today[name]) for name in names]


def _same_version(before: Trial, now: Trial) -> bool:
    """Whether two timings are of one version of a peer, as far as both say which."""
    versions = {trial.data["version"] for trial in (before, now) if trial.data.get("version")}
    return len(versions) < 2


def _peers(run: Snapshot, trial: Trial) -> Mapping[str, Trial]:
    return {
        t.backend: t
        for t in run.trials
        if t.kind == "attention_timing" and t.backend not in (None, trial.backend) and t.variant is None
        and t.timing is not None and t.timing.round == trial.timing.round
        and compare.role(t) == "peer" and compare.ratio(trial, t) is not None
    }  # fmt: skip


def _peer_moved(row: Row) -> str:
    """A warning where a ratio changed and the backend's own latency hardly did, or went the other way."""
    if row.basis != "relative" or row.word not in ("faster", "slower") or row.absolute_percent is None:
        return ""
    if row.absolute_percent / row.percent > 1 / 3:
        return ""
    way = "less time" if row.absolute_percent > 0 else "more time"
    return f"its own call takes {abs(row.absolute_percent):.1f} % {way}, so it may be the peer or the clock that moved"


def _no_peer(pair: Pair) -> str:
    if pair.peer_software:
        return f"the peers' software changed ({', '.join(pair.peer_software)}), so they are no common measure"
    return "no peer was timed beside it in both runs"
