"""Probe the scores beside those of keys that are known: scale, products, rows of Q, order of keys."""

from __future__ import annotations

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import Behaviour
from flashcore.bisection.diagnosis.hypotheses import Hypothesis, place_of, under
from flashcore.bisection.diagnosis.probes import orders, rounding, scales, weights
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry

LANES = tuple(("mod", n) for n in (2, 4, 8, 16, 32, 64)) + tuple(("block", n) for n in (2, 8, 16, 32, 64))

MOVED = 0.03
"""By how much the factor of all scores may be read wrongly where keys or rows stand at other places."""


def anchored(inquiry: Inquiry) -> str | None:
    found = inquiry.scores = reading.read_scores(
        inquiry.candidate, inquiry.problem, inquiry.state.k_heads, inquiry.state.columns
    )
    if found is None:
        return None
    if weights.disagreement(inquiry, found, inquiry.state) == 0.0:
        # A constant in few digits leaves each weight within what its own rounding may be.
        factor = scales.of_factor(found.factor, inquiry.problem) if inquiry.failing else None
        return inquiry.add(factor) if factor and inquiry.explains_most(factor) else None
    tried: list[tuple[float, list[Hypothesis], Behaviour]] = []

    def consider(hypotheses: list[Hypothesis], base: Behaviour) -> None:
        behaviour = under(base, hypotheses, found.q.device)
        tried.append((weights.disagreement(inquiry, found, behaviour), hypotheses, behaviour))

    bases: list[tuple[list[Hypothesis], Behaviour]] = [([], inquiry.state)]
    plain = inquiry.state.with_(counts=None)
    if inquiry.state.counts is not None:
        bases.append(([], plain))
    for other in inquiry.alternatives[1:]:
        bases.append(([other], plain.with_(**other.changes)))
    factor = scales.of_factor(found.factor, inquiry.problem)
    factors = [factor] if factor else []
    if factor and factor.name == "scale wrong":  # another bug beside it may have moved what was read
        near = scales.of_factor(found.factor, inquiry.problem, within=MOVED)
        factors = [near, factor] if near and near.name != factor.name else factors
    for extra, base in bases:
        consider(extra, base)
        for one in factors:
            consider([*extra, one], base)
        for more in ([], *([one] for one in factors)):
            behaviour = under(base, more, found.q.device)
            for elsewhere in (orders.rows_elsewhere, orders.keys_elsewhere):
                for one in elsewhere(found, inquiry.problem, behaviour):
                    consider([*extra, *more, one], base)
        for lanes in LANES:
            words = f"each lane keeps a maximum of its own ({_lane_words(lanes)}) and their sums are added as they are"
            kind = "maximum not reduced over lanes"
            consider([*extra, Hypothesis(kind, words, ("probs", "row_max"), {"lanes": lanes})], base)
    if min(t[0] for t in tried) > 0.02:
        small = reading.read_small(inquiry.candidate, inquiry.problem, inquiry.state.columns)
        order = reading.order_of(small)
        if order is not None and bool((order != torch.arange(len(order), device=order.device)).any()):
            rest = torch.arange(len(order), inquiry.problem.seqlen_k, device=order.device)
            consider([orders.of_order(torch.cat([order, rest]), inquiry.problem, "K")], inquiry.state)
        metric = reading.metric_of(small, inquiry.problem)
        hypothesis = None if metric is None else scales.of_metric(metric, inquiry.problem)
        if hypothesis:
            consider([hypothesis], inquiry.state)
    if min(t[0] for t in tried) > 0.02:
        for one in scales.of_slopes(reading.slopes(found, inquiry.problem, inquiry.state.k_heads), inquiry.problem):
            consider([one], inquiry.state)
    # What differs in a few weights alone is named by what predicts these, and not left to be called right.
    enough = min(0.02, 0.25 * min(t[0] for t in tried if not t[1]))
    best = min(tried, key=lambda t: (t[0] > enough, len(t[1]) if t[0] <= enough else 0, t[0]))
    if best[0] <= enough and best[1]:
        first = inquiry.alternatives[:1]  # another name for the same counts, or none of them, explains the weights
        if any(h in inquiry.alternatives for h in best[1]) or best[2].counts is None:
            inquiry.found = [h for h in inquiry.found if not any(h is one for one in first)]
        inquiry.found.extend(best[1])
        inquiry.state = best[2]
        return "; ".join(h.sentence for h in best[1])
    rounded = rounding.rounded_weights(found, inquiry.problem, inquiry.state)
    if rounded:
        return inquiry.add(rounded)
    before = len(inquiry.suspicions)
    words = _unnamed_scores(inquiry, found)
    inquiry.bendable = inquiry.suspicions[before] if len(inquiry.suspicions) > before else None
    return words


def _unnamed_scores(inquiry: Inquiry, found: reading.Scores) -> str:
    wanted = reading.simulated_weights(found.q, found.k, inquiry.problem, inquiry.state)
    if not inquiry.lse_tells() and float((found.weights > 0).double().mean()) < 0.999 * float(
        (wanted > 0).double().mean()
    ):
        place = place_of(weights.bad_weights(inquiry, found.weights, wanted), inquiry.problem)
        return inquiry.suspect(("scores", "probs"), "keys that count have no weight", place)
    return weights.suspect(inquiry, found.weights, wanted, "weights are not those of q k")


def _lane_words(lanes: tuple[str, int]) -> str:
    how, count = lanes
    return f"{count} lanes, key j in lane j % {count}" if how == "mod" else f"{count} keys a lane"
