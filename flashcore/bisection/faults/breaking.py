"""Prove the comparison of bits: plant what breaks the promise of the batch-invariant mode, and see whether it is found.

Each is asked as an honest backend is (`surveys.invariance.measuring`), which is never told that there is a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from flashcore import backends as registry
from flashcore.bisection.faults.plants.invariance import BREAKS, Break
from flashcore.errors import UnknownName
from flashcore.records import Trial
from flashcore.surveys.invariance import measuring

Progress = Callable[[str], None]
FOUND_BY = "invariance"
STAGE = "bits"
"""What stands in a record for the stage that a bug shows at."""


def prove_breaks(
    chosen: Sequence[str] | None = None,
    *,
    num_cases: int | None = None,
    seed: int = 0,
    limit_s: float | None = None,
    progress: Progress | None = None,
) -> Iterator[Trial]:
    """Plant each bug in each backend that can hold it, and compare bits; a `fault` record each, as it is made.

    Parameters
    ----------
    chosen
        Ids of the backends to plant in; None for all that can hold one.
    num_cases
        Cases for each bug; None for as many as a quick report asks of an honest backend.
    seed, limit_s
        As for an honest backend (`measuring.measure`).

    Yields
    ------
    Trial
        `variant` the bug's id, data `outcome`: `found`, `missed`, `not run` (the backend does not work here) or
        `not planted` (the patch no longer fits, or its calls raise).

    Raises
    ------
    UnknownName
        No bug is planted in one of these backends; nothing was planted.
    """
    hosts = list(dict.fromkeys(host for one in BREAKS for host in one.plants))
    for name in chosen or ():
        if name not in hosts:
            raise UnknownName("backend with a planted break", name, hosts)
    return _proved([h for h in hosts if chosen is None or h in chosen], num_cases, seed, limit_s, progress)


def _proved(hosts: Sequence[str], num_cases, seed, limit_s, progress) -> Iterator[Trial]:
    for one in BREAKS:
        for host in one.plants:
            if host in hosts:
                if progress:
                    progress(f"{one.id}, planted in {host}")
                yield _prove(one, host, num_cases, seed, limit_s)


def _prove(one: Break, host: str, num_cases: int | None, seed: int, limit_s: float | None) -> Trial:
    """The record of one bug in one backend."""
    fields = {"kind": "fault", "backend": host, "variant": one.id}
    data = {"fault": one.id, "title": one.title, "expected_stage": STAGE, "found_by": FOUND_BY, "found_stage": None}
    state = registry.get(host).availability()
    if not state.ok:
        return Trial(**fields, status="unavailable", reason=f"{state.reason}; to mend it: {state.fix}",
                     data={**data, "outcome": "not run"})  # fmt: skip
    asked = num_cases or measuring.CASES["quick"]["cpu" if registry.get(host).device == "cpu" else "cuda"]
    try:
        planted = one.plants[host].apply(registry.get(host))
        found = measuring.measure(planted, "invariant", num_cases=asked, seed=seed, limit_s=limit_s)
    except Exception as error:  # a patch may not fit or compile; the record has to say so
        text = " ".join(str(error).split())[:500] or "no message"
        return Trial(**fields, status="error", reason=f"{type(error).__name__}: {text}",
                     data={**data, "outcome": "not planted"})  # fmt: skip
    data |= {name: found.data.get(name, 0) for name in ("cases", "broken", "pairs", "seconds", "stopped")}
    if found.status == "failed":
        return Trial(**fields, data={**data, "found_stage": STAGE, "outcome": "found"}, source_hash=found.source_hash)
    if found.status != "ok":
        return Trial(**fields, status="error", reason=found.reason, data={**data, "outcome": "not planted"})
    reason = f"{one.id} has to break bits, and all of {data['cases']:,} cases were kept"
    return Trial(**fields, status="failed", reason=reason, data={**data, "outcome": "missed"})
