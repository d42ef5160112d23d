"""Run a survey of paging: what was asked for, in order, each record on disk before the next is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from flashcore.errors import UnknownName
from flashcore.measure.cluster import Here, Pool, Task, crew, perform
from flashcore.numerics import ambient
from flashcore.records import Ledger, RunFolder, Trial
from flashcore.surveys.paging.accuracy import measure_accuracy
from flashcore.surveys.paging.append import measure_append
from flashcore.surveys.paging.correctness import measure_correctness
from flashcore.surveys.paging.decode import measure_decode
from flashcore.surveys.paging.matrix import GROUPS
from flashcore.surveys.paging.memory import measure_memory
from flashcore.surveys.paging.plan import Plan
from flashcore.surveys.paging.prefill import measure_prefill
from flashcore.surveys.paging.read_speed import NAME, read_speed
from flashcore.surveys.paging.serving import measure_serving
from flashcore.surveys.paging.shapes import cases, measure_shapes
from flashcore.surveys.paging.tokens import measure_tokens
from flashcore.surveys.paging.trials import Book

WHATS: dict[str, Callable[[Book, Plan], None]] = {
    "correctness": measure_correctness, "memory": measure_memory, "decode": measure_decode,
    "prefill": measure_prefill, "append": measure_append, "accuracy": measure_accuracy, "tokens": measure_tokens,
    "serving": measure_serving, "shapes": measure_shapes,
}  # fmt: skip
"""What can be measured, by the word that its records have under ``data["what"]``; correctness comes first."""
ON_CPU = ("correctness", "memory", "accuracy")
"""What means something without a GPU: the reference is right, books count, policies choose; nothing there is fast."""
TIMED = ("decode", "prefill", "append", "tokens", "serving", "shapes")
"""What times anything."""


def chosen(what: str, gpu: bool) -> list[str]:
    """Names out of a comma-separated list; ``all`` for everything that means something on this machine.

    Raises
    ------
    UnknownName
        One of them is not among `WHATS`, or there is none.
    """
    if what.strip() == "all":
        return [name for name in WHATS if gpu or name in ON_CPU]
    names = [name.strip() for name in what.split(",") if name.strip()]
    for name in names or [what]:
        if name not in WHATS:
            raise UnknownName("measurement of paging", name, ["all", *WHATS])
    return [name for name in WHATS if name in names]


@ambient.judging
def measure(
    run: RunFolder,
    plan: Plan,
    *,
    what: str = "all",
    seed: int = 0,
    pool: Pool | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Trial]:
    """Measure and record; what fails is a record, and the rest goes on.

    Parameters
    ----------
    what
        Names from `WHATS` separated by commas; ``all`` leaves out what says nothing without a GPU.
    pool
        The workers, each of which takes a shape, a batch or a group of cases; None for this process alone, beside which
        several share the GPU while nothing is timed, where this machine has room for them (`cluster.crew`).
    progress
        Called with a line for each thing measured, or that a worker begins.

    Returns
    -------
    list of Trial
        The records written by this call.
    """
    names = chosen(what, plan.gpu)
    if pool is not None and pool.places:
        return _spread(run, plan, names, seed, pool, progress)
    say = progress or (lambda line: None)
    shared = [name for name in names if name not in TIMED]
    workers = crew(Here(), most=sum(len(list(parts(name, plan))) for name in shared)) if plan.gpu else Here()
    found: list[Trial] = []
    if not isinstance(workers, Here):
        try:
            found = _spread(run, plan, shared, seed, workers, progress)
        finally:
            workers.close()
        names = [name for name in names if name in TIMED]
    book = Book(run, say)
    for name in names:
        book.say = lambda line, name=name: say(f"{name}: {line}")
        _one(book, name, plan, {} if name == "memory" else {"seed": seed})
    return [*found, *book.trials]


def _one(book: Book, name: str, plan: Plan, options: dict[str, Any]) -> None:
    try:
        WHATS[name](book, plan, **options)
    except Exception as error:  # what is common to all its trials failed, as a read kernel that does not compile
        book.failed(name, error)


# ----------------------------------------------------------------------------------------------- on several workers


def _spread(
    run: RunFolder, plan: Plan, names: list[str], seed: int, pool: Pool, progress: Callable[[str], None] | None
) -> list[Trial]:
    """`measure`, cut into the parts that need nothing of each other but the speed of a plain read."""
    known = run.trials(kind="ceiling")
    if "decode" in names and not any(t.status == "ok" and t.data.get("name") == NAME for t in known):
        owed = ({"kind": "ceiling", "data": {"name": NAME}},)
        known = perform([Task("the speed of a read", _read, timing=True, owed=owed)], run=run, pool=pool)[0]
    tasks = []
    for name in names:
        for words, part, options in parts(name, plan):
            options |= {} if name == "memory" else {"seed": seed}
            owed = ({"kind": "paging", "data": {"what": name, **({"part": words} if words else {})}},)
            tasks.append(Task(f"{name}: {words}" if words else name, _part, (name, part, options, known), owed=owed,
                              timing=name in TIMED, cost_s=2.0 if name in TIMED else 1.5))  # fmt: skip
    return perform(tasks, run=run, pool=pool, progress=progress)[0]


def parts(name: str, plan: Plan) -> Iterator[tuple[str, Plan, dict[str, Any]]]:
    """The parts that one measurement falls into: what each is about, its plan, and further options."""
    if name == "correctness":
        yield from ((group, plan, {"groups": (group,)}) for group in GROUPS)
    elif name in ("decode", "prefill"):
        yield from ((one.label(), replace(plan, **{name: (one,)}), {}) for one in getattr(plan, name))
    elif name == "tokens":
        for model in plan.models:
            for batch in plan.batches:
                yield f"{model.name}, batch {batch}", replace(plan, models=(model,), batches=(batch,)), {}
    elif name == "serving":
        for model in plan.served:
            for batch in plan.served_batches:
                yield f"{model.name}, batch {batch}", replace(plan, served=(model,), served_batches=(batch,)), {}
    elif name == "shapes":
        for case, part in cases(plan):
            words = ", ".join([case, *(one.with_(dtype=part.dtypes[0]).label() for one in part.shapes)])
            yield words, part, {}
    else:
        yield "", plan, {}


@ambient.judging
def _part(name: str, plan: Plan, options: dict[str, Any], known: list[Trial]) -> list[Trial]:
    ledger = Ledger(known)
    _one(Book(ledger, lambda line: None), name, plan, options)
    return ledger.made


@ambient.judging
def _read() -> list[Trial]:
    return [read_speed(Ledger())]
