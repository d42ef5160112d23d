"""Name rows of Q, K or V that stand at other places than their own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import Behaviour, mask_of
from flashcore.bisection.diagnosis.hypotheses import Hypothesis, ranges
from flashcore.problem import Problem


def rows_elsewhere(found: reading.Scores, problem: Problem, behaviour: Behaviour) -> Iterator[Hypothesis]:
    """Rows whose weights are those of another row, the same one in every head."""
    wanted = reading.simulated_weights(found.q, found.k, problem, behaviour.with_(q_rows=None))
    got = found.weights
    if not bool(got.isfinite().all()) or problem.seqlen_q < 2:
        return
    distance = torch.cdist(got.transpose(0, 1).flatten(1), wanted.transpose(0, 1).flatten(1))
    named = of_rows(distance.argmin(dim=-1))
    if named:
        yield named


def keys_elsewhere(found: reading.Scores, problem: Problem, behaviour: Behaviour) -> Iterator[Hypothesis]:
    """K or V rows at other places: each row's weights beside those that another key would have."""
    plain = behaviour.with_(counts=None, v_of=None, k_of=None)
    wanted = reading.simulated_weights(found.q, found.k, problem, plain)
    rows = (mask_of(problem, found.q.device) > 0).all(dim=-1)
    if int(rows.sum()) < 4:
        return
    got, right = found.weights[:, rows], wanted[:, rows]
    # K: the weight of key j is, up to the row's sum, that of another key.
    shape = got.masked_fill(~(got > 0), math.nan).log()
    # `relative` is measured from the anchors, which may have moved themselves: level by the row's own mean.
    level = shape.nanmean(dim=-1, keepdim=True)
    mine, theirs = shape - level, right.log() - right.log().mean(dim=-1, keepdim=True)
    a = mine.permute(2, 0, 1).reshape(problem.seqlen_k, -1)
    b = theirs.permute(2, 0, 1).reshape(problem.seqlen_k, -1)
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    if bool(a.isfinite().all()):
        place = torch.arange(problem.seqlen_k, device=a.device)
        anchor = place % reading.ANCHOR_EVERY == 0
        distance = torch.cdist(a, b)
        distance[anchor] = math.inf
        distance[:, anchor] = math.inf
        nearest = distance.argmin(dim=-1)
        own = distance[place, place]
        best = distance.gather(1, nearest[:, None])[:, 0]
        k_of = torch.where(anchor | (own <= 1.5 * best + 1e-6), place, nearest)
        k_of = _carry_anchors(k_of, anchor)
        if not bool((k_of == place).all()):
            yield of_order(k_of, problem, "K")
    # V: each output row is a sum of the right weights of the keys that used it. All anchors of a row weigh the
    # same, so one of them stands for all; each goes where its neighbours went.
    place = torch.arange(problem.seqlen_k, device=found.q.device)
    anchor = place % reading.ANCHOR_EVERY == 0
    asked = torch.cat([place[:1], place[~anchor]])
    flat = right.reshape(-1, problem.seqlen_k)[:, asked]
    if flat.shape[0] >= problem.seqlen_k:
        size = flat.norm(dim=0).clamp_min(1e-12)
        used = torch.linalg.lstsq(flat / size, got.nan_to_num(nan=0.0).reshape(flat.shape[0], -1)).solution
        best = (used / size[:, None])[1:].max(dim=-1)
        v_of = place.clone()
        v_of[~anchor] = torch.where(best.values > 0.5, best.indices, -1)
        v_of = _carry_anchors(v_of, anchor)
        if not bool((v_of == place).all()):
            yield of_order(v_of, problem, "V")


def of_rows(q_rows: torch.Tensor) -> Hypothesis | None:
    """A name for rows that are computed from another row of Q, from ``int64 [Sq]``; None where all are their own."""
    place = torch.arange(len(q_rows), device=q_rows.device)
    moved = (q_rows != place).nonzero().flatten().tolist()
    if not moved:
        return None
    distances = (q_rows - place)[moved].unique().tolist()
    if len(set(q_rows.tolist())) == 1:
        words = f"every row has the result of row {int(q_rows[0])}"
    elif len(distances) == 1 or (len(distances) == 2 and max(distances) - min(distances) == len(q_rows)):
        by = min(distances, key=abs)
        words = f"rows {ranges(moved)} are computed from the row of Q {abs(by)} {'before' if by < 0 else 'after'} them"
    else:
        words = f"rows {ranges(moved)} are computed from other rows of Q, the first from row {int(q_rows[moved[0]])}"
    return Hypothesis("Q of another row", words, ("scores", "out"), {"q_rows": q_rows}, {"row": moved[0]})


def of_order(k_of: torch.Tensor, problem: Problem, what: str) -> Hypothesis:
    """A name for K or V rows that stand at other places than their own, from ``int64 [Sk]``."""
    place = torch.arange(len(k_of), device=k_of.device)
    moved = (k_of != place).nonzero().flatten().tolist()
    sources = k_of[moved].tolist()
    distances = {s - m for s, m in zip(sources, moved, strict=True)}
    whole = sorted(set(sources)) == sorted(moved)
    field_name = "k_of" if what == "K" else "v_of"
    stages = ("scores",) if what == "K" else ("accum",)
    first = {"column": moved[0]}
    gone = [m for m, s in zip(moved, sources, strict=True) if s < 0]
    if gone and len(gone) == len(moved):
        return Hypothesis(f"{what} of a page missing", f"{what} of keys {ranges(gone)} is taken as zeros", stages,
                          {field_name: k_of}, first)  # fmt: skip
    if whole and len(distances) == 2 and sum(distances) == 0:
        words = f"keys {ranges(moved)} are swapped, {max(distances)} places apart, in K or in V"
        return Hypothesis("pages swapped", words, ("scores", "accum"), {field_name: k_of}, first)
    if whole:
        return Hypothesis("keys in another order", f"{len(moved)} keys of K are paired with the V of others",
                          ("scores", "accum"), {field_name: k_of}, first)  # fmt: skip
    if len(distances) == 1:
        by = distances.pop()
        return Hypothesis(f"{what} of another page", f"{what} of keys {ranges(moved)} is that of the keys {abs(by)} "
                          f"places {'before' if by < 0 else 'after'}", stages, {field_name: k_of}, first)  # fmt: skip
    return Hypothesis(f"{what} of other keys", f"{what} of keys {ranges(moved)} is that of other keys", stages,
                      {field_name: k_of}, first)  # fmt: skip


def _carry_anchors(k_of: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """Anchors look all alike: each goes where its neighbours went."""
    k_of = k_of.clone()
    for place in anchor.nonzero().flatten().tolist():
        beside = place + 1 if place + 1 < len(k_of) else place - 1
        there = k_of[beside]
        k_of[place] = there if there < 0 else (there + place - beside).clamp(0, len(k_of) - 1)
    return k_of
