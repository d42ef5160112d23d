"""Judge weights that were read, and say where they go wrong if no hypothesis explains them."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import Behaviour
from flashcore.bisection.diagnosis.hypotheses import place_of
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.problem import Problem


def disagreement(inquiry: Inquiry, found: reading.Scores, behaviour: Behaviour) -> float:
    """Share of the weights that the behaviour does not predict."""
    wanted = reading.simulated_weights(found.q, found.k, inquiry.problem, behaviour)
    return float(bad_weights(inquiry, found.weights, wanted).double().mean())


def bad_weights(inquiry: Inquiry, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    slack = reading.tolerance(inquiry.problem) * wanted.abs() + 4 * torch.finfo(torch.float16).tiny
    return ~((found - wanted).abs() <= slack) & ~(found.isnan() & wanted.isnan())


def suspect(inquiry: Inquiry, found: torch.Tensor, wanted: torch.Tensor, otherwise: str) -> str:
    """Say where weights go wrong that no hypothesis explains: even by row, by page, or neither."""
    bad = bad_weights(inquiry, found, wanted)
    slack = 2 * reading.tolerance(inquiry.problem)
    ratio = (found / wanted).masked_fill(wanted < torch.finfo(torch.float16).tiny, math.nan)
    by_row = ratio.nanmedian(dim=-1, keepdim=True).values
    even = ((ratio / by_row - 1).abs() <= slack) | ratio.isnan()
    sums = bool(((found.sum(dim=-1) - 1).abs() > slack)[wanted.sum(dim=-1) > 0.5].any())
    if inquiry.lse_tells():
        stages: tuple[str, ...] = ("probs", "accum", "out")
        why = f"{int(bad.sum()):,} of {bad.numel():,} weights are wrong, and lse is right: the sums of P V are wrong"
    elif bool(even.all()):
        stages, why = ("row_sum",), "the weights of a row are right beside each other, and do not add up to 1"
    elif bool(((found == 0) & bad).sum() > 0.9 * bad.sum()) and not bool((found[bad & (wanted < 0.5)] > 0).any()):
        level = float((wanted / wanted.amax(dim=-1, keepdim=True))[bad].max())
        stages, why = ("probs",), f"weights below about {level:.2g} of the largest of their row become 0"
    elif _even_by_page(ratio, bad, inquiry.problem):
        stages = ("rescale", "probs", "accum") if sums else ("rescale", "probs", "out")
        why = "weights are off by one factor a page: pages, or chains of pages, are weighed by another reference"
    else:
        stages, why = ("scores", "probs"), f"{int(bad.sum()):,} of {bad.numel():,} {otherwise}"
    return inquiry.suspect(stages, why, place_of(bad, inquiry.problem))


def _even_by_page(ratio: torch.Tensor, bad: torch.Tensor, problem: Problem) -> bool:
    """Whether the ratio is one number within every page of 16 keys of a row that has a wrong weight in it."""
    keys = ratio.shape[-1] // 16 * 16
    pages = ratio[..., :keys].unflatten(-1, (-1, 16))
    middle = pages.nanmedian(dim=-1, keepdim=True).values
    even = ((pages / middle - 1).abs() <= 2 * reading.tolerance(problem)) | pages.isnan()
    touched = bad[..., :keys].unflatten(-1, (-1, 16)).any(dim=-1)
    return bool(touched.any()) and bool(even[touched].double().mean() > 0.98)
