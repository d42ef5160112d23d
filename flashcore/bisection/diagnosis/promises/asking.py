"""One case of a promise, how it is asked, and how an answer is judged.

A case is first asked as it is. Where that goes wrong, its plain twin is asked: the same problem from ordinary tensors,
or an ordinary problem. Only where the twin is right does the break belong to the promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from flashcore.bisection.diagnosis.calling import Answer, Candidate
from flashcore.errors import InvalidProblem
from flashcore.measure import check
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.tolerance import compare
from flashcore.problem import Problem


@dataclass(frozen=True)
class Asked:
    """One case of a promise."""

    problem: Problem
    home: Problem
    """An ordinary problem that the function takes."""
    key: str = ""
    """Which kind of case it is, for the function that asks."""
    way: str = ""
    """The same in words."""

    def label(self) -> str:
        """In words, as a break names it."""
        return ", ".join(filter(None, (self.problem.label(), self.way)))


Ask = Callable[[Candidate, Asked], str | None]
"""Asks one case: None when the promise is kept, else the break as a clause. Raises `Refusal` and `Broken`."""


@dataclass(frozen=True)
class Promise:
    """What a user of attention counts on, and how a function is asked whether it keeps it."""

    id: str
    name: str
    sentence: str
    """The promise itself."""
    how: str
    """What is done to find out."""
    cases: Callable[[Problem], Iterable[tuple[dict, str, str]]]
    """From an ordinary problem: changes to it, the key and the way of each case, the smallest first."""
    ask: Ask
    plain: Ask | None = None
    """The plain twin of a case; None where there is none."""
    suits: Callable[[Asked], bool] = lambda asked: True
    """Whether a case is one of this promise: what a smaller case still has to be."""
    why_not: Callable[[Candidate], str] = lambda candidate: ""
    """Why it does not apply, as a clause; empty when it does."""
    binding: bool = True
    """Whether not keeping it is a fault; of others the table only says who keeps them."""

    def all_cases(self, candidate: Candidate, home: Problem) -> Iterator[Asked]:
        """The cases that make sense for this function, each once."""
        seen = set()
        for changes, key, way in self.cases(home):
            try:
                problem = home.with_(**changes)
            except InvalidProblem:  # heads that do not divide
                continue
            problem = candidate.backend.suits(problem) if candidate.backend else problem
            if "causal" not in candidate.takes and problem.causal != home.causal:
                continue
            asked = Asked(problem, home, key, way)
            if self.suits(asked) and asked not in seen:
                seen.add(asked)
                yield asked


def inputs(candidate: Candidate, problem: Problem, **options) -> tuple[torch.Tensor, ...]:
    return make_inputs(problem, device=candidate.device, **options)


def case_of(candidate: Candidate, q, k, v, problem: Problem) -> check.Case:
    return check.expected(q, k, v, problem, round_scores=candidate.rounds_scores)


def what_is_wrong(
    answer: Answer, case: check.Case, *, truth: tuple | None = None, rows: torch.Tensor | None = None,
    slack: float = 1.0,
) -> str | None:  # fmt: skip
    """What is wrong with an answer, as a clause.

    Parameters
    ----------
    truth
        ``out`` and ``lse`` to compare with in place of the case's, which then gives the bounds alone. Where they are
        NaN a finite output is wrong too, since it hides that there is no answer.
    rows
        ``bool [seqlen_q]``: rows that are judged; None for all.
    slack
        Multiplies the bounds.
    """
    out, lse = truth or (case.out, case.lse)
    parts = [("out", answer.out, out, case.out_atol, case.out_rtol)]
    if answer.lse is not None:
        parts.append(("lse", answer.lse, lse, case.lse_atol, case.lse_rtol))
    for name, got, true, atol, rtol in parts:
        judged = torch.ones_like(true, dtype=torch.bool)
        if rows is not None:
            judged &= rows.view(1, 1, -1, *[1] * (true.dim() - 3))
        undefined = judged & true.isnan()
        hidden = undefined & got.isfinite()
        if name == "out" and bool(hidden.any()):
            place = ", ".join(f"{axis} {int(n)}" for axis, n in zip(
                ("batch", "head", "row", "column"), hidden.nonzero()[0], strict=True))  # fmt: skip
            return f"{int(hidden.sum())} elements are finite where float64 gives NaN; first at {place}"
        judged &= ~undefined
        found = compare(torch.where(judged, got.double(), 0.0), torch.where(judged, true.double(), 0.0),
                        atol=slack * atol, rtol=rtol)  # fmt: skip
        if not found.passed:
            return f"{name}: {found.sentence()}"
    return None


def rows_that_see(problem: Problem, device) -> torch.Tensor:
    """Rows that see at least one key, ``bool [seqlen_q]``; those that see none have a promise of their own."""
    empty = max(0, problem.seqlen_q - problem.seqlen_k) if problem.causal else 0
    return torch.arange(problem.seqlen_q, device=device) >= empty


def right(candidate: Candidate, asked: Asked) -> str | None:
    """Ordinary tensors, in the pattern that the key names."""
    problem = asked.problem
    return ask_on(candidate, problem, inputs(candidate, problem, pattern=asked.key or "normal"))


def ask_on(candidate: Candidate, problem: Problem, given, *, as_given: bool = False) -> str | None:
    """Call it on these tensors and judge the rows that see a key.

    What is expected is computed first, so that a call which writes into its inputs is judged by what it was given.
    """
    case = case_of(candidate, *given, problem)
    answer, _ = candidate.ask(*given, problem, as_given=as_given)
    return what_is_wrong(answer, case, rows=rows_that_see(problem, case.out.device))


def plain(candidate: Candidate, asked: Asked) -> str | None:
    """The same problem, from ordinary tensors and with the usual scale."""
    usual = asked.problem.with_(softmax_scale=asked.home.softmax_scale)
    return right(candidate, Asked(usual, asked.home))


def at_home(candidate: Candidate, asked: Asked) -> str | None:
    """An ordinary problem with the same mask and dtype."""
    usual = asked.home.with_(dtype=asked.problem.dtype, causal=asked.problem.causal)
    return right(candidate, Asked(usual, asked.home))
