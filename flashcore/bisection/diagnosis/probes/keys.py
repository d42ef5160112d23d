"""Probe with keys that are all alike: which of them each row counts, and what else it counts."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import mask_of
from flashcore.bisection.diagnosis.hypotheses import TILES, Hypothesis, head_of, place_of
from flashcore.bisection.diagnosis.probes import bends, masks, orders, weights
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.problem import Problem

DEPTHS = (20.0, 60.0, 200.0, 2e3, 2e4, 2e5)
"""How far below 0 the keys are taken that a row sees."""
MASKS = (-1e4, -1e5, -1e3, -100.0, -50.0, -30.0, -20.0, -65504.0, -32768.0, -5e4, -1e9)
"""Numbers that masks set or add in place of -inf."""


def equal_keys(inquiry: Inquiry) -> str | None:
    found = reading.read_counts(inquiry.candidate, inquiry.problem, inquiry.state.columns)
    wanted = mask_of(inquiry.problem, inquiry.candidate.device)
    rows = wanted.sum(dim=-1) > 0
    total = found.total[:, rows]
    if bool(total.isnan().any()):
        head = head_of(int(total.isnan().nonzero()[0, 0]), inquiry.problem)
        everywhere = bool(found.total.isnan().all())
        words = "every element is NaN" if everywhere else f"{int(total.isnan().sum())} rows are NaN"
        stages, why = _stages_of_nan(inquiry)
        inquiry.suspect(stages, f"{words} even when all scores are 0 and V is 0 or 1{why}", head)
        return words
    if bool(found.total[:, ~rows].isnan().any()):
        words = "rows that see no key give NaN where 0 is meant: -inf minus -inf, or 0 / 0"
        inquiry.suspect(("rescale", "probs", "row_sum", "out"), words, {"row": int((~rows).nonzero()[0])})
    if not found.clear:
        biased = bends.of_bias(found.counts.log(), inquiry.problem)
        if _weighs_so(inquiry, biased):
            return inquiry.add(biased)
        return _unclear(inquiry, found.counts, wanted)
    if not bool(found.total[:, rows].any()):
        return inquiry.suspect(("scores", "probs", "accum", "out"), "every element is 0, also where V is 1")
    said = []
    inquiry.alternatives = masks.of_counts(found.counts.masked_fill(~rows[:, None], 0.0), inquiry.problem)
    gone = of_values_gone(found.counts, found.extra, inquiry.problem)
    if gone:
        inquiry.alternatives = []
        return inquiry.add(gone)
    if inquiry.alternatives:
        said.append(inquiry.add(inquiry.alternatives[0]))
    extra = of_extra(found.extra, inquiry.problem)
    keys = found.counts.sum(dim=-1)[:, rows]
    if bool(((total / keys - 1).abs() < 0.01).all()) and bool((keys > 1).any()):
        words = ("the output is not divided by row_sum: the weights of a row add up to "
                 f"{float(total.max()):.4g} when all scores are 0")  # fmt: skip
        said.append(inquiry.add(Hypothesis("not normalised", words, ("out",), {"normalised": False})))
    elif extra:
        said.append(inquiry.add(extra))
    elif _off_from_one(inquiry, total):
        worst = (total - 1).abs().flatten().argmax().item()
        place = {**head_of(worst // total.shape[1], inquiry.problem), "row": worst % total.shape[1]}
        words = "the weights of a row do not add up to 1 when all scores are 0"
        said.append(inquiry.suspect(("row_sum",), f"{words}: {float(total.flatten()[worst]):.4g}", place))
    return "; ".join(said) or None


def _off_from_one(inquiry: Inquiry, total: torch.Tensor) -> bool:
    """Whether weights of equal keys add up to something else than 1, and no rounding was named."""
    if any(h.by_rounding for h in inquiry.found):
        return False
    return bool(((total - 1).abs() > 8 * torch.finfo(reading.dtype_of(inquiry.problem)).eps + 1e-4).any())


def _weighs_so(inquiry: Inquiry, hypothesis: Hypothesis) -> bool:
    """Whether it predicts weights of anchored inputs too, and not those alone that it was read from."""
    found = reading.read_scores(inquiry.candidate, inquiry.problem, inquiry.state.k_heads, inquiry.state.columns)
    return found is not None and weights.disagreement(inquiry, found, inquiry.state.with_(**hypothesis.changes)) <= 0.02


def _unclear(inquiry: Inquiry, counts: torch.Tensor, wanted: torch.Tensor) -> str:
    """Weights that are no multiple of a unit, though all scores are 0: beside the usual weight of their row."""
    seen = (wanted > 0).expand(counts.shape)
    usual = counts.masked_fill(~seen, math.nan).nanmedian(dim=-1, keepdim=True).values
    off = (~((counts / usual - 1).abs() < 0.01)) & seen
    one = float((counts / usual).flatten()[off.flatten().to(torch.uint8).argmax()])
    words = (f"{int(off.sum()):,} of {int(seen.sum()):,} keys have another weight than the keys of equal score "
             f"beside them, the first {one:.3g} times theirs")  # fmt: skip
    return inquiry.suspect(("scores", "probs", "accum"), words, place_of(off, inquiry.problem))


def _stages_of_nan(inquiry: Inquiry) -> tuple[tuple[str, ...], str]:
    """Where a NaN may come from that shows in the output; what lse says of it."""
    wrong = [s for s in inquiry.failing if s.out_wrong and s.lse is not None]
    if not wrong:
        return ("scores", "probs", "accum", "out"), ""
    if inquiry.lse_tells():
        return ("accum", "out"), ", and lse is right"
    return ("scores", "row_max", "rescale", "probs", "row_sum"), ", and lse is wrong as well"


def phantoms(inquiry: Inquiry) -> str | None:
    if inquiry.state.extra is not None or inquiry.state.counts is not None:
        return None
    found = reading.read_phantoms(inquiry.candidate, inquiry.problem)
    if found is None:
        return None
    median = found.median(dim=0).values
    hypothesis = of_extra(torch.where(median.abs() > 0.5, median, 0.0), inquiry.problem)
    return inquiry.add(hypothesis) if hypothesis else None


def hidden(inquiry: Inquiry) -> str | None:
    """What a hidden key scores: keys that are seen are taken far below it, until hidden ones outweigh them."""
    problem = inquiry.problem
    if not problem.causal or inquiry.state.counts is not None or inquiry.candidate.rounds_scores:
        return None
    found = [reading.read_hidden(inquiry.candidate, problem, depth) for depth in DEPTHS]
    above = next((depth for depth, weight in zip(DEPTHS, found, strict=True) if weight and weight > 0.5), None)
    if above is None:
        return _of_empty_rows(inquiry)
    low, high = max((d for d in DEPTHS if d < above), default=0.0), above
    for _ in range(24):  # half of the weight is where hidden and seen keys score alike, up to their numbers
        middle = (low + high) / 2
        weight = reading.read_hidden(inquiry.candidate, problem, middle) or 0.0
        low, high = (low, middle) if weight > 0.5 else (middle, high)
        if high - low < 1e-3 * high:
            break
    seen = mask_of(problem, inquiry.candidate.device)[reading.partial_row(problem, inquiry.candidate.device)]
    level = -(low + high) / 2 - math.log(float((seen == 0).sum() / seen.sum()))
    near = next((n for n in MASKS if abs(level / n - 1) < 0.01), None)
    scaled = next((n for n in MASKS if near is None and abs(level / n / problem.scale - 1) < 0.01), None)
    level = near or (scaled * problem.scale if scaled else level)
    # A key behind the mask that scores more is as deep below the rest as before, or less so where numbers are added.
    lifted = reading.read_hidden(inquiry.candidate, problem, 0.8 * abs(level), 0.6 * abs(level))
    if lifted is not None and lifted > 0.5:
        words = (f"{level:g} is added to the scores of hidden keys where -inf is meant, and they outweigh keys whose "
                 "scores lie further below theirs")  # fmt: skip
        told = {"masked_added": level}
    else:
        words = f"hidden keys get a score of {level:g} where -inf is meant, and outweigh keys whose scores lie below it"
        told = {"masked_score": level}
    words += f" ({scaled:g} before the scale)" if scaled else ""
    return inquiry.add(Hypothesis("mask too small", words, ("scores",), told))


def _of_empty_rows(inquiry: Inquiry) -> str | None:
    """A mask that sets so low a number that it shows in rows alone that see no key."""
    if bool((mask_of(inquiry.problem, inquiry.candidate.device).sum(dim=-1) > 0).all()):
        return None
    words = "rows that see no key hold the mean of V where 0 is meant: hidden keys get a low number in place of -inf"
    mean = Hypothesis("mask too small", words, ("scores", "out"), {"masked_score": -1e30}, {"row": 0})
    return inquiry.add(mean) if inquiry.failing and inquiry.explains_most(mean) else None


def of_values_gone(counts: torch.Tensor, extra: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for keys that count in row_sum, and whose V does not arrive: as many are missing as are there too many."""
    wanted = mask_of(problem, counts.device)
    gone = (counts == 0).all(dim=0).all(dim=0) & (wanted > 0).any(dim=0)
    right = torch.where(gone, 0.0, wanted)
    if not bool(gone.any()) or bool(gone.all()) or not bool((counts == right).all()):
        return None
    many = (wanted * gone).sum(dim=-1)
    if bool(((extra - many).abs() > 0.2 + 0.02 * many)[wanted.sum(dim=-1) > many].any()):
        return None
    place = torch.arange(len(gone), device=gone.device)
    return orders.of_order(torch.where(gone, -1, place), problem, "V")


def of_extra(extra: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for weight that went to no key, float64 ``[Sq]`` in units of one key."""
    rows = (extra.abs() > 0).nonzero().flatten().tolist()
    if not rows:
        return None
    amount = float(extra[rows].median())
    if not math.isfinite(amount):
        return None
    whole = round(amount)
    if whole > 0 and abs(amount - whole) < 0.2:
        tile = next((t for t in TILES if -(-problem.seqlen_k // t) * t - problem.seqlen_k == whole), None)
        many = f"{whole} key{'s' if whole > 1 else ''} that {'do' if whole > 1 else 'does'} not exist"
        if tile:
            return Hypothesis("last partial page taken as whole", f"the last, partial page is taken as whole: {many} "
                              f"{'are' if whole > 1 else 'is'} counted (tiles of {tile})", ("scores", "row_sum"),
                              {"extra": extra.clamp_min(0)}, {"row": rows[0]})  # fmt: skip
        return Hypothesis("keys that do not exist", f"{many} {'are' if whole > 1 else 'is'} counted",
                          ("scores", "row_sum"), {"extra": extra.clamp_min(0)}, {"row": rows[0]})  # fmt: skip
    return None
