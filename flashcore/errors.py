"""Every error FlashCore raises on purpose: one base class, children that carry their fields.

A message is one or two sentences: what was wrong, and what to do about it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MOST_MEANT, CLOSE = 2, 0.7
"""Names that a suggestion holds at most, and how much alike they have to be (`difflib`'s ratio, 1 for the same)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names what was probably meant, such as "Did you mean 'wmma'?"; empty where nothing is alike.

    Capital letters do not count, and a name is also alike by its last part: `cudnn` means `sdpa-cudnn`.
    """
    meant: dict[str, str] = {}
    for one in known:
        for form in (one, re.split(r"[-_]", one)[-1], re.split(r"[-_]", one, maxsplit=1)[-1]):
            meant.setdefault(form.lower(), one)
    alike = difflib.get_close_matches(name.strip().lower(), meant, n=MOST_MEANT, cutoff=CLOSE)
    found = dict.fromkeys(f"'{meant[form]}'" for form in alike)
    return f"Did you mean {' or '.join(found)}?" if found else ""


class FlashCoreError(Exception):
    """Base of every error raised on purpose; the command line prints it as one sentence."""

    stage: str | None = None
    """The stage of attention that was being computed, where a backend knows it."""


class InvalidProblem(FlashCoreError, ValueError):
    """The attention problem itself makes no sense: a shape, dtype, device, stride or scale is wrong."""


class UnknownName(FlashCoreError, LookupError):
    """A backend, problem, kernel, profile or parameter was named that does not exist."""

    def __init__(self, what: str, name: str, known: list[str]):
        self.what, self.name, self.known = what, name, list(known)
        told = f"There is no {what} '{name}'; choose one of: {', '.join(self.known) or '(none)'}."
        super().__init__(f"{told} {did_you_mean(name, self.known)}".rstrip())


class Unsupported(FlashCoreError, ValueError):
    """The problem is valid, but this backend does not take it."""

    def __init__(self, backend: str, reason: str):
        self.backend, self.reason = backend, reason
        super().__init__(f"Backend '{backend}' cannot run this problem: {reason}.")


class BackendUnavailable(FlashCoreError, RuntimeError):
    """The backend exists, but this machine lacks what it needs."""

    def __init__(self, backend: str, reason: str, fix: str):
        self.backend, self.reason, self.fix = backend, reason, fix
        super().__init__(f"Backend '{backend}' is not available here: {reason}. To mend it: {fix}.")


class JudgeTampered(FlashCoreError, RuntimeError):
    """Something that FlashCore judges or times with was changed, or work goes on behind it; `names` says what."""

    def __init__(self, backend: str | None, names: list[str], thread: str | None = None):
        self.backend, self.names, self.thread = backend, list(names), thread
        while_ = f"while '{backend}' ran" if backend else "before this backend was called"
        what = ", ".join(self.names[:3]) + (f" and {len(self.names) - 3} more" if len(self.names) > 3 else "")
        parts = [f"{what} {'was' if len(self.names) == 1 else 'were'} changed {while_}"] if self.names else []
        parts += [f"a thread started by '{backend}' ({thread}) goes on after the call"] if thread else []
        super().__init__(f"{' and '.join(parts)}, so what was measured there counts for nothing.")


class InvalidTiming(FlashCoreError, RuntimeError):
    """A call took no time at all, so nothing ran."""

    def __init__(self, backend: str):
        self.backend = backend
        super().__init__(f"The calls of '{backend}' took no time at all, so nothing ran in them.")


class WrongWhenTimed(FlashCoreError, RuntimeError):
    """A backend gave other results in its timed calls than attention has.

    `found` is the comparison that shows it, and `timing` what was measured all the same; either may be None.
    """

    def __init__(self, reason: str, found: object = None, timing: object = None):
        self.reason, self.found, self.timing = reason, found, timing
        super().__init__(f"What it returned while it was timed is wrong, so its speed counts for nothing: {reason}.")


class CompileError(FlashCoreError):
    """NVRTC refused a kernel; `log` is its own text, with file and line of the kernel source."""

    def __init__(self, kernel: str, log: str):
        self.kernel, self.log = kernel, log
        super().__init__(f"Kernel '{kernel}' did not compile; the compiler said:\n{log.rstrip()}")


class FaultError(FlashCoreError):
    """A planted fault no longer fits the source it was written for."""


class CublasLtError(FlashCoreError, RuntimeError):
    """cuBLASLt returned anything but success; names the status, the call and the shapes."""

    def __init__(self, call: str, status: str, shapes: str):
        self.call, self.status, self.shapes = call, status, shapes
        super().__init__(
            f"{call} gave {status} for the product {shapes}; run 'flashcore survey' to see what this cuBLASLt offers."
        )


class LaunchError(FlashCoreError, RuntimeError):
    """The CUDA driver refused a launch or a tensor map; names the call and the status."""

    def __init__(self, call: str, status: str, what: str = ""):
        self.call, self.status = call, status
        where = f" for {what}" if what else ""
        super().__init__(f"{call} gave {status}{where}; 'flashcore doctor' checks the machine.")


class OutOfTime(FlashCoreError, TimeoutError):
    """A diagnosis did not end within the time that was left for it, which is less than one may take."""

    def __init__(self, place: str, seconds: float):
        self.place, self.seconds = place, seconds
        super().__init__(f"The diagnosis of {place} did not end within the {seconds:.0f} s that were left.")


class ToolMissing(FlashCoreError, RuntimeError):
    """A compiler, disassembler, browser or library that this step needs is not installed."""

    def __init__(self, tool: str, fix: str):
        self.tool, self.fix = tool, fix
        super().__init__(f"{tool} is not installed here. To mend it: {fix}.")


class RecordsError(FlashCoreError):
    """A records file or run folder cannot be read or written."""


class RecordsDamaged(RecordsError):
    """A line of the records file is cut off or is no record; `trials` holds those that can be read."""

    def __init__(self, path: str, line: int, reason: str, trials: list):
        self.path, self.line, self.reason, self.trials = path, line, reason, trials
        super().__init__(
            f"{path}, line {line} is not a whole record ({reason}), as a writer killed in the middle leaves it; "
            f"the {len(trials)} other records are intact, and removing the line mends the file."
        )


class RecordsTooNew(RecordsError):
    """The records were written by a newer FlashCore than this one."""

    def __init__(self, path: str, line: int, found: object, known: int):
        self.path, self.line, self.found, self.known = path, line, found, known
        super().__init__(
            f"{path}, line {line}: the record has schema version {found}, and this FlashCore reads up to {known}; "
            "install a newer FlashCore to read it."
        )


class GatesError(FlashCoreError, ValueError):
    """The gates file is wrong; names the file, the line and the reason."""

    def __init__(self, path: str, line: int | None, reason: str):
        self.path, self.line, self.reason = path, line, reason
        where = f"{path}, line {line}" if line else path
        super().__init__(f"{where}: {reason}")


class ClaimsError(FlashCoreError, ValueError):
    """The claims file is wrong; names the file, the line and the reason."""

    def __init__(self, path: str, line: int | None, reason: str):
        self.path, self.line, self.reason = path, line, reason
        where = f"{path}, line {line}" if line else path
        super().__init__(f"{where}: {reason}")


class PageError(FlashCoreError, ValueError):
    """The page was asked for in a way that it cannot be made: a logo that is no picture, or too large."""


class InvalidLink(FlashCoreError, ValueError):
    """A link was given that cannot stand in a page, a message or a workflow command."""


class PrintError(FlashCoreError, RuntimeError):
    """A browser is there and did not make the PDF; the page itself is not touched."""


class ClusterError(FlashCoreError, RuntimeError):
    """The workers asked for cannot be used: too few cards, a scheduler that does not answer, other sources there."""


class ClusterLost(ClusterError):
    """The scheduler, or the last worker, is gone; what was measured before is in the run."""


class NotebookParameterError(FlashCoreError, ValueError):
    """A notebook was given a parameter it does not declare, or a value of the wrong type."""


class NotebookFailed(FlashCoreError, RuntimeError):
    """A notebook did not finish; what it measured before is on disk."""

    def __init__(self, notebook: str, reason: str):
        self.notebook, self.reason = notebook, reason
        super().__init__(f"Notebook '{notebook}' did not finish: {reason}. What it had measured is kept.")


class PagingError(FlashCoreError):
    """A paged K/V cache was asked for something that it cannot do; it is as it was before the call."""


class PoolExhausted(PagingError, RuntimeError):
    """The cache has too few free pages, or no free row for another sequence; nothing was changed."""

    def __init__(self, what: str, needed: int, free: int, total: int, fix: str):
        self.what, self.needed, self.free, self.total, self.fix = what, needed, free, total, fix
        super().__init__(
            f"This takes {needed} more {what} and {free} of the cache's {total} are free; {fix}. Nothing was changed."
        )


class SequenceGone(PagingError, LookupError):
    """A sequence was used after it was freed, or in a cache that it does not belong to."""

    def __init__(self, sequence: str):
        self.sequence = sequence
        super().__init__(
            f"{sequence} was freed, or belongs to another cache; use a handle that add() or fork() of this cache gave."
        )


class SequenceTooLong(PagingError, ValueError):
    """A sequence's length does not fit into its row of the page table."""

    def __init__(self, row: int, length: int, capacity: int, fix: str):
        self.row, self.length, self.capacity, self.fix = row, length, capacity, fix
        super().__init__(f"Row {row} would hold {length} tokens and its pages hold {capacity}; {fix}.")


class PageTableError(PagingError, ValueError):
    """A pool, page table, list of lengths or selection of pages is wrong: device, dtype, shape or contents."""


class PagesOverlap(PagingError, ValueError):
    """The page that a sequence writes to next is in use elsewhere too, so one would overwrite the other's keys."""

    def __init__(self, row: int, page: int, uses: int):
        self.row, self.page, self.uses = row, page, uses
        super().__init__(
            f"Row {row} writes its next tokens to page {page}, which the page table names {uses} times; "
            "give each sequence a page of its own to write to (a copy, where a prefix was shared)."
        )
