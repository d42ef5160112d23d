"""Probe with values that are all alike: columns, rows that are left out, and what a row's weights add up to."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import mask_of, simulate
from flashcore.bisection.diagnosis.hypotheses import Hypothesis, first_of, head_of, place_of, ranges
from flashcore.bisection.diagnosis.predicting import is_blunt
from flashcore.bisection.diagnosis.probes import rounding
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.bisection.diagnosis.screening import Inputs
from flashcore.numerics import reference
from flashcore.problem import Problem


def equal_values(inquiry: Inquiry) -> str | None:
    """All keys have the same V, so the output is that row, whatever the weights are."""
    rounded = rounding.rounded_output(inquiry.candidate, inquiry.failing)
    rounded = rounded or rounding.rounded_values(inquiry.candidate, inquiry.problem)
    if rounded:
        return inquiry.add(rounded)
    nothing, got, row = reading.read_columns(inquiry.candidate, inquiry.problem)
    added = of_nothing(nothing, inquiry.problem)
    if added:
        return inquiry.add(added)
    seen = mask_of(inquiry.problem, got.device).sum(dim=-1) > 0
    named = of_columns(got, row, seen, inquiry.problem)
    if named:
        return "; ".join([inquiry.add(one) for one in named])
    return _sums(inquiry, got / row, seen)


def _sums(inquiry: Inquiry, ratio: torch.Tensor, seen: torch.Tensor) -> str | None:
    """Weights that add up to another number in each row: by what is in row_sum besides."""
    by_row = ratio[:, seen].median(dim=-1).values
    slack = 4.0 * torch.finfo(reading.dtype_of(inquiry.problem)).eps
    if not bool(by_row.isfinite().all()) or bool(((by_row - 1).abs() <= slack).all()):
        return None
    q, k, v = Inputs(inquiry.problem).make(inquiry.candidate.device)
    tried = []
    if inquiry.problem.causal:
        words = "the mask is applied after the softmax: keys that it hides still count in row_sum"
        tried.append(Hypothesis("hidden keys in row_sum", words, ("row_sum", "probs"), {"hidden_in_sum": True}))
    scores = _right_scores(q, k, inquiry.problem)
    row_sum = (scores - scores.amax(dim=-1, keepdim=True)).exp().sum(dim=-1)[:, seen]
    added = ((1 / by_row - 1) * row_sum).median()
    if math.isfinite(added) and float(added) > 1e-3:
        words = f"{float(added):.3g} is added to row_sum before the output is divided by it"
        told = {"epsilon": float(added)}
        tried.append(Hypothesis("a constant in row_sum", words, ("row_sum", "out"), told))
    twice = "the output is divided by row_sum twice"
    tried.append(Hypothesis("divided twice", twice, ("out", "row_sum"), {"divided_twice": True}))
    for by in (1, -1, 2, -2, 8, -8, 16, -16, 32, -32, 64, -64):
        which = f"the row {abs(by)} {'before' if by > 0 else 'after'} it"
        words = f"each row is divided by the row_sum of {which}"
        tried.append(Hypothesis("row_sum of another row", words, ("row_sum", "out"), {"sum_of": by}))
        words = f"the maximum of {which} is subtracted from each row, and its own for row_sum"
        tried.append(Hypothesis("row_max of another row", words, ("probs", "row_max"), {"max_of": by}))
    for one in tried:
        state = inquiry.state.with_(**one.changes)
        wanted = simulate(q, k, torch.ones_like(v), inquiry.problem, state)[0][..., 0].flatten(0, 1)[:, seen]
        if bool(((by_row - wanted).abs() <= slack * (1 + wanted)).all()):
            return inquiry.add(one)
    return None


def _right_scores(q, k, problem: Problem) -> torch.Tensor:
    """float64 ``[N, Sq, Sk]``: the right scores, -inf behind the mask."""
    flat_q, flat_k, _ = reference.flat_inputs(q, k, k, problem, slice(None))
    scores = flat_q @ flat_k.mT * problem.scale
    return scores.masked_fill(mask_of(problem, q.device) == 0, -math.inf)


def linear(inquiry: Inquiry) -> str | None:
    """Whether the output is the weights times V: judged where the weights themselves are as they should be."""
    left = [s for s in inquiry.unexplained() if s.inputs.problem.mathematics == inquiry.problem.mathematics
            and not is_blunt(s, inquiry.candidate)]  # fmt: skip
    if not left or inquiry.suspicions or any(h.by_rounding for h in inquiry.found):
        return None
    one = left[0]
    q, k, v = one.inputs.make(inquiry.candidate.device)
    found = reading.weights(inquiry.candidate, q, k, one.inputs.problem, inquiry.state.columns)
    heads = reference.kv_head_index(inquiry.problem, q.device)
    values = v.reshape(-1, *v.shape[2:]).double()[heads if inquiry.state.v_heads is None else inquiry.state.v_heads]
    made = (found @ values).view(one.answer.out.shape)
    case = one.inputs.case(inquiry.candidate)
    bound = 4 * case.out_atol + 8 * case.out_rtol * made.abs()
    off = ~((one.answer.out.double() - made).abs() <= bound)
    if not bool(off.any()):
        return None
    place = first_of(off)
    words = f"the output is not the sum of V by the weights that were read: {int(off.sum())} elements"
    return inquiry.suspect(("accum",), words, place)


def of_columns(got: torch.Tensor, row: torch.Tensor, seen: torch.Tensor, problem: Problem) -> list[Hypothesis]:
    """Names for an output that is not the one row that all V are, from `read_columns`; none where it is.

    Parameters
    ----------
    seen
        bool ``[Sq]``: the rows that see a key.
    """
    slack = 4.0 * torch.finfo(getattr(torch, problem.dtype)).eps
    if bool(((got[:, seen] / row - 1).abs() <= slack).all()) or not bool(got[:, seen].isfinite().all()):
        return []
    found = []
    empty = (got == 0).all(dim=-1) & seen
    if bool(empty[:, seen].all()):
        return []
    if bool(empty.any()):
        found.append(_zeroed(empty, seen, problem))
    apart = _factors_of_heads(got, row, seen & ~empty.any(dim=0), slack)
    if apart is not None:
        off = (apart - 1).abs() > slack
        first, many = int(off.to(torch.uint8).argmax()), int(off.sum())
        at = head_of(first, problem)
        words = (f"the output of {many} of {len(apart)} heads is multiplied, whatever Q, K and V are: that of batch "
                 f"{at['batch']}, head {at['head']} by {float(apart[first]):.4g}")  # fmt: skip
        told = {"head_factors": apart}
        return [*found, Hypothesis("output of some heads multiplied", words, ("out", "accum", "row_sum"), told, at)]
    full = got[~empty & seen]
    middle = full.median(dim=0).values
    if bool(((full - middle).abs() > 2 * slack * middle.abs().clamp_min(float(row[0]))).any()):
        return found  # rows differ: it is their weights that do not add up to 1
    factor = float((middle / row).median())
    if factor and bool(((middle / row / factor - 1).abs() <= slack).all()):
        if abs(factor - 1) > slack:
            words = f"the output is {factor:.4g} times what it should be, whatever Q, K and V are"
            stages = ("out", "accum", "row_sum")
            found.append(Hypothesis("output multiplied", words, stages, {"out_factor": factor}))
        return found
    source = (middle.round() - 1).long()
    if bool(((middle - middle.round()).abs() > slack * row).any()) or bool((source < -1).any()):
        return found
    if bool((source >= len(row)).any()):
        return found
    return [*found, _moved_columns(source)]


def _factors_of_heads(got, row, rows: torch.Tensor, slack: float) -> torch.Tensor | None:
    """float64 ``[N]``: what each head's output is multiplied by; None where it is one number for all, or none."""
    if not bool(rows.any()):
        return None
    ratio = got[:, rows] / row
    factors = ratio.flatten(1).median(dim=-1).values
    even = (ratio - factors[:, None, None]).abs() <= 2 * slack * factors[:, None, None].abs()
    if not bool(even.all()) or bool((factors == 0).any()) or float(factors.max() - factors.min()) <= 4 * slack:
        return None
    return torch.where((factors - 1).abs() <= slack, 1.0, factors)


