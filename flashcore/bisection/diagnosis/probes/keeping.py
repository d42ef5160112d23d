"""Find out whether a function keeps something of earlier calls: inputs, a result, or what it does but once."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis.behaviour import Behaviour, simulate
from flashcore.bisection.diagnosis.calling import Candidate, Refusal
from flashcore.bisection.diagnosis.hypotheses import Hypothesis, first_of
from flashcore.bisection.diagnosis.predicting import EXPLAINED
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.bisection.diagnosis.screening import Inputs
from flashcore.numerics import ambient
from flashcore.problem import Problem

OTHER = 0.04
"""Share of the largest output by which two calls differ that do not merely round otherwise."""
Given = list[torch.Tensor]


@ambient.judging
def kept_between_calls(candidate: Candidate, problem: Problem, state: Behaviour) -> Hypothesis | None:
    """A name for what earlier calls leave behind; None where each result is that of its own inputs, or follows no rule.

    Other inputs of one shape follow each other, first in new memory and then in the same.
    """
    first, second, third = (
        [t.clone() for t in Inputs(problem, seed=seed).make(candidate.device)] for seed in (101, 102, 103)
    )
    begun = None if candidate.backend else _first_of_a_shape(candidate, problem)  # a backend would compile once more
    if begun:
        return begun
    before = candidate(*first, problem).out.double()
    kept = [
        ("the first call with this shape", list(Inputs(problem).make(candidate.device))),
        ("the call before", first),
    ]
    found = _named(candidate(*second, problem).out, second, kept, before, problem, state)
    if found:
        return found
    then = [t.clone() for t in second]
    before = candidate(*second, problem).out.double()
    for tensor, new in zip(second, third, strict=True):
        tensor.copy_(new)
    kept = [("an earlier call that had its tensors in the same memory", then)]
    return _named(candidate(*second, problem).out, second, kept, before, problem, state)


def _first_of_a_shape(candidate: Candidate, problem: Problem) -> Hypothesis | None:
    """A name for a first call with new lengths that gives something else than the next ones."""
    for more in (7, 64):
        asked = problem.with_(seqlen_q=problem.seqlen_q + more, seqlen_k=problem.seqlen_k + more)
        given = Inputs(asked, seed=104).make(candidate.device)
        try:
            once, again, still = (candidate(*given, asked).out.clone() for _ in range(3))
        except Refusal:
            continue
        least = OTHER * max(float(again.nan_to_num(0.0).abs().max()), 1e-6)
        if not bool(((again - still).abs().nan_to_num(0.0) <= least).all()):
            return None  # it changes with every call
        off = (once - again).abs().nan_to_num(nan=math.inf) > least
        if not bool(off.any()) or bool((once.isnan() & again.isnan()).any()):
            return None
        words = f"the first call with new lengths gives another result than the next, in {int(off.sum()):,} elements"
        place = first_of(off)
        return Hypothesis("first call differs", words, ("out",), {}, place, of_calls=True)
    return None


def _named(
    got: torch.Tensor, given: Given, kept: list[tuple[str, Given]], before: torch.Tensor, problem: Problem,
    state: Behaviour,
) -> Hypothesis | None:  # fmt: skip
    """A name for a result that is that of other inputs, or that has the result of the call before in it."""
    got = got.double()

    def alike(wanted: torch.Tensor) -> bool:
        near = (got - wanted).abs() <= 0.02 + 0.02 * wanted.abs()
        return float(near.double().mean()) >= EXPLAINED

    right = simulate(*given, problem, state)[0]
    if not bool(got.isfinite().all()) or alike(right):
        return None
    for whose, other in kept:
        for names in ("k", "v", "kv", "q", "qk", "qv", "qkv"):
            mixed = [old if name in names else new for name, old, new in zip("qkv", other, given, strict=True)]
            if alike(simulate(*mixed, problem, state)[0]):
                what = " and ".join(name.upper() for name in names)
                words = f"{what} of {whose} {'is' if len(names) == 1 else 'are'} used again in place of its own"
                stages = ("accum",) if names == "v" else ("scores",)
                return Hypothesis("inputs of an earlier call", words, stages, of_calls=True)
    if alike(right + before):
        words = "the result of the call before is still in the output: what was computed is added to it"
        return Hypothesis("result of an earlier call", words, ("out", "accum"), of_calls=True)
    return None


def earlier(inquiry: Inquiry) -> str | None:
    found = kept_between_calls(inquiry.candidate, inquiry.problem, inquiry.state)
    inquiry.varies = inquiry.varies or found is not None
    return inquiry.add(found) if found else None
