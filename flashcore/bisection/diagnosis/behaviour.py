"""Attention with some of its steps done otherwise: what a hypothesis about a bug predicts, to the element."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from flashcore.numerics import ambient, reference
from flashcore.problem import Problem

LoopFault = Literal[
    "accum not rescaled", "row_sum not rescaled", "neither rescaled", "neighbour's factor", "inverse factor",
    "accum overwritten", "row_sum overwritten", "pages averaged", "factor of base 2",
]  # fmt: skip
LseKind = Literal["log2", "log2 of the sum", "row_max alone", "row_sum alone", "without row_max", "negative", "scaled"]
EXP_LIMIT = {"float32": 88.722839, "float16": 11.089866, "bfloat16": 88.722839}
"""The largest x whose exp(x) the dtype holds (log of its largest number)."""
FLOAT16_ENDS = 65520.0
"""From here on numbers are rounded to infinity in float16."""


@dataclass(frozen=True)
class Loop:
    """A fault of the loop over pages of keys."""

    kind: LoopFault
    page_size: int
    page: int | None = None
    """The page at which it happens, counted in the order of the loop; None for all."""
    backwards: bool = False
    """The loop begins with the last page."""


@dataclass(frozen=True)
class Behaviour:
    """How an attention function computes. Every field says one thing that may be done otherwise; None: done right."""

    q_heads: torch.Tensor | None = None
    """int64 ``[B*Hq]``: the flat query head that each query head reads in place of its own."""
    q_rows: torch.Tensor | None = None
    """int64 ``[Sq]``: the row of Q that each row is computed from."""
    k_heads: torch.Tensor | None = None
    """int64 ``[B*Hq]``: the flat K head that each query head reads."""
    v_heads: torch.Tensor | None = None
    strides_ignored: bool = False
    """Memory is read as if it were contiguous, whatever the strides say."""
    counts: torch.Tensor | None = None
    """float64 ``[N, Sq, Sk]`` or ``[Sq, Sk]``: how often each key is counted, in place of the mask's 0 and 1."""
    masked_score: float | None = None
    """Score that a masked key gets, in place of -inf."""
    extra: torch.Tensor | None = None
    """float64 ``[Sq]``: keys of score 0 and value 0 that are counted besides."""
    k_of: torch.Tensor | None = None
    """int64 ``[Sk]``: the key whose K is used at each place."""
    v_of: torch.Tensor | None = None
    """int64 ``[Sk]``: the key whose V is used at each place; -1 for a row of zeros."""
    scale_factor: float = 1.0
    """What the scores are multiplied by besides the right scale."""
    metric: torch.Tensor | None = None
    """float64 ``[D, D]``: scores are ``q metric k``, in place of ``scale * q k``."""
    lanes: tuple[str, int] | None = None
    """Each lane keeps a maximum of its own: ``("mod", n)``, lane j % n; ``("block", n)``, lane j // n."""
    loop: Loop | None = None
    no_max: str | None = None
    """No maximum is subtracted, and exp is computed in this dtype."""
    smallest: bool = False
    """The smallest score of a row is subtracted in place of the largest."""
    scores_rounded: bool = False
    """Products of Q and K are rounded to 16 bits: the dtype of the inputs, or float16 where that has 32."""
    overflow: float | None = None
    """What a product of Q and K becomes that float16 does not hold; None where it stays what it is."""
    normalised: bool = True
    """Whether the output is divided by row_sum."""
    unwritten: tuple[int, ...] = ()
    """Rows of `out` that are not written (NaN in the prediction)."""
    lse: LseKind | None = None

    def with_(self, **changes: Any) -> Behaviour:
        return replace(self, **changes)

    def without_tables(self) -> Behaviour:
        """The same without what says something of one shape alone: tables of heads, keys and columns."""
        return replace(self, q_heads=None, q_rows=None, k_heads=None, v_heads=None, counts=None, extra=None,
                       k_of=None, v_of=None, metric=None, unwritten=())  # fmt: skip


