"""How much of a wrong call a behaviour predicts, to the element, and whether that call can be judged by at all."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis.behaviour import Behaviour, simulate
from flashcore.bisection.diagnosis.calling import Candidate
from flashcore.bisection.diagnosis.screening import Screened
from flashcore.numerics import ambient

BLUNT = 0.25
"""Where the bound of a call is wider than this share of its output's spread, no hypothesis is judged by that call."""
EXPLAINED = 0.98
"""Share of the wrong elements that a hypothesis has to predict to stand."""


def explains(candidate: Candidate, behaviour: Behaviour, one: Screened) -> bool:
    """Whether a behaviour without tables of its own shapes predicts a failing call."""
    if one.answer is None or not one.out_wrong:
        return not one.out_wrong
    predicted = simulate(*given_to(one, candidate), one.inputs.problem, behaviour)[0]
    return share_of(one.answer.out, predicted, one, candidate)[0] >= EXPLAINED


def given_to(one: Screened, candidate: Candidate) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V of a call, for a prediction; whoever calls the candidate makes them anew (`Inputs.make`)."""
    case = one.inputs.case(candidate, again=True)
    return case.q, case.k, case.v


def is_blunt(one: Screened, candidate: Candidate) -> bool:
    """Whether the bound of a call is so wide beside its output that any prediction would seem to fit."""
    case = one.inputs.case(candidate, again=True)
    return float(case.out_atol) > BLUNT * float(case.out.std(correction=0))


@ambient.judging
def share_of(
    got, predicted, one: Screened, candidate: Candidate, unwritten: torch.Tensor | None = None
) -> tuple[float, int, int, int]:
    """How much of a wrong output a prediction explains.

    Returns
    -------
    share, explained, wrong, spoiled
        The share of the wrong elements that are predicted, less the share of right ones that are not; the counts.
    """
    case = one.inputs.case(candidate, again=True)
    truth = case.out
    if got.shape != truth.shape:  # one group of heads stands for all
        truth = truth[-got.shape[0] :, -got.shape[1] :]
    largest = torch.finfo(got.dtype).max
    got, predicted = got.double(), predicted.double()
    predicted = torch.where(predicted.abs() > largest, predicted.sign() * math.inf, predicted)
    bad = ~((got - truth).abs() <= case.out_atol + case.out_rtol * truth.abs())
    most = case.v.abs().max().double()  # stays on its device: a GPU that several processes share answers late
    bound = 4 * case.out_atol + 4 * case.out_rtol * predicted.abs() + 4 * case.out_rtol * most / 8
    off = (got - predicted).abs()
    same = (off <= bound) | (~got.isfinite() & ~predicted.isfinite())
    # What lies as near to the truth is not explained by a prediction, however wide the bound is.
    nearer = (off <= 0.5 * (got - truth).abs()) | (off <= case.out_atol + case.out_rtol * predicted.abs())
    same_bad = same & (nearer | ~got.isfinite())
    if unwritten is not None and unwritten.numel() == got.numel():  # what nobody wrote may be anything
        same, same_bad = (t | unwritten.view(got.shape) for t in (same, same_bad))
    wrong, explained, spoiled = torch.stack([bad.sum(), (bad & same_bad).sum(), (~bad & ~same).sum()]).tolist()
    share = explained / wrong if wrong else 0.0
    return share - spoiled / max(1, bad.numel() - wrong), explained, wrong, spoiled
