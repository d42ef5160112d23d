"""Attention with some of its steps done otherwise: what a hypothesis about a bug predicts, to the element."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from flashcore.bisection.diagnosis.elements import Scrambled, as_contiguous, scrambled
from flashcore.bisection.diagnosis.pages import Loop, by_column, carried, page_loop
from flashcore.numerics import ambient, reference
from flashcore.problem import Problem

LseKind = Literal[
    "log2", "log2 of the sum", "row_max alone", "row_sum alone", "without row_max", "negative", "scaled",
    "row_max plus row_sum", "row_max unscaled", "log1p",
]  # fmt: skip
Weighing = Literal[
    "softmax", "sigmoid", "sigmoid less log(keys)", "over rows", "over heads", "softmax twice", "scores", "relu",
    "log of the softmax", "linear",
]  # fmt: skip
EXP_LIMIT = {"float32": 88.722839, "float16": 11.089866, "bfloat16": 88.722839}
"""The largest x whose exp(x) the dtype holds (log of its largest number)."""
FLOAT16_ENDS = 65520.0
"""From here on numbers are rounded to infinity in float16."""


@dataclass(frozen=True)
class Behaviour:
    """How an attention function computes. Every field says one thing that may be done otherwise; None: done right."""

    taken: str = "qkv"
    """Which tensor stands at the place of Q, of K and of V; those at the places of K and V have heads like Q."""
    q_heads: torch.Tensor | None = None
    """int64 ``[B*Hq]``: the flat query head that each query head reads in place of its own."""
    q_rows: torch.Tensor | None = None
    """int64 ``[Sq]``: the row of Q that each row is computed from."""
    k_heads: torch.Tensor | None = None
    """int64 ``[B*Hq]``: the flat K head that each query head reads."""
    v_heads: torch.Tensor | None = None
    scrambled: tuple[Scrambled, ...] = ()
    strides_ignored: bool = False
    """Memory is read as if it were contiguous, whatever the strides say."""
    counts: torch.Tensor | None = None
    """float64 ``[N, Sq, Sk]`` or ``[Sq, Sk]``: how often each key is counted, in place of the mask's 0 and 1."""
    masked_score: float | None = None
    """Score that a masked key gets, in place of -inf."""
    masked_added: float | None = None
    """What is added to the score of a masked key, in place of -inf."""
    extra: torch.Tensor | None = None
    """float64 ``[Sq]``: keys of score 0 and value 0 that are counted besides."""
    k_of: torch.Tensor | None = None
    """int64 ``[Sk]``: the key whose K is used at each place."""
    v_of: torch.Tensor | None = None
    """int64 ``[Sk]``: the key whose V is used at each place; -1 for a row of zeros."""
    scale_factor: float = 1.0
    """What the scores are multiplied by besides the right scale."""
    factors: torch.Tensor | None = None
    """float64 that broadcasts to ``[N, Sq, Sk]``: what the scores of some heads, rows or keys are multiplied by."""
    bend: tuple[Literal["tanh", "clip", "clip above", "abs", "relu"], float] | None = None
    """Scores become ``c tanh(score / c)``, are cut off at -c and c, above c or below 0, or lose their sign."""
    bias: torch.Tensor | None = None
    """float64 ``[N, Sq, Sk]``: what is added to the scores."""
    metric: torch.Tensor | None = None
    """float64 ``[D, D]``: scores are ``q metric k``, in place of ``scale * q k``."""
    weighing: Weighing = "softmax"
    """How the weights of a row are made of its scores."""
    lanes: tuple[str, int] | None = None
    """Each lane keeps a maximum of its own: ``("mod", n)``, lane j % n; ``("block", n)``, lane j // n."""
    loop: Loop | None = None
    no_max: str | None = None
    """No maximum is subtracted, and exp is computed in this dtype."""
    least_max: float | None = None
    """No maximum is lower than this, and exp underflows as in float32."""
    smallest: bool = False
    """The smallest score of a row is subtracted in place of the largest."""
    scores_rounded: bool = False
    """Products of Q and K are rounded to 16 bits: the dtype of the inputs, or float16 where that has 32."""
    q_rounded: float | None = None
    """Q is multiplied by the scale and by this number, and rounded to its dtype, before the products."""
    overflow: float | None = None
    """What a product of Q and K becomes that float16 does not hold; None where it stays what it is."""
    hidden_in_sum: bool = False
    """Keys behind the mask count in row_sum, as where a mask is applied after the softmax."""
    epsilon: float = 0.0
    """What is added to row_sum before the output is divided by it."""
    carried: tuple[Literal["row_sum", "all"], int] | None = None
    """Each tile of so many rows goes on from the state in which the one before it ended."""
    sum_of: int = 0
    """Each row is divided by the row_sum of the row that lies so many before it."""
    max_of: int = 0
    """The maximum of the row so many before is subtracted for the output, and the row's own for row_sum."""
    divided_by_column: bool = False
    """Column d of a tile of rows is divided by the row_sum of the tile's row d."""
    divided_twice: bool = False
    """The output is divided by row_sum twice."""
    normalised: bool = True
    """Whether the output is divided by row_sum."""
    columns: torch.Tensor | None = None
    """int64 ``[D]``: the column of V that stands in each column of the output; -1 for 0."""
    out_factor: float = 1.0
    """What the output is multiplied by."""
    over_keys: bool = False
    """The output is divided by the number of keys."""
    out_limit: float | None = None
    """The output is cut off at this number and its negative."""
    head_factors: torch.Tensor | None = None
    """float64 ``[N]``: what the output of each head is multiplied by."""
    plus: Literal["q"] | None = None
    """What is added to the output."""
    added: torch.Tensor | None = None
    """float64 ``[N, Sq, D]``: what is added to the output, whatever V is."""
    zeroed: torch.Tensor | None = None
    """bool ``[N, Sq]``: rows of the output that are 0."""
    unwritten: torch.Tensor | None = None
    """bool ``[N, Sq, D]``: elements of `out` that are not written (NaN in the prediction)."""
    lse: LseKind | None = None

    def with_(self, **changes: Any) -> Behaviour:
        return replace(self, **changes)

    @property
    def tells_heads_apart(self) -> bool:
        """Whether a table of it has an entry for each head, so that it says nothing of some of them alone."""
        tables = (self.counts, self.factors, self.bias, self.added, self.zeroed)
        heads = (self.q_heads, self.k_heads, self.v_heads, self.zeroed, self.unwritten, self.head_factors)
        return any(t is not None for t in heads) or any(t is not None and t.dim() == 3 for t in tables)

    @property
    def is_of_one_shape(self) -> bool:
        """Whether it has tables that say something of one shape alone."""
        return any(getattr(self, name) is not None for name in TABLES)

    def without_tables(self) -> Behaviour:
        """The same without what says something of one shape alone: tables of heads, keys and columns."""
        return replace(self, **{name: getattr(RIGHT, name) for name in TABLES})


