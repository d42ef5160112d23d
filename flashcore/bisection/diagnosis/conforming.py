"""Ask any attention function, backend or peer for the promises of attention: kept, broken or refused, and where.

`conform` asks in this process, `conform_apart` in one that may die, and `conform_all` every implementation that runs
here. A break comes with the smallest case found, and is one only where the plain twin of that case is right.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from flashcore import backends as registry
from flashcore import tables
from flashcore.bisection.diagnosis.calling import (
    TIME_LIMIT_S,
    Broken,
    Candidate,
    Refusal,
    candidate_of,
    refuse_limit,
    refuse_masks,
)
from flashcore.bisection.diagnosis.promises.asking import Asked, Promise
from flashcore.bisection.diagnosis.promises.registry import PROMISES, chosen
from flashcore.bisection.diagnosis.screening import Inputs, find_home
from flashcore.bisection.diagnosis.shrinking import smaller
from flashcore.errors import BackendUnavailable, FlashCoreError
from flashcore.gpu.isolation import START_S, Outcome, Worker
from flashcore.measure.check import on_host
from flashcore.measure.cluster import Task
from flashcore.numerics import ambient
from flashcore.problem import Problem, parse_problem
from flashcore.records import Trial

if TYPE_CHECKING:
    import pandas

START = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=100, seqlen_k=100, head_dim=64)
"""The ordinary problem that is tried first: several batches and heads, grouped heads, lengths that no tile divides."""
SHRINK_S = 1.0
"""Seconds that a search for the smallest case may take."""
PROMISE_LIMIT_S = 120.0
"""Seconds that one promise may take in a process of its own."""
ALL_LIMIT_S = 120.0
"""Seconds that all promises of one implementation may take in a report; asked alone, one takes 3 s on a GPU."""
PEER_CALL_LIMIT_S = 60.0
"""Seconds that one call of a peer may take in a report: some compile a kernel at the first call of each kind."""
MOST_DEATHS = 3
"""Processes that may die one after the other until no further promise is asked."""

Result = Literal["kept", "broken", "not promised", "refused", "does not apply", "not judged"]
STATUS: dict[str, str] = {
    "kept": "ok", "broken": "failed", "not promised": "unsupported", "refused": "unsupported",
    "does not apply": "unsupported", "not judged": "error",
}  # fmt: skip
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """What came of one promise."""

    id: str
    """The promise's."""
    name: str
    promise: str
    """The promise itself, as a sentence."""
    result: Result
    sentence: str
    """What happened, as a sentence without a full stop."""
    smallest: str = ""
    """The smallest case found of a break."""
    problem: Problem | None = None
    """Of that case."""
    cases: int = 0
    """Cases that were answered."""
    refused: int = 0
    """Cases that were refused."""
    seconds: float = 0.0
    crashed: bool = False
    """It took its process with it, or never came back."""


@dataclass(frozen=True)
class Conformance:
    """Which promises an implementation of attention keeps. `print` says it in sentences."""

    name: str
    findings: tuple[Finding, ...]
    device: str = ""

    @property
    def keeps(self) -> bool:
        """Whether no promise was broken, and none that applies was left unjudged."""
        return not any(one.result in ("broken", "not judged") for one in self.findings)

    def __str__(self) -> str:
        return "\n".join(self.sentences())

    def sentences(self) -> list[str]:
        """The counts, then a line for each promise that was not kept."""
        lines = [f"{self.name}: {tables.conform_sentence(self.to_trials())}."]
        for one in self.findings:
            if one.result not in ("kept", "does not apply"):
                at = f" ({one.smallest})" if one.smallest else ""
                lines.append(f"{one.id}, {one.name}: {one.result}{at}: {one.sentence}.")
        return lines

    def table(self) -> pandas.DataFrame:
        """One row a promise."""
        import pandas

        rows = [{"Id": one.id, "Promise": one.promise, "Result": one.result, "Smallest case": one.smallest,
                 "What happened": one.sentence} for one in self.findings]  # fmt: skip
        return pandas.DataFrame(rows, columns=["Id", "Promise", "Result", "Smallest case", "What happened"])

    def to_trials(self) -> list[Trial]:
        """One record a promise: kind ``diagnosis``, variant ``conform:<id>``; status `failed` where it is broken."""
        return [_trial(self.name, self.device, one) for one in self.findings]


