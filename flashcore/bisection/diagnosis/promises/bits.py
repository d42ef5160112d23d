"""Ask for the same bits: again, beside other neighbours, alone, and in the inputs after the call."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis.calling import Answer, Candidate, same_bits
from flashcore.bisection.diagnosis.promises.asking import Asked, inputs, plain

REPEATS = 3


def repeats(candidate: Candidate, asked: Asked) -> str | None:
    """The same call a few times."""
    problem = asked.problem
    q, k, v = inputs(candidate, problem)
    # Each call gets copies of its own, so that one which writes into its inputs changes nothing for the next.
    seen = [_bits(candidate.ask(q.clone(), k.clone(), v.clone(), problem)[0]) for _ in range(REPEATS)]
    return next(filter(None, (_differ(seen[0], later) for later in seen[1:])), None)


def steady(candidate: Candidate, asked: Asked) -> str | None:
    """Right, and with the same bits each time: what bits beside other neighbours can be compared for."""
    return plain(candidate, asked) or repeats(candidate, asked)


def neighbours(candidate: Candidate, asked: Asked) -> str | None:
    """Other values in the other batches, or in the other K/V heads; the shape stays."""
    problem, what = asked.problem, asked.key.split()[0]
    group = problem.num_heads_q // problem.num_heads_kv
    first = inputs(candidate, problem)
    second = []
    for mine, other, heads in zip(first, inputs(candidate, problem, seed=1), (group, 1, 1), strict=True):
        changed = other.fill_(math.nan) if asked.key.endswith("NaN") else other
        part = (slice(0, 1),) if what == "batch" else (slice(None), slice(0, heads))
        changed[part] = mine[part]
        second.append(changed)
    kept = (slice(0, 1),) if what == "batch" else (slice(None), slice(0, group))
    one, other = (_bits(candidate.ask(*given, problem)[0]) for given in (first, second))
    return _differ([t[kept] for t in one], [t[kept] for t in other])


def alone(candidate: Candidate, asked: Asked) -> str | None:
    """The first batch, or the first K/V head with its query heads, in a call of its own."""
    problem = asked.problem
    group = problem.num_heads_q // problem.num_heads_kv
    given = inputs(candidate, problem)
    whole = _bits(candidate.ask(*(t.clone() for t in given), problem)[0])
    if asked.key == "batch":
        part, fewer = [t[:1] for t in given], problem.with_(batch=1)
        whole = [t[:1] for t in whole]
    else:
        part = [t[:, :n].contiguous() for t, n in zip(given, (group, 1, 1), strict=True)]
        fewer = problem.with_(num_heads_q=group, num_heads_kv=1)
        whole = [t[:, :group] for t in whole]
    return _differ(whole, _bits(candidate.ask(*part, fewer)[0]))


def inputs_stay(candidate: Candidate, asked: Asked) -> str | None:
    """Q, K and V hold the same bits after the call."""
    problem = asked.problem
    _, changed = candidate.ask(*inputs(candidate, problem), problem)
    return changed[:1].lower() + changed[1:].rstrip(".") if changed else None


def _bits(answer: Answer) -> list[torch.Tensor]:
    """Copies, so that a function that fills one buffer again and again is compared with what it gave before."""
    return [t.clone() for t in (answer.out, answer.lse) if t is not None]


def _differ(first: list[torch.Tensor], second: list[torch.Tensor]) -> str | None:
    for name, one, other in zip(("out", "lse"), first, second, strict=False):
        if not same_bits(one.contiguous(), other.contiguous()):
            different = ~((one == other) | (one.isnan() & other.isnan()))
            worst = float((one.double() - other.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf).max())
            return f"{int(different.sum())} of {one.numel()} elements of {name} have other bits, by up to {worst:.3g}"
    return None