TABLES = ("q_heads", "q_rows", "k_heads", "v_heads", "counts", "extra", "k_of", "v_of", "metric", "factors", "bias",
          "columns", "added", "zeroed", "unwritten", "head_factors")  # fmt: skip
"""Fields of a `Behaviour` that say something of one shape alone."""
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
        q, k, v = (as_contiguous(t) for t in (q, k, v))
    given_q = q
    for name, how in b.scrambled:
        q, k, v = (scrambled(t, how, problem) if name == own else t for own, t in zip("qkv", (q, k, v), strict=True))
    if b.taken != "qkv":
        q, k, v, problem = _taken(q, k, v, problem, b.taken)
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
    if b.q_rounded is not None and scale:
        q = (q * (scale * b.q_rounded)).to(dtype).double() / (scale * b.q_rounded)
    products = q @ k.mT if b.metric is None else q @ b.metric @ k.mT / problem.scale
    if b.overflow is not None:
        products = products.masked_fill(products.abs() >= FLOAT16_ENDS, b.overflow)
    if b.scores_rounded:
        products = products.to(dtype if dtype.itemsize == 2 else torch.float16).double()
    scores = products * scale
    if b.factors is not None:
        scores = scores * b.factors
    if b.bend is not None:
        scores = _bent(scores, *b.bend)
    if b.bias is not None:
        scores = scores + b.bias
    counts = mask_of(problem, q.device).expand(scores.shape) if b.counts is None else b.counts.expand(scores.shape)
    if b.masked_score is not None:
        scores = scores.masked_fill(counts == 0, b.masked_score)
        counts = torch.ones_like(counts)
    if b.masked_added is not None:
        scores = torch.where(counts == 0, scores + b.masked_added, scores)
        counts = torch.ones_like(counts)
    out, row_sum, shared = _softmax(scores, counts, v, b, scale)
    if b.weighing != "softmax":
        out = _weighed(b.weighing, scores, counts, q, k, problem) @ v
    lse = shared + row_sum.log()
    if b.columns is not None:
        out = out[..., b.columns.clamp_min(0)] * (b.columns >= 0)
    if b.zeroed is not None:
        out = out.masked_fill(b.zeroed[..., None], 0.0)
    out = out * b.out_factor / (problem.seqlen_k if b.over_keys else 1)
    if b.head_factors is not None:
        out = out * b.head_factors[:, None, None]
    if b.out_limit is not None:
        out = out.clamp(-b.out_limit, b.out_limit)
    if b.plus == "q" and out.shape[-1] == given_q.shape[-1]:
        out = out + given_q.flatten(0, 1).double()
    if b.added is not None and b.added.shape[-1] == out.shape[-1]:
        out = out + b.added
    if b.unwritten is not None:
        # A reader of weights has columns of its own: to it rows are unwritten that are so in all columns.
        same = b.unwritten.shape[-1] == out.shape[-1]
        out = out.masked_fill(b.unwritten if same else b.unwritten.all(dim=-1, keepdim=True), math.nan)
    lse = _other_lse(lse, shared, row_sum, b.lse, problem) if b.lse else lse
    out = out.view(*shape[:3], v.shape[-1])
    for name, how in b.scrambled:
        out = scrambled(out, how, problem) if name == "out" else out
    return out, lse.view(shape[:3])