def _trial(name: str, device: str, one: Finding) -> Trial:
    data = {k: v for k, v in asdict(one).items() if k not in ("problem", "id", "name")}
    data |= {"promise_id": one.id, "promise_name": one.name, "device": device, "seconds": round(one.seconds, 3)}
    status = "error" if one.crashed else STATUS[one.result]
    return Trial(kind="diagnosis", backend=name[:64], variant=f"{tables.CONFORM}{one.id}", status=status,
                 problem=one.problem, data=data, reason=None if status == "ok" else f"{one.sentence}.")  # fmt: skip


def conform(
    function: Callable | str | registry.Backend,
    problem: Problem | str | None = None,
    *,
    only: str | Iterable[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Conformance:
    """Ask a function for the promises of attention, in this process, while no other thread asks one for anything.

    Parameters
    ----------
    function
        As `flashcore.bisection.diagnosis.diagnose` takes it.
    problem
        An ordinary problem that the function takes, or its label; None to look for one.
    only
        Ids of promises, as in ``"P1,P6"``; None for all.
    progress
        Told each promise before it is asked.
    options
        `layout`, `lse`, `device` and `time_limit_s`, as of `diagnose`.

    Raises
    ------
    InvalidProblem, UnknownName, BackendUnavailable
        The question makes no sense: no function, a promise that does not exist. What the function does is a finding.
    """
    promises = chosen(only)
    candidate = candidate_of(function, **options)
    home = home_of(candidate, problem)
    findings = []
    for promise in promises:
        if progress:
            progress(f"{candidate.name}: {promise.id}, {promise.name}")
        with ambient.alone:  # tensors of a case, which the function has in hand, are shared with other diagnoses
            findings.append(ask(candidate, promise, home))
    return Conformance(candidate.name, tuple(findings), candidate.device)


def home_of(candidate: Candidate, problem: Problem | str | None = None) -> Problem | Refusal | Broken:
    """An ordinary problem that the function takes; or how it refuses them, or that it never came back."""
    if problem is not None:
        problem = parse_problem(problem) if isinstance(problem, str) else problem
        refuse_masks(problem)
        return problem
    start = candidate.backend.suits(START) if candidate.backend else START
    home, tried = find_home(candidate, start)
    return home or tried[-1].broken or Refusal(tried[-1].refused)


@ambient.judging
def ask(candidate: Candidate, promise: Promise, home: Problem | Refusal | Broken) -> Finding:
    """Ask for one promise: all its cases, until one breaks it. Never raises for what the function does.

    Parameters
    ----------
    home
        Of `home_of`.
    """
    started = time.perf_counter()

    def found(result: Result, sentence: str, **more: Any) -> Finding:
        return Finding(promise.id, promise.name, promise.sentence, result, sentence,
                       seconds=time.perf_counter() - started, **more)  # fmt: skip

    reason = promise.why_not(candidate)
    if reason:
        return found("does not apply", reason)
    if isinstance(home, Refusal):
        return found("refused", f"it takes none of the ordinary problems: {home}")
    if isinstance(home, Broken):
        first = promise is PROMISES[0]
        return found("broken" if first else "not judged", _clause(home) + ("" if first else " (see P1)"))
    answered, refusals = 0, []
    for asked in promise.all_cases(candidate, home):
        try:
            broken = _broken(candidate, promise, asked)
        except Refusal as refusal:
            refusals.append((asked, str(refusal)))
            continue
        except Exception as error:  # whatever it is, the next promise is asked
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return found("not judged", f"asking for it failed on {asked.label()}: {said}", cases=answered,
                         refused=len(refusals), problem=asked.problem)  # fmt: skip
        answered += 1
        if broken is None:
            continue
        blame = _blame(candidate, promise, asked)
        if blame:
            return found("not judged", f"{blame} (see P1), on {asked.label()}", problem=asked.problem, cases=answered,
                         refused=len(refusals))  # fmt: skip
        asked, broken = _shrunk(candidate, promise, asked, broken)
        return found("broken" if promise.binding else "not promised", broken, smallest=asked.label(),
                     problem=asked.problem, cases=answered, refused=len(refusals))  # fmt: skip
    if answered:
        more = f"; it refuses {len(refusals)} more, {_first(refusals)}" if refusals else ""
        return found("kept", f"in all {answered} cases{more}", cases=answered, refused=len(refusals))
    if refusals:
        return found("refused", _first(refusals), refused=len(refusals), problem=refusals[0][0].problem)
    return found("does not apply", "no case of it is among the problems that it takes")


def _first(refusals: Sequence[tuple[Asked, str]]) -> str:
    asked, said = refusals[0]
    return f"{asked.label()}: {said.rstrip('.')}"


def _broken(candidate: Candidate, promise: Promise, asked: Asked) -> str | None:
    """The break, if it is one; an answer that is none breaks whatever was asked."""
    try:
        return promise.ask(candidate, asked)
    except Broken as broken:
        return _clause(broken)
    except torch.cuda.OutOfMemoryError as error:
        raise Refusal("the GPU has no memory left for this case") from error


def _clause(broken: Broken) -> str:
    """Its sentence as a clause."""
    return broken.sentence[:1].lower() + broken.sentence[1:].rstrip(".")


def _blame(candidate: Candidate, promise: Promise, asked: Asked) -> str:
    """Why a break says nothing of this promise, as a clause: the plain twin is wrong too. Empty when it is right."""
    if promise.plain is None:
        return ""
    try:
        return "it is wrong on the plain twin of the case too" if promise.plain(candidate, asked) else ""
    except Refusal:
        return ""
    except Broken as broken:
        return f"on the plain twin of the case {_clause(broken)}"


def _shrunk(candidate: Candidate, promise: Promise, asked: Asked, broken: str) -> tuple[Asked, str]:
    """The smallest case found that breaks the promise too, and its break."""
    until = time.monotonic() + SHRINK_S
    if "did not return" in broken or "did not end" in broken:  # each try would take the whole time limit
        return asked, broken
    better = True
    while better and time.monotonic() < until:
        better = False
        for inputs in smaller(Inputs(asked.problem)):
            if time.monotonic() > until:
                break
            less = replace(asked, problem=inputs.problem)
            if (asked.problem.softmax_scale != less.problem.softmax_scale or not promise.suits(less)
                    or less.problem.causal != asked.problem.causal and "causal" not in candidate.takes):  # fmt: skip
                continue
            try:
                again = _broken(candidate, promise, less)
                if again is None or _blame(candidate, promise, less):
                    continue
            except Refusal:
                continue
            asked, broken, better = less, again, True
            break
    return asked, broken


# --- in processes of their own -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _candidate(
    place: str, problem: Problem | None, options: tuple[tuple[str, Any], ...]
) -> tuple[Candidate, Problem | Refusal | Broken]:
    candidate = candidate_of(place, **dict(options))
    return candidate, home_of(candidate, problem)


def _asked_there(
    place: str, promise_id: str, problem: Problem | None, options: tuple[tuple[str, Any], ...]
) -> tuple[str, str, Finding] | tuple[type[FlashCoreError], str]:
    """What runs in the worker: one promise, or the error that the question itself is."""
    try:
        candidate, home = _candidate(place, problem, options)
    except FlashCoreError as error:
        return type(error), str(error)
    (promise,) = chosen(promise_id)
    return candidate.name, candidate.device, ask(candidate, promise, home)


def conform_apart(
    place: str,
    problem: Problem | str | None = None,
    *,
    only: str | Iterable[str] | None = None,
    progress: Progress | None = None,
    worker: Worker | None = None,
    within_s: float | None = None,
    **options: Any,
) -> Conformance:
    """`conform`, with every promise asked in another process: one that dies or hangs is a broken promise.

    Parameters
    ----------
    place
        ``FILE.py:function``, ``MODULE:function`` or the id of a backend.
    worker
        The process to use; None for one that ends with the call.
    within_s
        Seconds for all promises together; those that are left then are not judged, and say so. None for no limit.
    """
    if worker is None:
        with Worker() as own:
            return conform_apart(place, problem, only=only, progress=progress, worker=own, within_s=within_s, **options)
    asked = parse_problem(problem) if isinstance(problem, str) else problem
    call_limit = options.get("time_limit_s", TIME_LIMIT_S)
    refuse_limit(call_limit)
    limit = PROMISE_LIMIT_S + 2 * call_limit
    name, device, findings, deaths = place, options.get("device") or "", [], 0
    until = math.inf if within_s is None else time.monotonic() + within_s
    for promise in chosen(only):
        left_s = until - time.monotonic()
        if left_s <= 0:
            findings.append(_too_late(promise, within_s))
            continue
        if progress:
            progress(f"{place}: {promise.id}, {promise.name}")
        if deaths >= MOST_DEATHS:
            said = f"its process died at each of the {MOST_DEATHS} promises before"
            findings.append(Finding(promise.id, promise.name, promise.sentence, "not judged", said))
            continue
        outcome = worker.call(_asked_there, place, promise.id, asked, tuple(sorted(options.items())),
                              timeout_s=min(limit, left_s))  # fmt: skip
        if outcome.how == "timeout" and left_s < limit:  # it had less than a promise is given
            findings.append(_too_late(promise, within_s, outcome.seconds))
            continue
        if not outcome.ok:
            deaths += outcome.crashed
            findings.append(_died(promise, outcome))
            continue
        deaths = 0
        if len(outcome.value) == 2:
            kind, sentence = outcome.value
            error = kind.__new__(kind)  # its fields did not travel; its sentence did
            Exception.__init__(error, sentence)
            raise error
        name, device, finding = outcome.value
        findings.append(finding)
    return Conformance(name, tuple(findings), device)


def _too_late(promise: Promise, within_s: float | None, seconds: float = 0.0) -> Finding:
    """A promise that was not asked to the end."""
    said = f"the {within_s:g} s for all promises were up"
    return Finding(promise.id, promise.name, promise.sentence, "not judged", said, seconds=seconds)


def _died(promise: Promise, outcome: Outcome) -> Finding:
    """A promise at which the process died, hung, or lost its CUDA context; or at which the asking itself raised."""
    said = outcome.reason.rstrip(".")
    if not outcome.crashed:
        return Finding(promise.id, promise.name, promise.sentence, "not judged", f"asking for it failed: {said}",
                       seconds=outcome.seconds)  # fmt: skip
    what = "its CUDA context did not survive it" if outcome.context_lost else "it took its process with it"
    return Finding(promise.id, promise.name, promise.sentence, "broken", f"{what}: {said}", seconds=outcome.seconds,
                   crashed=True)  # fmt: skip


def conform_all(
    places: Sequence[str] | None = None,
    problem: Problem | str | None = None,
    *,
    only: str | Iterable[str] | None = None,
    progress: Progress | None = None,
    told: Callable[[Conformance], None] | None = None,
    within_s: float | None = None,
    **options: Any,
) -> list[Conformance]:
    """Ask several implementations, one after the other: on a GPU each in a process of its own.

    On a CPU the backends are asked in this process, and functions of others in another.

    Parameters
    ----------
    places
        As `conform_apart` takes one; None for every backend and peer that runs on this machine.
    told
        Given what came of each as soon as it is there.
    within_s
        As of `conform_apart`, for each of them that is asked in another process.
    """
    chosen(only)
    if places is None:
        places = [one.id for one in registry.all_backends() if one.availability().ok]
    for place in places:  # a name that is wrong is told before the first one is asked
        if ":" not in place:
            state = registry.get(place).availability()
            if not state.ok:
                raise BackendUnavailable(place, state.reason, state.fix)
    alone = torch.cuda.is_available() and options.get("device") != "cpu"
    found = []
    with Worker(warm=__name__) as worker:
        for place in places:
            if alone or ":" in place:
                one = conform_apart(place, problem, only=only, progress=progress, worker=worker, within_s=within_s,
                                    **options)  # fmt: skip
            else:
                one = conform(place, problem, only=only, progress=progress, **options)
            found.append(one)
            if told:
                told(found[-1])
            if alone:
                worker.close()  # the next call starts a new process
    return found


def conform_tasks(places: Sequence[str]) -> list[Task]:
    """`conform_all` as tasks for `measure.cluster.perform`, one an implementation; each yields its records.

    On a GPU each has `ALL_LIMIT_S`, so that one that crashes, hangs or compiles for minutes costs its own column alone.
    """
    return [
        Task(f"the promises of {place}", _conformed, (place,), limit_s=ALL_LIMIT_S + START_S,
             cost_s=60.0 if _foreign(place) else 10.0, host=":" not in place and on_host(registry.get(place)),
             owed=({"kind": "diagnosis", "backend": place, "variant": f"{tables.CONFORM}{PROMISES[0].id}"},))
        for place in places
    ]  # fmt: skip


def _conformed(place: str) -> Iterator[Trial]:
    more = {"time_limit_s": PEER_CALL_LIMIT_S} if _foreign(place) else {}
    for found in conform_all([place], within_s=ALL_LIMIT_S, **more):
        yield from found.to_trials()


def _foreign(place: str) -> bool:
    """Whether somebody else's code is asked."""
    return ":" in place or registry.get(place).foreign
