"""Ask backends for their bits, case by case, and make a record of how many cases each keeps."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from flashcore import backends as registry
from flashcore.errors import BackendUnavailable, InvalidProblem, UnknownName
from flashcore.gpu.build import compile_kernel
from flashcore.gpu.isolation import Worker, isolated_trial
from flashcore.measure.cluster import Task
from flashcore.problem import Problem
from flashcore.records import Trial
from flashcore.surveys.invariance import cases, judging, ways
from flashcore.surveys.invariance.cases import SIZES, Setting
from flashcore.surveys.invariance.judging import Case
from flashcore.surveys.invariance.ways import Implementation, implementation

Mode = Literal["invariant", "ordinary"]
MODES: tuple[Mode, ...] = get_args(Mode)
CASES = {"quick": {"cpu": 300, "cuda": 500}, "full": {"cpu": 1000, "cuda": 10_000}}
"""Cases of an implementation in one mode, by profile and kind of device."""
LIMIT_S = {"cpu": 60.0, "cuda": 300.0}
"""Seconds after which no further setting is drawn; most of them go to compilers, where a kernel is compiled on demand.
"""
PEER_LIMIT_S = 20.0
"""The same for a peer, which promises nothing; most have been asked every case by then."""
SLACK_S = 60.0
"""Seconds beyond its limit that a process gets until it is ended."""
MOST_BREAKS = 3
"""Breaks that are made smaller and kept, each of another pair of ways."""
SHRINK_S = {"cpu": 1.5, "cuda": 4.0}
"""Seconds that each of these may take."""
MOST_ERRORS = 3
"""Settings in a row whose computation raised until no further one is drawn."""
MOST_IDLE = 60
"""Settings in a row without a case until no further one is drawn."""
OUT_OF_TIME = "the time ran out"
"""What a record says of why no further setting was drawn, where that is so."""
AHEAD = 24
"""Settings whose kernels are compiled ahead, all at once."""
Progress = Callable[[str], None]


@dataclass
class _Count:
    """What came of the cases so far."""

    cases: int = 0
    broken: int = 0
    settings: int = 0
    subjects: int = 0
    pairs: dict[str, list[int]] = field(default_factory=dict)
    """[kept, all] for each pair of ways."""
    others: list[int] = field(default_factory=lambda: [0, 0])
    """[kept, all] of cases in which one way has other queries in the rows beside."""
    breaks: list[dict[str, Any]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def add(self, case: Case) -> None:
        self.cases += 1
        self.broken += not case.kept
        of_pair = [self.pairs.setdefault(case.pair, [0, 0])]
        if any(way.others for way in case.ways):
            of_pair.append(self.others)
        for counts in of_pair:
            counts[0] += case.kept
            counts[1] += 1


def measure(
    backend: str | registry.Backend,
    mode: Mode,
    *,
    num_cases: int,
    seed: int = 0,
    limit_s: float | None = None,
    progress: Progress | None = None,
) -> Trial:
    """Ask one implementation, in this process; raises only where the question makes no sense.

    Parameters
    ----------
    backend
        A backend or its id; what reads pages beside it is asked with it (`ways.OVER_PAGES`).
    mode
        ``invariant``: calls ask for the batch-invariant mode, in which a break is a fault. ``ordinary``: they do not,
        and a break is a finding.
    num_cases
        How many; one is a sequence and two ways to compute it.
    seed
        Of everything that is drawn.
    limit_s
        Seconds after which it ends with the cases it has; None for `LIMIT_S`.

    Returns
    -------
    Trial
        Kind `invariance`, variant the mode; see `facts` for what its data hold.

    Raises
    ------
    UnknownName, InvalidProblem
        No such backend or mode; fewer than one case.
    """
    if mode not in MODES:
        raise UnknownName("mode", mode, list(MODES))
    if num_cases < 1:
        raise InvalidProblem(f"cases is {num_cases}; ask at least 1.")
    one = implementation(backend)
    common = fields_of(one, mode)
    for needed in one.all:
        state = needed.availability()
        if not state.ok:
            return Trial(**common, status="unavailable", reason=f"{needed.id}: {state.reason}; to mend it: {state.fix}")
    if mode == "invariant":
        promising = one.promising
        if promising is None:
            reason = "it does not promise the same bits, and refuses problems that ask for them"
            return Trial(**common, status="unsupported", reason=reason)
        one = promising
        common = fields_of(one, mode)
    device = judging.device_of(one.first)
    started = time.perf_counter()
    count, stopped = _ask(one, mode == "invariant", device, num_cases, seed, limit_s or limit_of(one), progress)
    data = common.pop("data") | {
        "cases": count.cases, "kept": count.cases - count.broken, "broken": count.broken, "subjects": count.subjects,
        "settings": count.settings, "asked": num_cases, "stopped": stopped, "pairs": count.pairs,
        "others": count.others, "breaks": count.breaks, "errors": len(count.errors), "seed": seed, "device": device,
        "refused": dict(count.refused.most_common(5)), "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip
    return Trial(**common, data=data, **_status(mode, count, stopped))


def limit_of(one: Implementation) -> float:
    """Seconds that an implementation gets in one mode."""
    limit = LIMIT_S[judging.device_of(one.first)]
    return limit if one.first.role == "ours" else min(limit, PEER_LIMIT_S)


def fields_of(one: Implementation, mode: Mode) -> dict[str, Any]:
    """Fields of an implementation's record, whatever comes of it."""
    data: dict[str, Any] = {"mode": mode, "role": one.first.role, "promised": mode == "invariant"}
    if one.paged:
        data["over_pages"] = [backend.id for backend in one.paged if backend is not one.dense]
    asked = Setting(sink=True).problem(1, 1, 1, invariant=mode == "invariant")  # many settings have masks
    hashes = {backend.kernel: backend.source_hash(asked) for backend in one.all if backend.kernel}
    if len(hashes) > 1:
        data["sources"] = hashes
    if version := one.first.software():
        data["version"] = version
    return {"kind": "invariance", "backend": one.id, "variant": mode, "data": data,
            "source_hash": one.first.source_hash(asked)}  # fmt: skip


