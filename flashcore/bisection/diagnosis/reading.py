"""Read the inside of attention from its outputs: V made of unit vectors shows the weight of each key in each row.

With V[j] = e_c, column c of `out` is the normalised probability of key j, exact up to the rounding of `out`. So a few
calls read the whole matrix of weights, whatever the function is. What Q and K are made of decides what that tells:

- Q = 0: every key that is counted has the same weight, so the mask and the list of keys show, and nothing else.
- *Anchored* keys: every 16th key has a known score that no other reaches, so the running maximum never moves after the
  first keys, in whatever order and tile size they are taken. The weights beside an anchor's give each score itself.
- Marks: one unit vector a head, in V, K or Q, names the head that was read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashcore.bisection.diagnosis.behaviour import RIGHT, Behaviour, mask_of, simulate
from flashcore.bisection.diagnosis.calling import Candidate
from flashcore.numerics import ambient, reference
from flashcore.problem import Problem

ANCHOR_EVERY = 16
"""Keys from one anchor to the next: no tile of keys is narrower."""
ANCHOR, SPREAD = 3.0, 0.5
"""Score of the anchors, and standard deviation of the other scores."""
GENTLE = 0.125
"""What both are multiplied by while nobody knows how the function scales its scores."""


@dataclass(frozen=True)
class Marks:
    """Which head each query head reads, ``int64 [B*Hq]`` flat; None where no mark came through clearly."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None


@dataclass(frozen=True)
class Counts:
    """How often each key is counted when all scores are 0."""

    counts: torch.Tensor
    """float64 ``[N, Sq, Sk]``, whole numbers where `clear`."""
    total: torch.Tensor
    """float64 ``[N, Sq]``: the sum of all weights, 1 for a right function; NaN or 0 in rows that see no key."""
    extra: torch.Tensor
    """float64 ``[Sq]``: weight that went to no key at all, in units of one key."""
    clear: bool
    """Whether every weight is a whole multiple of one unit."""


@dataclass(frozen=True)
class Scores:
    """The scores that the weights of anchored inputs tell."""

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor
    """float64 ``[N, Sq, Sk]``."""
    amplitude: float
    factor: float
    """What the function's scores are beside the right ones, by a fit over all of them; NaN where it cannot be told."""
    relative: torch.Tensor
    """float64 ``[N, Sq, Sk]``: each score minus the anchors' score, NaN where a key has no weight."""


def tolerance(problem: Problem) -> float:
    """The relative error of a weight that a right function may have: roundings of score, probability and output."""
    return max(6.0 * torch.finfo(getattr(torch, problem.dtype)).eps, 2e-3)


def dtype_of(problem: Problem) -> torch.dtype:
    return getattr(torch, problem.dtype)


@ambient.judging
def weights(candidate: Candidate, q, k, problem: Problem, columns: torch.Tensor | None = None) -> torch.Tensor:
    """float64 ``[B*Hq, Sq, Sk]``: the weight of each key in each row, by ``ceil(Sk / D)`` calls.

    `columns` says which column of V stands in each column of the output, where another is known to; -1 for none.
    """
    if columns is None:
        return _weights(lambda v: candidate(q, k, v, problem).out, k, width=problem.head_dim)
    # Column c of V stands first at column places[c] of the output; of columns that stand nowhere none is used.
    there = [c for c in range(problem.head_dim) if bool((columns == c).any())]
    places = torch.tensor([int((columns == c).nonzero()[0]) for c in there], device=k.device)

    def out_of(v: torch.Tensor) -> torch.Tensor:
        spread = torch.zeros(*v.shape[:3], problem.head_dim, dtype=v.dtype, device=v.device)
        spread[..., there] = v
        return candidate(q, k, spread, problem).out[..., places]

    return _weights(out_of, k, width=len(there))


