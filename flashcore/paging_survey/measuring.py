"""Run a survey of paging: what was asked for, in order, each record on disk before the next is measured."""

from __future__ import annotations

from collections.abc import Callable

from flashcore.errors import UnknownName
from flashcore.numerics import ambient
from flashcore.paging_survey.accuracy import measure_accuracy
from flashcore.paging_survey.append import measure_append
from flashcore.paging_survey.correctness import measure_correctness
from flashcore.paging_survey.decode import measure_decode
from flashcore.paging_survey.memory import measure_memory
from flashcore.paging_survey.plan import Plan
from flashcore.paging_survey.prefill import measure_prefill
from flashcore.paging_survey.tokens import measure_tokens
from flashcore.paging_survey.trials import Book
from flashcore.records import RunFolder, Trial

WHATS: dict[str, Callable[[Book, Plan], None]] = {
    "correctness": measure_correctness, "memory": measure_memory, "decode": measure_decode,
    "prefill": measure_prefill, "append": measure_append, "accuracy": measure_accuracy, "tokens": measure_tokens,
}  # fmt: skip
"""What can be measured, by the word that its records have under ``data["what"]``; correctness comes first."""
ON_CPU = ("correctness", "memory", "accuracy")
"""What means something without a GPU: the reference is right, books count, policies choose; nothing there is fast."""


def chosen(what: str, gpu: bool) -> list[str]:
    """Names out of a comma-separated list; ``all`` for everything that means something on this machine.

    Raises
    ------
    UnknownName
        One of them is not among `WHATS`.
    """
    if what.strip() == "all":
        return [name for name in WHATS if gpu or name in ON_CPU]
    names = [name.strip() for name in what.split(",") if name.strip()]
    for name in names:
        if name not in WHATS:
            raise UnknownName("measurement of paging", name, ["all", *WHATS])
    return [name for name in WHATS if name in names]


@ambient.judging
def measure(
    run: RunFolder, plan: Plan, *, what: str = "all", seed: int = 0, progress: Callable[[str], None] | None = None
) -> list[Trial]:
    """Measure and record; what fails is a record, and the rest goes on.

    Parameters
    ----------
    what
        Names from `WHATS` separated by commas; ``all`` leaves out what says nothing without a GPU.
    progress
        Called with a line for each thing measured.

    Returns
    -------
    list of Trial
        The records written by this call.
    """
    names = chosen(what, plan.gpu)
    say = progress or (lambda line: None)
    book = Book(run, say)
    for name in names:
        book.say = lambda line, name=name: say(f"{name}: {line}")
        try:
            WHATS[name](book, plan, **({} if name == "memory" else {"seed": seed}))
        except Exception as error:  # what is common to all its trials failed, as a read kernel that does not compile
            book.failed(name, error)
    return book.trials
