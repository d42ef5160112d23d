"""Make a failing call smaller while it still fails: fewer batches, heads, rows and keys, a plainer mask and dtype."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from flashcore.bisection.diagnosis.calling import Candidate
from flashcore.bisection.diagnosis.screening import Inputs, Screened, screen_one
from flashcore.errors import InvalidProblem
from flashcore.problem import Problem

BUDGET_S = 2.0
"""Seconds that a search for the smallest case may take."""


def shrink(candidate: Candidate, failing: Screened, *, budget_s: float = BUDGET_S) -> Screened:
    """The smallest call found that is still wrong in the same way: an answer that is wrong, or none at all."""
    best, until = failing, time.monotonic() + budget_s
    kind = failing.broken.kind if failing.broken else None
    if kind == "hang":  # each try would take the whole time limit, and a GPU that hangs answers no second one
        return failing
    better = True
    while better and time.monotonic() < until:
        better = False
        for inputs in smaller(best.inputs):
            if time.monotonic() > until:
                break
            found = screen_one(candidate, inputs)
            if found.wrong and (found.broken.kind if found.broken else None) == kind:
                best, better = found, True
                break
    return best


def smaller(inputs: Inputs) -> Iterator[Inputs]:
    """The next smaller calls, the largest steps first."""
    problem = inputs.problem
    group = problem.num_heads_q // problem.num_heads_kv
    changes: list[dict] = []
    if problem.batch > 1:
        changes += [{"batch": 1}, {"batch": problem.batch // 2}]
    if problem.num_heads_kv > 1:
        changes += [{"num_heads_q": group, "num_heads_kv": 1}, {"num_heads_q": group * 2, "num_heads_kv": 2}]
    if group > 1:
        changes += [{"num_heads_q": problem.num_heads_kv}, {"num_heads_q": 2 * problem.num_heads_kv}]
    for name in ("seqlen_q", "seqlen_k"):
        length = getattr(problem, name)
        both = {"seqlen_q", "seqlen_k"} if problem.seqlen_q == problem.seqlen_k else {name}
        for shorter in _shorter(length):
            changes.append(dict.fromkeys(both, shorter))
            if len(both) > 1 and not problem.causal:
                changes.append({name: shorter})
    if problem.causal:
        changes.append({"causal": False})
    if problem.softmax_scale is not None:
        changes.append({"softmax_scale": None})
    for change in changes:
        try:
            made = problem.with_(**change)
        except InvalidProblem:
            continue
        if _size(made) < _size(problem):
            yield replace(inputs, problem=made)
    if inputs.strided:
        yield replace(inputs, strided=False)
    if inputs.pattern not in ("normal", "constant"):
        yield replace(inputs, pattern="normal")


def _shorter(length: int) -> list[int]:
    steps = {1, 2, length // 4, length // 2, 3 * length // 4, length - 1}
    steps |= {length // tile * tile for tile in (16, 32, 64, 128)} | {
        length // tile * tile + 1 for tile in (16, 64, 128)
    }
    return sorted(n for n in steps if 0 < n < length)


def _size(problem: Problem) -> tuple:
    return (problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k
            + problem.batch * problem.num_heads_kv * problem.seqlen_k, problem.causal,
            problem.softmax_scale is not None)  # fmt: skip


def halved(inputs: Inputs) -> Iterator[Inputs]:
    """Calls of about half the size, with several batches and heads left as long as there are any."""
    problem = inputs.problem
    group = problem.num_heads_q // problem.num_heads_kv
    changes = []
    if problem.batch > 2:
        changes.append({"batch": max(2, problem.batch // 2)})
    if problem.num_heads_kv > 2:
        changes.append({"num_heads_q": group * (problem.num_heads_kv // 2), "num_heads_kv": problem.num_heads_kv // 2})
    if problem.seqlen_q == problem.seqlen_k:
        changes.append({"seqlen_q": problem.seqlen_q // 2, "seqlen_k": problem.seqlen_k // 2})
    changes += [{"seqlen_q": problem.seqlen_q // 2}, {"seqlen_k": problem.seqlen_k // 2}]
    for change in changes:
        if all(value >= 1 for value in change.values()):
            yield replace(inputs, problem=problem.with_(**change))