@ambient.judging
def simulated_weights(q, k, problem: Problem, behaviour: Behaviour = RIGHT) -> torch.Tensor:
    """What `weights` would read of a function that behaves so; rows that see no key have zeros."""
    behaviour = behaviour.with_(columns=None)  # `weights` allows for them
    # A simulation takes a V of any width, so that its softmax is computed once and not for each group of keys.
    return _weights(lambda v: simulate(q, k, v, problem, behaviour)[0], k, width=problem.seqlen_k)


def _weights(out_of: Callable[[torch.Tensor], torch.Tensor], k: torch.Tensor, *, width: int) -> torch.Tensor:
    """The output for V made of unit vectors, `width` keys at a time, flat over batch and heads."""
    seqlen = k.shape[2]
    found = []
    for start in range(0, seqlen, width):
        v = torch.zeros(*k.shape[:3], width, dtype=k.dtype, device=k.device)
        here = torch.arange(start, min(start + width, seqlen), device=k.device)
        v[:, :, here, here - start] = 1.0
        found.append(out_of(v)[..., : len(here)].double())
    return torch.cat(found, dim=-1).flatten(0, 1)


@ambient.judging
def read_marks(candidate: Candidate, problem: Problem) -> Marks:
    """Which head of Q, K and V each query head reads, by one call for V and two for K and Q.

    The row that is looked at is the last one: it sees the most keys. A mark needs as many columns, and for K and Q as
    many keys, as there are heads.
    """
    heads_q, heads_kv = problem.batch * problem.num_heads_q, problem.batch * problem.num_heads_kv
    device, dtype, width = candidate.device, dtype_of(problem), problem.head_dim
    q = torch.zeros(problem.batch, problem.num_heads_q, problem.seqlen_q, width, dtype=dtype, device=device)
    k = torch.zeros(problem.batch, problem.num_heads_kv, problem.seqlen_k, width, dtype=dtype, device=device)
    found: dict[str, torch.Tensor | None] = {"q": None, "k": None, "v": None}
    flat = torch.arange(heads_kv, device=device)
    if heads_kv <= width:
        v = torch.zeros_like(k)
        v.view(heads_kv, problem.seqlen_k, width)[flat, :, flat] = 1.0
        found["v"] = _clearest(candidate(q, k, v, problem).out[:, :, -1], heads_kv)
    strong = _strong(problem)
    if strong is None:
        return Marks(**found)
    keys = torch.arange(problem.seqlen_k, device=device)

    def marked(what: str, heads: int, at: torch.Tensor) -> torch.Tensor | None:
        """The table that large scores of key j for head at[j] show, whose V says which head; -1: of no head."""
        strong_k, v, ones = torch.zeros_like(k), torch.zeros_like(k), torch.zeros_like(q)
        used, part = keys[at >= 0], at[at >= 0]
        v[:, :, used, part] = 1.0
        if what == "k":  # K head h is large at its own keys alone
            strong_k.view(heads, problem.seqlen_k, width)[part, used, 0] = strong
            ones[..., 0] = 1.0
        else:  # query head h points at column h, along which the keys of head h alone are large, in every K head
            each = torch.arange(heads, device=device)
            ones.view(heads, problem.seqlen_q, width)[each, :, each] = 1.0
            strong_k[:, :, used, part] = strong
        return _clearest(candidate(ones, strong_k, v, problem).out[:, :, -1], heads)

    for what, heads in (("k", heads_kv), ("q", heads_q)):
        if heads > min(width, problem.seqlen_k):
            continue
        # By one key a head; and by a part of the keys a head, which only has a veto: keys in another order would show
        # as another head in the first and not in the second. A part that is hidden leaves the rest to look clear.
        one = marked(what, heads, torch.where(keys < heads, keys, -1))
        parts = marked(what, heads, keys * heads // problem.seqlen_k)
        found[what] = one if one is None or parts is None or torch.equal(one, parts) else None
    return Marks(**found)


def _strong(problem: Problem) -> float | None:
    """The element of K that gives a key 12 more than all others for a query of 1; None where no such number fits."""
    if problem.scale == 0:
        return None
    value = 12.0 / problem.scale
    return value if abs(value) < 3e4 else None


def _clearest(rows: torch.Tensor, count: int) -> torch.Tensor | None:
    """The column with nearly all the weight, ``int64 [B*Hq]``; None where a row has no such column."""
    rows = rows.reshape(-1, rows.shape[-1])[:, :count].double()
    best = rows.max(dim=-1)
    clear = bool((best.values > 0.5 * rows.nan_to_num(nan=math.inf).abs().sum(dim=-1)).all())
    return best.indices if clear and bool((best.values > 1e-3).all()) else None


@ambient.judging
def read_columns(candidate: Candidate, problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output for a V of zeros, for keys whose V is all the same row, ``1, 2, ..., D``, and that row.

    float64, twice ``[N, Sq, D]``, and ``[D]``. Weights that add up to 1 give that very row, whatever Q and K are.
    """
    q, k, v = _ordinary(problem, candidate.device)
    row = torch.arange(1, problem.head_dim + 1, device=v.device, dtype=torch.float64)
    nothing = candidate(q, k, torch.zeros_like(v), problem).out.double().flatten(0, 1)
    v = row.to(v.dtype).expand(v.shape).contiguous()
    return nothing, candidate(q, k, v, problem).out.double().flatten(0, 1), v[0, 0, 0].double()


@ambient.judging
def read_ladder(
    candidate: Candidate, problem: Problem, levels: torch.Tensor, counts: torch.Tensor | None = None
) -> torch.Tensor | None:
    """float64 ``[N, L]``: in the last row, the weight of a key at each of these scores beside one at the last of them.

    Key j has score ``levels[j % L]``; `counts`, ``[Sq, Sk]``, says how often each is known to count. None where there
    are fewer keys than levels, or K would not fit its dtype.
    """
    count = len(levels)
    if problem.scale == 0 or problem.seqlen_k < count or problem.head_dim < max(count, 2):
        return None
    size = 16.0  # of Q, so that neither has to be large
    if float(levels.abs().max()) / abs(problem.scale) / size > 3e4:
        return None
    q, k, v = (torch.zeros_like(t) for t in _ordinary(problem, candidate.device))
    which = torch.arange(problem.seqlen_k, device=q.device) % count
    q[..., :2] = size
    wanted = (levels.to(q.device) / problem.scale / size)[which]
    k[..., 0] = wanted.to(k.dtype)
    k[..., 1] = (wanted - wanted.to(k.dtype).double()).to(k.dtype)  # what 16 bits leave of it
    v[:, :, torch.arange(problem.seqlen_k, device=q.device), which] = 1.0
    seen = (mask_of(problem, q.device) if counts is None else counts)[-1]
    keys = torch.stack([seen[which == one].sum() for one in range(count)])
    found = candidate(q, k, v, problem).out[:, :, -1, :count].double().flatten(0, 1) / keys
    return found / found[:, -1:]


@ambient.judging
def slopes(found: Scores, problem: Problem, k_heads: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What the scores of each head, row and 16 keys are multiplied by: float64 by ``heads``, ``rows`` and ``keys``.

    Within 16 keys that follow each other, so that what the weights of a page or of a row are multiplied by counts for
    nothing. NaN where nothing could be read.
    """
    logs = found.weights.masked_fill(~(found.weights > 1e-6), math.nan).log()
    wanted = right_scores(found.q, found.k, problem, k_heads)
    more = (0, -problem.seqlen_k % ANCHOR_EVERY)
    known = logs.isfinite() & (mask_of(problem, logs.device) > 0)
    x, y, known = (torch.nn.functional.pad(t, more).unflatten(-1, (-1, ANCHOR_EVERY))
                   for t in (wanted, logs.nan_to_num(0.0), known))  # fmt: skip
    number = known.sum(dim=-1, keepdim=True).clamp_min(1)
    dx, dy = ((t - (t * known).sum(dim=-1, keepdim=True) / number) * known for t in (x, y))
    up, down = (dx * dy).sum(dim=-1), (dx * dx).sum(dim=-1)
    return {name: up.sum(dim=dims) / down.sum(dim=dims) for name, dims in
            (("heads", (1, 2)), ("rows", (0, 2)), ("keys", (0, 1)))}  # fmt: skip


@ambient.judging
def read_counts(candidate: Candidate, problem: Problem, columns: torch.Tensor | None = None) -> Counts:
    """Which keys each row counts, how often, and what else it counts, from Q = 0."""
    device, dtype = candidate.device, dtype_of(problem)
    q = torch.zeros(problem.batch, problem.num_heads_q, problem.seqlen_q, problem.head_dim, dtype=dtype, device=device)
    k = _ordinary(problem, device)[1]
    found = weights(candidate, q, k, problem, columns)
    total = found.sum(dim=-1)
    # The unit is the weight of a key that is counted once: the smallest there is in the row.
    unit = found.masked_fill(~(found > 1e-12), math.inf).amin(dim=-1)
    counts = (found / unit[..., None]).nan_to_num(nan=math.nan, posinf=math.nan)
    counts = counts.masked_fill((unit == math.inf)[..., None] & (found == 0), 0.0)
    slack = max(4.0 * torch.finfo(dtype).eps, 1e-4)
    whole = counts.round()
    clear = bool(((counts - whole).abs() <= slack * whole.clamp_min(1)).all())
    missing = ((1.0 - total) / unit).masked_fill(unit == math.inf, 0.0).nan_to_num(nan=0.0)
    extra = missing.median(dim=0).values
    noise = slack * whole.nan_to_num(nan=0.0).sum(dim=-1).amax(dim=0).clamp_min(1)
    return Counts(whole if clear else counts, total, extra.masked_fill(extra.abs() < noise.clamp_min(0.2), 0.0), clear)


@ambient.judging
def read_phantoms(candidate: Candidate, problem: Problem) -> torch.Tensor | None:
    """float64 ``[N, Sq]``: keys of score 0 that are counted though they do not exist; None where it cannot be asked.

    All real keys score -8, so one that does not exist, with its score of 0, outweighs 2981 of them.
    """
    strong = _strong(problem)
    if strong is None:
        return None
    device, dtype = candidate.device, dtype_of(problem)
    q = torch.zeros(problem.batch, problem.num_heads_q, problem.seqlen_q, problem.head_dim, dtype=dtype, device=device)
    k = torch.zeros(problem.batch, problem.num_heads_kv, problem.seqlen_k, problem.head_dim, dtype=dtype, device=device)
    q[..., 0] = 1.0
    k[..., 0] = -8.0 / problem.scale
    total = candidate(q, k, torch.ones_like(k), problem).out.double()[..., 0].reshape(-1, problem.seqlen_q)
    score = float(k[0, 0, 0, 0]) * problem.scale
    keys = mask_of(problem, device).sum(dim=-1)
    counted = keys * math.exp(score) * (1.0 / total - 1.0)
    return counted.masked_fill((total - 1.0).abs() < 4 * torch.finfo(dtype).eps, 0.0).masked_fill(keys == 0, 0.0)


@ambient.judging
def read_hidden(candidate: Candidate, problem: Problem, depth: float, lift: float = 0.0) -> float | None:
    """The weight of all keys behind the mask, which score `lift`, where seen ones score ``-depth``; in `partial_row`.

    0 for a right function. None where no row sees some of the keys alone, or K would not fit its dtype.
    """
    size, row = 64.0, partial_row(problem, candidate.device)
    if problem.scale == 0 or row is None:
        return None
    seen = mask_of(problem, candidate.device)[row] > 0
    if max(depth, abs(lift)) / abs(problem.scale) / size > 6e4:
        return None
    q, k, v = (torch.zeros_like(t) for t in _ordinary(problem, candidate.device))
    q[..., 0] = size
    k[..., 0] = -depth / problem.scale / size
    k[:, :, ~seen, 0] = lift / problem.scale / size
    v[:, :, ~seen] = 1.0
    return float(candidate(q, k, v, problem).out[0, 0, row, 0])


def partial_row(problem: Problem, device) -> int | None:
    """The first row that sees some keys and not all; None where none does."""
    keys = mask_of(problem, device).sum(dim=-1)
    rows = ((keys > 0) & (keys < problem.seqlen_k)).nonzero()
    return int(rows[0]) if len(rows) else None


@ambient.judging
def read_far(candidate: Candidate, problem: Problem, product: float) -> torch.Tensor | None:
    """float64 ``[N, Sq, 2]``: the weight of all even and of all odd keys, whose products with Q are far apart.

    Those of even keys are `product`, those of odd ones its negative, or turned round under a negative scale: all weight
    belongs to the even keys. None where the scale leaves them close together, or rows see no even key.
    """
    size = 256.0  # of Q, so that K is no larger than float16 holds
    # A function that stores scaled scores in 16 bits, and says so, may lose those that float16 does not hold.
    stored = abs(product * problem.scale) if candidate.rounds_scores else 0.0
    if abs(product * problem.scale) < 40 or stored > 6e4 or abs(product / size) > 6e4:
        return None
    q, k, v = (torch.zeros_like(t) for t in _ordinary(problem, candidate.device))
    q[..., 0] = size
    k[..., 0] = math.copysign(product / size, problem.scale)
    k[:, :, 1::2, 0] *= -1
    v[:, :, ::2, 0] = 1.0
    v[:, :, 1::2, 1] = 1.0
    return candidate(q, k, v, problem).out[..., :2].double().flatten(0, 1)


def _ordinary(problem: Problem, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flashcore.numerics.inputs import make_inputs

    return make_inputs(problem, seed=seed, device=device)


@ambient.judging
def anchored(problem: Problem, device: str, amplitude: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and K whose every 16th key scores ``3 * amplitude``, more than all others (about ``0.5 * amplitude``)."""
    q, k, _ = _ordinary(problem, device, seed)
    dtype, scale = q.dtype, problem.scale or 1.0
    width = max(problem.head_dim - 1, 1)
    size = math.sqrt(SPREAD * amplitude / (abs(scale) * math.sqrt(width)))
    q, k = q.float() * size, k.float() * size
    q[..., 0] = 1.0
    k[..., 0] = 0.0
    k[:, :, ::ANCHOR_EVERY] = 0.0
    k[:, :, ::ANCHOR_EVERY, 0] = ANCHOR * amplitude / scale
    return q.to(dtype), k.to(dtype)


@ambient.judging
def read_scores(
    candidate: Candidate, problem: Problem, k_heads: torch.Tensor | None = None, columns: torch.Tensor | None = None,
) -> Scores | None:  # fmt: skip
    """The function's scores, read beside the anchors'; first gently, so that a wrong scale drives no weight to 0.

    `k_heads` says which flat K head each query head is known to read; None for its own.

    None for a scale of 0, or one that its anchors would not fit into the dtype for.
    """
    if problem.scale == 0 or abs(ANCHOR / problem.scale) > 3e4:
        return None
    gentle = _scores(candidate, problem, GENTLE, k_heads, columns)
    if not math.isfinite(gentle.factor) or not 0.02 < abs(gentle.factor) < 50:
        return gentle
    by_part = torch.cat([t for t in slopes(gentle, problem, k_heads).values()])
    steepest = float(by_part.abs().nan_to_num(0.0).max()) if len(by_part) else 0.0
    if steepest > 1.5 * abs(gentle.factor) and steepest < 50:  # of some scores alone: they would drive others to 0
        return gentle
    return _scores(candidate, problem, min(1.0, 1.0 / abs(gentle.factor)), k_heads, columns)


def _scores(
    candidate: Candidate, problem: Problem, amplitude: float, k_heads: torch.Tensor | None,
    columns: torch.Tensor | None = None,
) -> Scores:  # fmt: skip
    q, k = anchored(problem, candidate.device, amplitude)
    found = weights(candidate, q, k, problem, columns)
    logs = found.masked_fill(~(found > 0), math.nan).log()
    anchors = logs[..., ::ANCHOR_EVERY]
    relative = logs - anchors.nanmean(dim=-1, keepdim=True)
    wanted = right_scores(q, k, problem, k_heads)
    known = relative.isfinite() & (mask_of(problem, q.device) > 0)
    x, y = wanted[known], relative[known]
    factor = float((x * y).sum() / (x * x).sum()) if known.any() else math.nan
    return Scores(q, k, found, amplitude, factor, relative)


def right_scores(q, k, problem: Problem, k_heads: torch.Tensor | None = None) -> torch.Tensor:
    """float64 ``[N, Sq, Sk]``: the scores of anchored inputs minus the anchors' score."""
    flat_q, flat_k, _ = reference.flat_inputs(q, k, k, problem, slice(None))
    if k_heads is not None:
        flat_k = k.reshape(-1, *k.shape[2:]).double()[k_heads]
    scores = flat_q @ flat_k.mT * problem.scale
    return scores - scores[..., :1]


@dataclass(frozen=True)
class Small:
    """Weights of random scores so small that no maximum matters, beside those scores, where rows see all keys."""

    q: torch.Tensor
    """float64 ``[N, R, D]`` and ``[N, S, D]``: what the scores are made of."""
    k: torch.Tensor
    logs: torch.Tensor
    """float64 ``[N, R, S]``: logarithms of the weights, less the mean of their row."""
    scores: torch.Tensor
    """The same of the right scores."""


@ambient.judging
def read_small(candidate: Candidate, problem: Problem, columns: torch.Tensor | None = None) -> Small | None:
    """None where no row sees half of the keys, or weights vanish."""
    if problem.scale == 0:
        return None
    q, k, _ = _ordinary(problem, candidate.device, seed=3)
    size = math.sqrt(SPREAD / (abs(problem.scale) * math.sqrt(problem.head_dim)))
    q, k = (q.float() * size).to(q.dtype), (k.float() * size).to(k.dtype)
    seen = mask_of(problem, q.device) > 0
    keys = problem.seqlen_k if bool(seen.all()) else problem.seqlen_k // 2
    rows = seen[:, :keys].all(dim=-1)
    if not bool(rows.any()) or keys < 2:
        return None
    found = weights(candidate, q, k, problem, columns)[:, rows, :keys]
    if not bool((found > 0).all()):
        return None
    flat_q, flat_k, _ = reference.flat_inputs(q, k, k, problem, slice(None))
    flat_q, flat_k = flat_q[:, rows], flat_k[:, :keys]
    scores = flat_q @ flat_k.mT * problem.scale
    logs = found.log()
    return Small(flat_q, flat_k, *(t - t.mean(dim=-1, keepdim=True) for t in (logs, scores)))


@ambient.judging
def metric_of(small: Small | None, problem: Problem) -> torch.Tensor | None:
    """float64 ``[D, D]``: the matrix A for which the scores are q A k, by least squares over small random scores.

    ``scale`` times the identity for a right function. Logarithms of weights are scores up to a constant of the row, so
    keys are taken from their mean. None where fewer than D rows and D + 1 keys see each other.
    """
    width = problem.head_dim
    if small is None or small.q.shape[1] < width or small.k.shape[1] < width + 1:
        return None
    k = small.k - small.k.mean(dim=1, keepdim=True)
    return (torch.linalg.pinv(small.q) @ small.logs @ torch.linalg.pinv(k).mT).mean(dim=0)


@ambient.judging
def order_of(small: Small | None) -> torch.Tensor | None:
    """int64 ``[S]``: the key whose scores each key's weights follow; None where they follow none clearly."""
    if small is None or small.q.shape[0] * small.q.shape[1] < 16:
        return None
    mine, theirs = (t.permute(2, 0, 1).flatten(1) for t in (small.logs, small.scores))
    mine, theirs = (t / t.norm(dim=-1, keepdim=True).clamp_min(1e-12) for t in (mine, theirs))
    best = (mine @ theirs.mT).max(dim=-1)
    return best.indices if bool((best.values > 0.9).all()) else None
