"""Whether a policy selects the same valid pages every time: a race in the list of pages shows here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.numerics import ambient
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.paging.selection import PageSelection, Policy
from flashcore.paging.tables import PagedKV


@dataclass(frozen=True)
class SelectionFinding:
    """What several runs of one policy over the same inputs showed."""

    runs: int
    runs_that_differ: int
    """Of those after the first, how many gave other pages or counts than it."""
    place: tuple[int, int, int] | None
    """Sequence, KV head and place in the list of the first difference; None when none is there."""
    invalid: str | None
    """What `PageSelection.check` says of the first run that is not valid; None when all are."""

    @property
    def ok(self) -> bool:
        return self.runs_that_differ == 0 and self.invalid is None

    def __str__(self) -> str:
        """One sentence."""
        if self.ok:
            return f"{self.runs} runs over the same inputs selected the same valid pages."
        said = []
        if self.runs_that_differ:
            sequence, head, nth = self.place
            said.append(
                f"the same inputs gave other pages in {self.runs_that_differ} of {self.runs - 1} repeats, first at "
                f"sequence {sequence}, KV head {head}, place {nth} of the list"
            )
        if self.invalid:
            said.append(self.invalid.rstrip("."))
        return "; ".join(said) + "."


@ambient.judging
def check_selection(policy: Policy, q: torch.Tensor, cache: PagedKV, *, runs: int = 20) -> SelectionFinding:
    """Run a policy `runs` times over the same inputs; compare bit by bit, check each selection. Waits for the device.

    Our own kernels write into poisoned memory meanwhile, so that a page which nobody wrote is seen.
    """
    if runs < 2:
        raise InvalidProblem(f"runs: {runs} run cannot differ from itself; give at least 2.")
    differing, place, invalid = 0, None, None
    first: PageSelection | None = None
    with poisoned_outputs():
        for _ in range(runs):
            now = policy.select(q, cache)
            if invalid is None:
                invalid = _complaint(now, cache)
            if first is None:
                first = now
            elif (found := _difference(first, now)) is not None:
                differing += 1
                place = place or found
    return SelectionFinding(runs, differing, place, invalid)


def _complaint(selection: PageSelection, cache: PagedKV) -> str | None:
    try:
        selection.check(cache)
    except PageTableError as error:
        return str(error)
    return None


def _difference(first: PageSelection, now: PageSelection) -> tuple[int, int, int] | None:
    """Sequence, KV head and place of the first difference; a count that differs is at the end of the shorter list."""
    differs = first.pages != now.pages
    differs |= torch.arange(differs.shape[-1], device=differs.device) == torch.where(
        first.counts != now.counts, torch.minimum(first.counts, now.counts).clamp(0, differs.shape[-1] - 1), -1
    ).unsqueeze(-1)
    if not bool(differs.any()):
        return None
    return tuple(differs.nonzero()[0].tolist())