def mask_of(problem: Problem, device) -> torch.Tensor:
    """float64 ``[Sq, Sk]``: 1 where a row sees a key, else 0."""
    rows, columns = slice(0, problem.seqlen_q), slice(0, problem.seqlen_k)
    seen = reference.visible(problem, rows, columns, device)
    if seen is None:
        return torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.float64, device=device)
    return seen.double()


def _softmax(scores, counts, v, b: Behaviour, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``out``, the sum that it was divided by, and the reference that was subtracted, ``[N, Sq, ...]``."""
    seen = scores.masked_fill(counts == 0, -math.inf)
    shared = seen.amax(dim=-1)
    if b.extra is not None:
        shared = torch.where(b.extra > 0, shared.clamp_min(0.0), shared)
    base = reference.safe(shared)
    if b.least_max is not None:
        base = base.clamp_min(b.least_max)
        probs = (seen - base[..., None]).exp().float().double() * counts
    elif b.no_max is not None:
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
        accum, row_sum, base = page_loop(seen, counts, v, b.loop, scale)
    else:
        accum, row_sum = probs @ v, probs.sum(dim=-1)
    if b.extra is not None:
        row_sum = row_sum + b.extra * torch.exp(-base)
    if b.hidden_in_sum:
        row_sum = (scores - base[..., None]).exp().sum(dim=-1)
    if b.carried is not None:
        accum, row_sum, base = carried(accum, row_sum, base, *b.carried)
    divisor = (row_sum.roll(b.sum_of, dims=-1) if b.sum_of else row_sum) + b.epsilon
    divisor = divisor**2 if b.divided_twice else divisor
    if b.max_of:
        accum = accum * (base - base.roll(b.max_of, dims=-1)).exp()[..., None]
    divisor = divisor.masked_fill(divisor == 0, 1.0)
    each = by_column(divisor, accum.shape[-1]) if b.divided_by_column else divisor[..., None]
    out = accum / each if b.normalised else accum
    return out, row_sum, torch.where(shared == -math.inf, shared, base)


def _taken(q, k, v, problem: Problem, taken: str):
    """Q, K and V where others stand at their places; all have as many heads as Q, where Q is one that is moved."""
    if taken.find("q") != 0 or taken.count("q") > 1:
        group = problem.num_heads_q // problem.num_heads_kv
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        problem = problem.with_(num_heads_kv=problem.num_heads_q)
    given = {"q": q, "k": k, "v": v}
    return *(given[name] for name in taken), problem


def _weighed(how: Weighing, scores, counts, q, k, problem: Problem) -> torch.Tensor:
    """float64 ``[N, Sq, Sk]``: weights that another formula makes of the scores; 0 where a key is not counted."""
    seen = scores.masked_fill(counts == 0, -math.inf)
    match how:
        case "sigmoid":
            return scores.sigmoid() * counts
        case "sigmoid less log(keys)":
            return (scores - math.log(scores.shape[-1])).sigmoid() * counts
        case "over rows":
            return torch.softmax(seen, dim=-2).nan_to_num(0.0)
        case "over heads":
            apart = seen.view(problem.batch, problem.num_heads_q, *seen.shape[1:])
            return torch.softmax(apart, dim=1).nan_to_num(0.0).flatten(0, 1)
        case "softmax twice":
            once = torch.softmax(seen, dim=-1).masked_fill(counts == 0, -math.inf)
            return torch.softmax(once, dim=-1).nan_to_num(0.0)
        case "scores":
            return scores * counts
        case "relu":
            return scores.relu() * counts
        case "log of the softmax":
            return torch.log_softmax(seen, dim=-1).masked_fill(counts == 0, 0.0)
    q, k = (torch.nn.functional.elu(t) + 1 for t in (q, k))
    weights = q @ k.mT * counts
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-30)


def _lane_maximum(seen: torch.Tensor, lanes: tuple[str, int]) -> torch.Tensor:
    """``[N, Sq, Sk]``: the largest score of each key's own lane."""
    how, count = lanes
    place = torch.arange(seen.shape[-1], device=seen.device)
    lane = place % count if how == "mod" else place // count
    found = seen.new_full((*seen.shape[:-1], int(lane.max()) + 1), -math.inf)
    found.scatter_reduce_(-1, lane.expand(seen.shape), seen, "amax")
    return found[..., lane]


def _bent(scores: torch.Tensor, how: str, limit: float) -> torch.Tensor:
    match how:
        case "tanh":
            return limit * torch.tanh(scores / limit)
        case "clip":
            return scores.clamp(-limit, limit)
        case "clip above":
            return scores.clamp(max=limit)
        case "relu":
            return scores.relu()
    return scores.abs()


def _other_lse(lse, shared, row_sum, kind: LseKind, problem: Problem) -> torch.Tensor:
    return {
        "log2": lambda: lse / math.log(2.0),
        "log2 of the sum": lambda: shared + row_sum.log2(),
        "row_max alone": lambda: shared,
        "row_sum alone": lambda: row_sum,
        "without row_max": lambda: row_sum.log(),
        "negative": lambda: -lse,
        "scaled": lambda: lse * problem.scale,
        "row_max plus row_sum": lambda: shared + row_sum,
        "row_max unscaled": lambda: shared / (problem.scale or 1.0) + row_sum.log(),
        "log1p": lambda: shared + row_sum.log1p(),
    }[kind]()
