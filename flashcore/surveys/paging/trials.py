"""Turn what was measured into records of kind `paging`: compact ones, and a failure is a record like any other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashcore import backends
from flashcore.errors import BackendUnavailable, FlashCoreError, UnknownName, Unsupported
from flashcore.measure.check import hash_of
from flashcore.measure.timing import Candidate, time_on_cpu, time_on_gpu
from flashcore.problem import Problem
from flashcore.records import Ledger, RunFolder, Timing, Trial, digits

SAMPLES_KEPT = 3
"""Of a timing; its median and quartiles are over all of them."""

Say = Callable[[str], None]


@dataclass
class Book:
    """Where the records of a survey go: to the run at once, and to the caller at the end."""

    run: RunFolder | Ledger
    say: Say
    trials: list[Trial] = field(default_factory=list)

    def write(self, what: str, *, backend: str | None = None, **fields) -> Trial:
        """One record; `data` gets `what`, figures are cut to the digits they have, a backend's hash goes with it."""
        data = {"what": what} | {k: _short(v) for k, v in (fields.pop("data", None) or {}).items()}
        if backend is not None and "source_hash" not in fields:
            fields["source_hash"] = _hash(backend)
        trial = self.run.append(Trial(kind="paging", backend=backend, data=data, **fields))
        self.trials.append(trial)
        return trial

    def failed(self, what: str, error: Exception, **fields) -> Trial:
        """The record of something that did not finish, or is not there."""
        status, reason = outcome(error)
        return self.write(what, status=status, reason=reason, **fields)


def outcome(error: Exception) -> tuple[str, str]:
    """Status and reason of what was raised."""
    if isinstance(error, BackendUnavailable):
        return "unavailable", f"{error.reason}; to mend it: {error.fix}"
    if isinstance(error, UnknownName):
        return "unavailable", " ".join(str(error).split())[:300]
    if isinstance(error, Unsupported):
        return "unsupported", error.reason
    text = " ".join(str(error).split()) or "no message"
    return "error", text[:500] if isinstance(error, FlashCoreError) else f"{type(error).__name__}: {text[:500]}"


def ready(name: str, problem: Problem | None = None, *, paged: bool = True, selected: bool = False) -> backends.Backend:
    """The backend of this name, when it can run here and takes the problem; raises what `outcome` reads otherwise."""
    backend = backends.get(name)
    backend.require(None if paged else problem)
    reason = backend.why_not_paged(problem, selected=selected) if paged and problem else None
    if reason:
        raise Unsupported(name, reason)
    return backend


def worth(wrong: str | None) -> tuple[str, str | None]:
    """Status and reason of a timing, by what is wrong with the result of what was timed."""
    return ("failed", f"its result is wrong, so its speed counts for nothing ({wrong})") if wrong else ("ok", None)


def _hash(backend: str) -> str | None:
    try:
        return hash_of(backends.get(backend))
    except UnknownName:
        return None


def _short(value: Any) -> Any:
    return digits(value, 4) if isinstance(value, float) else value


def time_calls(
    candidates: Sequence[Candidate], problem: Problem, *, gpu: bool, sets: int, rounds: int, l2: str = "rotating"
) -> dict[str, Timing | Exception]:
    """Time calls on the GPU, or on the CPU by the wall clock; all share a round."""
    if gpu:
        return time_on_gpu(candidates, problem, sets=sets, rounds=rounds, l2=l2)
    return time_on_cpu(candidates, problem, rounds=rounds)


def compact(timing: Timing) -> Timing:
    """A timing as a record keeps it: median and quartiles over all `n` samples, the first few of them, no TFLOPS."""
    launch_us = timing.more("launch_us")
    return Timing(
        method=timing.method, latency_us=digits(timing.latency_us, 5), round=timing.round, l2=timing.l2,
        samples_us=[digits(s, 4) for s in timing.samples_us[:SAMPLES_KEPT]], n=len(timing.samples_us),
        quartiles_us=[digits(q, 5) for q in timing.more("quartiles_us") or ()],
        **({} if launch_us is None else {"launch_us": launch_us}),
    )  # fmt: skip


def over(mine: Timing, other: Timing) -> tuple[float, list[float]]:
    """How many times as fast as `other`: the ratio of the medians, and the quartiles of the samples' ratios.

    Sample i of both was taken in the same round, so that clock drift cancels.
    """
    pairs = list(zip(mine.samples_us, other.samples_us, strict=False))
    ratios = [theirs / ours for ours, theirs in pairs]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [other.latency_us / mine.latency_us] * 3
    return other.latency_us / mine.latency_us, [digits(quartiles[0], 4), digits(quartiles[2], 4)]
