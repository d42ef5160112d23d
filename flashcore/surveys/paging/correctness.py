"""Judge every paged backend on the matrix: one record for each backend and group, and one for each wrong case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore import backends
from flashcore.backends import Backend
from flashcore.errors import BackendUnavailable, Unsupported
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.paged_ops import paged_problem_of
from flashcore.records import Correctness, Trial
from flashcore.surveys.paging.expected import Expected, by_positions, expect
from flashcore.surveys.paging.matrix import GROUPS, POLICIES, PagedCase, make, paged_cases
from flashcore.surveys.paging.plan import Plan
from flashcore.surveys.paging.trials import Book, outcome

WHAT = "correctness"
WRONG_RECORDED = 3
"""Of a backend and group; one more than that says nothing new and makes the records long."""


@dataclass
class Tally:
    """What one backend did in one group."""

    right: int = 0
    wrong: int = 0
    unsupported: int = 0
    elements: int = 0
    worst_share: float = 0.0
    """Largest error over its bound, of the cases that are right."""
    reasons: list[str] = field(default_factory=list)

    def data(self, group: str) -> dict[str, Any]:
        """As a record holds it."""
        return {
            "group": group, "right": self.right, "wrong": self.wrong, "unsupported": self.unsupported,
            "elements": self.elements, "worst_share_of_bound": self.worst_share,
        }  # fmt: skip


def measure_correctness(book: Book, plan: Plan, *, seed: int = 0, groups: Sequence[str] = ()) -> None:
    """Judge every backend that reads page tables and runs here, on these groups of cases, or on all.

    Kernels are held against `paged_reference`, and that against dense attention over the keys picked one by one. Slots
    without a token, free pages and the table's rest are poisoned; so are the outputs.
    """
    known = [b for b in backends.all_backends() if b.paged and b.device in (plan.device, "any")]
    ready: list[Backend] = []
    for backend in known:
        try:
            backend.require()
            ready.append(backend)
        except BackendUnavailable as error:
            if not groups or GROUPS[0] in groups:  # said once, whoever judges the other groups
                book.failed(WHAT, error, backend=backend.id)
    cases = paged_cases(plan.profile, plan.gpu, seed=seed)
    for group in groups or GROUPS:
        tallies = {backend.id: Tally() for backend in ready}
        for number, case in enumerate(c for c in cases if c.group == group):
            _one_case(book, case, ready, tallies, plan.device, seed + number)
        for backend in ready:
            _write(book, backend, group, tallies[backend.id])
        book.say(f"{group}: " + "; ".join(f"{b} {t.right} right, {t.wrong} wrong" for b, t in tallies.items()))


def _one_case(
    book: Book, case: PagedCase, ready: list[Backend], tallies: dict[str, Tally], device: str, seed: int
) -> None:
    q, cache = make(case, device, seed=seed)
    policy = POLICIES[case.policy]
    selection = policy.select(q, cache) if policy else None
    problem = paged_problem_of(q, cache, case.causal)
    wanted: dict[Any, Expected] = {}
    for backend in ready:
        tally = tallies[backend.id]
        reason = backend.why_not_paged(problem, selected=selection is not None)
        if reason:
            tally.unsupported += 1
            tally.reasons.append(reason)
            continue
        try:
            key = "dense" if backend.role == "reference" else backend.rounds_scores
            if key not in wanted:
                exact = by_positions(q, cache, selection, causal=case.causal) if key == "dense" else None
                wanted[key] = expect(q, cache, selection, causal=case.causal, round_scores=key is True, exact=exact)
            with poisoned_outputs():
                judged, wrong = wanted[key].judge(*backend.run_paged(q, cache, problem, selection))
        except Unsupported as error:
            tally.unsupported += 1
            tally.reasons.append(error.reason)
            continue
        except Exception as error:  # a broken kernel may raise anything; the record has to say so
            _wrong(book, backend, case, tally, *outcome(error), None)
            continue
        tally.elements += judged.checked
        if wrong:
            _wrong(book, backend, case, tally, "failed", wrong, judged)
        else:
            tally.right += 1
            tally.worst_share = max(tally.worst_share, judged.max_abs_error / judged.bound if judged.bound else 0.0)
    if device == "cuda":
        torch.cuda.synchronize()  # so that an asynchronous error is this case's


def _wrong(
    book: Book, backend: Backend, case: PagedCase, tally: Tally, status: str, reason: str, judged: Correctness | None
) -> None:
    tally.wrong += 1
    tally.reasons.append(reason)
    if tally.wrong <= WRONG_RECORDED:
        data = {"group": case.group, "case": case.label()}
        book.write(WHAT, backend=backend.id, variant="case", status=status, reason=reason, problem=case.problem(),
                   correctness=judged, data=data)  # fmt: skip


def _write(book: Book, backend: Backend, group: str, tally: Tally) -> Trial:
    status, reason = "ok", None
    if tally.wrong:
        status, reason = "failed", f"{tally.wrong} of {tally.wrong + tally.right} cases are wrong: {tally.reasons[0]}"
    elif not tally.right:
        status, reason = "unsupported", tally.reasons[0] if tally.reasons else "no case of this group was run"
    if not math.isfinite(tally.worst_share):
        tally.worst_share = -1.0
    return book.write(WHAT, backend=backend.id, status=status, reason=reason, data=tally.data(group))
