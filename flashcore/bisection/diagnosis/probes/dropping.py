"""Probe results that vary for dropout: weights or elements of the output that are 0 by lot, the rest made larger."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import simulate
from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.bisection.diagnosis.screening import Inputs

CALLS = 4
"""Calls whose zeros are counted together."""
FEWEST, MOST = 1e-3, 0.95
"""Share of zeros that is taken for dropout."""


class Dropped(NamedTuple):
    """What two columns of the output hold that are the same sums."""

    share: float
    """Of elements that are 0."""
    together: float
    """Share of the zeros that stand in both columns."""
    factor: float
    """What the other elements are multiplied by."""


def dropped(inquiry: Inquiry) -> str | None:
    """A name for zeros that are drawn by lot, where results vary."""
    if not inquiry.varies:
        return None
    found = _read(inquiry)
    if found is None:
        return None
    wanted = 1 / (1 - found.share)
    if abs(found.factor / wanted - 1) < 0.05:
        how = f"the others are {found.factor:.4g} times what they should be"
        p = 1 - 1 / found.factor
    elif abs(found.factor - 1) < 0.005:
        how, p = "the others are as they should be, without the factor 1 / (1 - p)", found.share
    else:
        return None
    what, stages = ("elements of the output", ("out",)) if found.together < 0.5 else ("weights", ("probs",))
    words = (f"dropout is left on, with p = {p:.2g}: {found.share:.1%} of the {what} are 0, by lot and others in each "
             f"call, and {how}")  # fmt: skip
    inquiry.suspicions.clear()  # it was taken for a race
    return inquiry.add(Hypothesis("dropout left on", words, stages, {}, by_lot=True))


def _read(inquiry: Inquiry) -> Dropped | None:
    """None where what varies is nothing but zeros, and one factor of all the rest, or no row can be read."""
    problem = inquiry.problem
    half = min(problem.head_dim // 2, problem.seqlen_k)
    q, k, v = (torch.zeros_like(t) for t in Inputs(problem).make(inquiry.candidate.device))
    here = torch.arange(half, device=v.device)
    v[:, :, here, here] = v[:, :, here, here + problem.head_dim // 2] = 1.0  # each key in two columns
    wanted = simulate(q, k, v, problem)[0]
    seen = wanted > torch.finfo(torch.float16).tiny
    first, second = seen.clone(), seen.clone()
    first[..., problem.head_dim // 2 :] = False
    second[..., : problem.head_dim // 2] = False
    zeros = shared = number = 0
    factors = []
    for _ in range(CALLS):
        got = inquiry.candidate(q, k, v, problem).out.double()
        if not bool(got.isfinite().all()) or bool(got[~seen].any()):
            return None
        gone = got == 0
        zeros, number = zeros + int(gone[seen].sum()), number + int(seen.sum())
        shared += 2 * int((gone[first] & gone[second]).sum())
        factors.append((got / wanted)[seen & ~gone])
    ratio = torch.cat(factors)
    share = zeros / number if number else 0.0
    if not FEWEST < share < MOST or not len(ratio):
        return None
    factor = float(ratio.median())
    slack = reading.tolerance(problem) + math.sqrt(torch.finfo(v.dtype).eps) * 1e-2
    if bool(((ratio / factor - 1).abs() > slack).any()):
        return None
    return Dropped(share, shared / zeros, factor)