def _status(mode: Mode, count: _Count, stopped: str) -> dict[str, Any]:
    """Status and reason: a break of what was promised fails, one of what was not is a figure like another."""
    if count.broken and mode == "invariant":
        return {"status": "failed", "reason": f"{count.broken:,} of {count.cases:,} cases are broken."}
    if count.errors and (mode == "invariant" or not count.cases):
        return {"status": "error", "reason": f"{len(count.errors)} settings raised, the first: {count.errors[0]}"}
    if not count.cases and stopped == OUT_OF_TIME:
        status = "error" if mode == "invariant" else "unsupported"  # a promise that nobody looked at is not kept
        return {"status": status, "reason": "The time ran out before a case was asked."}
    if not count.cases:
        why = next(iter(count.refused), "it takes none of the settings that were drawn")
        return {"status": "unsupported", "reason": f"No case could be asked: {why}."}
    return {}


def _ask(
    one: Implementation, invariant: bool, device: str, num_cases: int, seed: int, limit_s: float,
    progress: Progress | None,
) -> tuple[_Count, str]:  # fmt: skip
    size, until, count = SIZES[device], time.monotonic() + limit_s, _Count()
    most = min(size.subjects, max(1, num_cases // (size.settings * size.ways)))
    in_a_row = idle = number = 0
    while count.cases < num_cases:
        if number % AHEAD == 0:
            _compile_ahead(one, [_drawn(one, seed, number + more, size, invariant)[1] for more in range(AHEAD)],
                           invariant)  # fmt: skip
            if progress:
                progress(f"{one.id}: {count.cases:,} of {num_cases:,} cases")
        if time.monotonic() > until:
            return count, OUT_OF_TIME
        if in_a_row >= MOST_ERRORS or idle >= MOST_IDLE:
            return count, "its calls raise" if in_a_row >= MOST_ERRORS else "no more settings have a case"
        rng, setting = _drawn(one, seed, number, size, invariant)
        number += 1
        if setting is None:
            idle += 1
            continue
        drawn = ways.draw(rng, one, setting, size)
        subjects = sorted(rng.sample(range(len(setting)), min(len(setting), most)))
        try:
            found = judging.cases_of(one, setting, drawn, subjects, invariant=invariant,
                                     refused=lambda way, reason: count.refused.update([reason]))  # fmt: skip
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            idle += 1
            continue
        except Exception as error:  # whatever a kernel raises is said, and the next setting is asked
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            count.errors.append(f"{said} (at {setting.line()[:300]})")
            in_a_row += 1
            continue
        in_a_row, idle = 0, 0 if found else idle + 1
        found = found[: num_cases - count.cases]
        count.settings += bool(found)
        count.subjects += len({case.subject for case in found})
        for case in found:
            count.add(case)
            if not case.kept and case.pair not in [b["pair"] for b in count.breaks] and len(count.breaks) < MOST_BREAKS:
                count.breaks.append(_told(one, case, invariant, SHRINK_S[device]))
    return count, "all were asked"


def _drawn(
    one: Implementation, seed: int, number: int, size: cases.Size, invariant: bool
) -> tuple[random.Random, Setting | None]:
    """Setting `number` of a seed, and what its ways are drawn from."""
    rng = random.Random(f"invariance {seed} {number}")
    return rng, cases.draw(rng, one.takes, size, lambda setting: one.refuses(setting, invariant=invariant))


def _told(one: Implementation, case: Case, invariant: bool, seconds: float) -> dict[str, Any]:
    """A break as a record keeps it: the smallest case found, as a line of Python, and what differs in it."""
    try:
        case = judging.shrunk(one, case, invariant=invariant, seconds=seconds)
        said = str(judging.compare(one.first, case.setting, case.subject, *case.ways, invariant=invariant))
    except Exception as error:  # a kernel may raise on the way to a smaller case; the break stands all the same
        said = f"broken; asked again it raised {type(error).__name__}"
    return {"pair": case.pair, "said": said, "line": judging.line(one, case, invariant=invariant)}


# --- kernels are compiled all at once ----------------------------------------------------------------------------


def _compile_ahead(one: Implementation, settings: Iterable[Setting | None], invariant: bool) -> None:
    """Fill the cache of compiled kernels with what these settings need; what fails is told when it is called."""
    wanted = {}
    for setting in settings:
        if setting is None or judging.device_of(one.first) != "cuda":
            continue
        for backend, problem in _problems(one, setting, invariant):
            if isinstance(backend, registry.CudaBackend) and backend.why_not(problem) is None:
                defines = backend.defines(problem, torch.cuda.current_device())
                wanted[backend.kernel, problem.head_dim, problem.dtype, tuple(defines)] = backend.source
    if len(wanted) < 2:
        return

    def built(variant: tuple[str, int, str, tuple], source: str | None) -> None:
        kernel, head_dim, dtype, defines = variant
        with contextlib.suppress(Exception):
            compile_kernel(kernel, head_dim=head_dim, dtype=dtype, trace=False, source=source, defines=dict(defines))

    with ThreadPoolExecutor() as pool:  # NVRTC lets other threads run while it compiles
        list(pool.map(lambda item: built(*item), wanted.items()))


def _problems(one: Implementation, setting: Setting, invariant: bool) -> Iterator[tuple[registry.Backend, Problem]]:
    """Problems of the kinds that a setting has: alone, many at once, ragged, few and many rows over pages."""
    rows, keys = setting.lengths[0]
    if one.dense:
        for batch in (1, 256):
            yield one.dense, setting.problem(batch, rows, keys, invariant=invariant)
            if "ragged" in one.dense.masks:
                yield one.dense, setting.problem(batch, rows, keys, invariant=invariant, lengths="ragged")
    for backend in one.paged:
        for batch, tokens in ((1, 1), (256, 1), (1, rows), (256, rows)):
            yield backend, setting.problem(batch, tokens, keys, invariant=invariant, page_size=64)


# --- several, in processes of their own --------------------------------------------------------------------------


def asked_by_default() -> list[str]:
    """Ids of what is asked where nobody names any: what promises the bits, our kernel for prompts, and the peers.

    Those that run here; what reads pages beside another is asked with that.
    """
    beside = {name for names in ways.OVER_PAGES.values() for name in names}
    ours = {"hopper", "cpu"}
    return [
        one.id for one in registry.all_backends()
        if one.id not in beside and (one.id in ours or one.role == "peer" or one.batch_invariant)
        and one.variant_of is None and one.swept and one.availability().ok
    ]  # fmt: skip


def plan(chosen: Sequence[str], modes: Sequence[Mode]) -> list[tuple[str, Mode]]:
    """What to ask of each of these backends: the invariant mode of those of ours, the ordinary mode of all."""
    alone = len(modes) == 1  # what was asked for by name is answered, if only by a refusal
    return [
        (name, mode) for name in chosen for mode in MODES
        if mode in modes and (alone or mode == "ordinary" or registry.get(name).role == "ours")
    ]  # fmt: skip


def measure_apart(
    backend: str, mode: Mode, *, num_cases: int, seed: int = 0, limit_s: float | None = None,
    worker: Worker | None = None,
) -> Trial:  # fmt: skip
    """`measure` in another process: one that dies or hangs is a record, and costs no other backend."""
    one = implementation(backend)
    limit = limit_s or limit_of(one)
    return isolated_trial(
        measure, backend, mode, num_cases=num_cases, seed=seed, limit_s=limit, worker=worker,
        timeout_s=limit + SLACK_S, fields=fields_of(one, mode),
    )  # fmt: skip


def measure_all(
    chosen: Sequence[str] | None = None,
    modes: Sequence[Mode] = MODES,
    *,
    num_cases: int | None = None,
    seed: int = 0,
    limit_s: float | None = None,
    progress: Progress | None = None,
    told: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Ask several implementations, one after the other; on a GPU each in a process of its own.

    Parameters
    ----------
    chosen
        Ids of backends; None for all that are asked by default.
    num_cases
        For each and in each mode; None for as many as a full report asks.
    told
        Given each record as soon as it is there.

    Raises
    ------
    UnknownName, BackendUnavailable
        One of them does not exist, or cannot run here; nothing was asked.
    """
    if chosen is not None:
        for name in chosen:
            for needed in implementation(name).all:
                state = needed.availability()
                if not state.ok:
                    raise BackendUnavailable(needed.id, state.reason, state.fix)
    found = []
    for name, mode in plan(asked_by_default() if chosen is None else chosen, modes):
        if progress:
            progress(f"{name}, {mode} mode")
        found.append(_here_or_apart(name, mode, num_cases, "full", seed, limit_s, progress))
        if told:
            told(found[-1])
    return found


def _here_or_apart(
    name: str, mode: Mode, num_cases: int | None, profile: str, seed: int, limit_s: float | None,
    progress: Progress | None = None,
) -> Trial:  # fmt: skip
    device = judging.device_of(implementation(name).first)
    options = {"num_cases": num_cases or CASES[profile][device], "seed": seed, "limit_s": limit_s}
    if device == "cpu":
        return measure(name, mode, **options, progress=progress)
    return measure_apart(name, mode, **options)


def tasks(chosen: Sequence[str], profile: str, *, seed: int = 0) -> list[Task]:
    """The same as tasks for `flashcore.measure.cluster.perform`, one a backend and mode; each yields its record.

    Under the profile ``quick`` no peer on a GPU is asked: each takes seconds to load, and some to compile.
    """
    kept = [name for name in chosen if profile == "full" or not _on_gpu(name) or registry.get(name).role == "ours"]
    return [
        Task(f"the bits of {name}, {mode} mode", _measured, (name, mode, profile, seed),
             limit_s=LIMIT_S["cuda"] + 2 * SLACK_S, cost_s=20.0, host=not _on_gpu(name),
             owed=({"kind": "invariance", "backend": name, "variant": mode, "data": {"mode": mode}},))
        for name, mode in plan(kept, MODES)
    ]  # fmt: skip


def _on_gpu(name: str) -> bool:
    return judging.device_of(registry.get(name)) == "cuda"


def _measured(name: str, mode: Mode, profile: str, seed: int) -> Iterator[Trial]:
    yield _here_or_apart(name, mode, None, profile, seed, None)