RIGHT = Behaviour()


@ambient.judging
def simulate(q, k, v, problem: Problem, behaviour: Behaviour = RIGHT) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse` of attention that behaves so, in float64.

    Parameters
    ----------
    q, k, v
        ``[B, Hq, Sq, D]``, ``[B, Hkv, Sk, D]`` and ``[B, Hkv, Sk, W]``, any dtype and strides; W is D, or what a reader
        of weights wants.

    Returns
    -------
    out, lse
        float64 ``[B, Hq, Sq, W]`` and ``[B, Hq, Sq]``. NaN where the behaviour makes NaN or leaves memory unwritten.
    """
    b = behaviour
    dtype = q.dtype
    shape = tuple(q.shape)
    if b.strides_ignored:
        q, k, v = (_as_contiguous(t) for t in (q, k, v))
    kv = reference.kv_head_index(problem, q.device)
    q, k, v = (t.reshape(-1, *t.shape[2:]).double() for t in (q, k, v))
    q = q if b.q_heads is None else q[b.q_heads]
    q = q if b.q_rows is None else q[:, b.q_rows]
    k = k[kv if b.k_heads is None else b.k_heads]
    v = v[kv if b.v_heads is None else b.v_heads]
    if b.k_of is not None:
        k = k[:, b.k_of]
    if b.v_of is not None:
        v = v[:, b.v_of.clamp_min(0)] * (b.v_of >= 0)[:, None]
    scale = problem.scale * b.scale_factor
    products = q @ k.mT if b.metric is None else q @ b.metric @ k.mT / problem.scale
    if b.overflow is not None:
        products = products.masked_fill(products.abs() >= FLOAT16_ENDS, b.overflow)
    if b.scores_rounded:
        products = products.to(dtype if dtype.itemsize == 2 else torch.float16).double()
    scores = products * scale
    counts = mask_of(problem, q.device).expand(scores.shape) if b.counts is None else b.counts.expand(scores.shape)
    if b.masked_score is not None:
        scores = scores.masked_fill(counts == 0, b.masked_score)
        counts = torch.ones_like(counts)
    out, row_sum, shared = _softmax(scores, counts, v, b)
    lse = shared + row_sum.log()
    if b.unwritten:
        out[:, list(b.unwritten)] = math.nan
    lse = _other_lse(lse, shared, row_sum, b.lse, problem) if b.lse else lse
    return out.view(*shape[:3], v.shape[-1]), lse.view(shape[:3])


def mask_of(problem: Problem, device) -> torch.Tensor:
    """float64 ``[Sq, Sk]``: 1 where a row sees a key, else 0."""
    rows, columns = slice(0, problem.seqlen_q), slice(0, problem.seqlen_k)
    seen = reference.visible(problem, rows, columns, device)
    if seen is None:
        return torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.float64, device=device)
    return seen.double()


def _softmax(scores, counts, v, b: Behaviour) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``out``, the sum that it was divided by, and the reference that was subtracted, ``[N, Sq, ...]``."""
    seen = scores.masked_fill(counts == 0, -math.inf)
    shared = seen.amax(dim=-1)
    if b.extra is not None:
        shared = torch.where(b.extra > 0, shared.clamp_min(0.0), shared)
    base = reference.safe(shared)
    if b.no_max is not None:
        # The overflow is that of the dtype in which exp is computed; sums of such numbers overflow in float32.
        probs = seen.exp().masked_fill(seen > EXP_LIMIT[b.no_max], math.inf).float().double() * counts
        probs = probs.masked_fill(counts == 0, 0.0)
        base = torch.zeros_like(base)
    elif b.smallest:
        least = seen.masked_fill(counts == 0, math.inf).amin(dim=-1, keepdim=True)
        probs = (seen - least).exp().float().double() * counts  # what float32 does not hold becomes infinite
        probs = probs.masked_fill(counts == 0, 0.0)
    elif b.lanes is not None:
        probs = (seen - reference.safe(_lane_maximum(seen, b.lanes))).exp() * counts
    else:
        probs = (seen - base[..., None]).exp() * counts
    if b.loop is not None:
        accum, row_sum, base = _page_loop(seen, counts, v, b.loop)
    else:
        accum, row_sum = probs @ v, probs.sum(dim=-1)
    if b.extra is not None:
        row_sum = row_sum + b.extra * torch.exp(-base)
    out = accum / row_sum.masked_fill(row_sum == 0, 1.0)[..., None] if b.normalised else accum
    return out, row_sum, torch.where(shared == -math.inf, shared, base)


def _lane_maximum(seen: torch.Tensor, lanes: tuple[str, int]) -> torch.Tensor:
    """``[N, Sq, Sk]``: the largest score of each key's own lane."""
    how, count = lanes
    place = torch.arange(seen.shape[-1], device=seen.device)
    lane = place % count if how == "mod" else place // count
    found = seen.new_full((*seen.shape[:-1], int(lane.max()) + 1), -math.inf)
    found.scatter_reduce_(-1, lane.expand(seen.shape), seen, "amax")
    return found[..., lane]


def _page_loop(seen, counts, v, loop: Loop) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``accum``, ``row_sum`` and the reference after a loop over pages that does one thing wrong."""
    size, keys = loop.page_size, seen.shape[-1]
    columns = [slice(j, min(j + size, keys)) for j in range(0, keys, size)]
    if loop.backwards:
        columns.reverse()
    row_max = seen.new_full(seen.shape[:-1], -math.inf)
    row_sum, accum = seen.new_zeros(seen.shape[:-1]), seen.new_zeros(*seen.shape[:-1], v.shape[-1])
    averaged = torch.zeros_like(accum)
    for j, page in enumerate(columns):
        before, row_max = row_max, row_max.maximum(seen[..., page].amax(dim=-1))
        base = reference.safe(row_max)
        right = (before - base).exp()
        # base is 0 for a row without keys so far, and what it has is 0 as well
        probs = (seen[..., page] - base[..., None]).exp() * counts[..., page]
        total, part = probs.sum(dim=-1), probs @ v[..., page, :]
        of_sum, of_accum = right, right
        if loop.page is None or loop.page == j:
            one = torch.ones_like(right)
            match loop.kind:
                case "accum not rescaled":
                    of_accum = one
                case "row_sum not rescaled":
                    of_sum = one
                case "neither rescaled":
                    of_accum = of_sum = one
                case "neighbour's factor":
                    of_accum = right.roll(1, dims=-1)
                case "inverse factor":
                    of_accum = of_sum = (base - before).exp().nan_to_num(posinf=1.0)
                case "factor of base 2":
                    of_accum = of_sum = (before - base).exp2()
                case "accum overwritten":
                    of_accum = 0 * one
                case "row_sum overwritten":
                    of_sum = 0 * one
                case "pages averaged":
                    averaged += part / total.masked_fill(total == 0, 1.0)[..., None]
        row_sum, accum = of_sum * row_sum + total, of_accum[..., None] * accum + part
    if loop.kind == "pages averaged":
        return averaged / len(columns) * row_sum[..., None], row_sum, reference.safe(row_max)
    return accum, row_sum, reference.safe(row_max)


def _other_lse(lse, shared, row_sum, kind: LseKind, problem: Problem) -> torch.Tensor:
    return {
        "log2": lambda: lse / math.log(2.0),
        "log2 of the sum": lambda: shared + row_sum.log2(),
        "row_max alone": lambda: shared,
        "row_sum alone": lambda: row_sum,
        "without row_max": lambda: row_sum.log(),
        "negative": lambda: -lse,
        "scaled": lambda: lse * problem.scale,
    }[kind]()


def _as_contiguous(t: torch.Tensor) -> torch.Tensor:
    """What lies in the first elements of the tensor's memory, taken as a contiguous tensor of its shape."""
    return torch.as_strided(t, t.shape, torch.empty(t.shape, device="meta").stride(), t.storage_offset())