def of_nothing(got: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for an output that is not 0 though V is, float64 ``[N, Sq, D]``; None where it is."""
    places = (got != 0).nonzero()
    if not len(places) or not bool(got.isfinite().all()):
        return None
    head, row, column = places[0].tolist()
    at = place_of(got != 0, problem)
    many = "1 element of the output is" if len(places) == 1 else f"{len(places):,} elements of the output are"
    words = (f"{many} not 0 though V is: {float(got[head, row, column]):.3g} stands at batch {at['batch']}, head "
             f"{at['head']}, row {row}, column {column}")  # fmt: skip
    return Hypothesis("a number added to the output", words, ("out", "accum"), {"added": got}, at)


def _zeroed(empty: torch.Tensor, seen: torch.Tensor, problem: Problem) -> Hypothesis:
    heads = empty[:, seen].all(dim=-1).nonzero().flatten().tolist()
    rows = (empty[:, seen].any(dim=0)).nonzero().flatten().tolist()
    rows = seen.nonzero().flatten()[rows].tolist()
    first = empty.nonzero()[0].tolist()
    at = {**head_of(first[0], problem), "row": first[1]}
    if heads and int(empty.sum()) == len(heads) * int(seen.sum()):
        words = (f"the results of {len(heads)} of {empty.shape[0]} heads are 0, the first of batch {at['batch']}, head "
                 f"{at['head']}")  # fmt: skip
        return Hypothesis("heads left 0", words, ("out", "scores"), {"zeroed": empty}, at)
    return Hypothesis(
        "rows left 0", f"rows {ranges(rows)} of the output are 0", ("out", "scores"), {"zeroed": empty}, at
    )


def _moved_columns(source: torch.Tensor) -> Hypothesis:
    place = torch.arange(len(source), device=source.device)
    gone = (source < 0).nonzero().flatten().tolist()
    moved = ((source != place) & (source >= 0)).nonzero().flatten().tolist()
    if gone and not moved:
        return Hypothesis("columns left 0", f"columns {ranges(gone)} of the output are 0", ("out", "accum"),
                          {"columns": source}, {"column": gone[0]})  # fmt: skip
    first = moved[0]
    words = (f"columns {ranges(moved)} of the output hold other columns of V: column {first} holds column "
             f"{int(source[first])}")  # fmt: skip
    return Hypothesis("columns of V in another order", words, ("accum", "out"), {"columns": source}, {"column": first})
