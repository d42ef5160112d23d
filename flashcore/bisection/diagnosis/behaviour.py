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
    "accum overwritten", "row_sum overwritten", "pages averaged", "factor of base 2", "accum factor twice",
    "factor twice", "factor without the scale", "factor scaled twice", "accum rescaled late", "rescaled late",
    "factor of a column", "rescaled by warps of 8", "rescaled by warps of 16", "rescaled by warps of 32",
    "parts not weighed", "parts weighed in base 2", "parts weighed by log2", "parts weighed by their maximum",
]  # fmt: skip
LseKind = Literal[
    "log2", "log2 of the sum", "row_max alone", "row_sum alone", "without row_max", "negative", "scaled",
    "row_max plus row_sum", "row_max unscaled", "log1p",
]  # fmt: skip
Scrambled = tuple[str, Literal[
    "tile transposed", "reshaped", "heads and rows confused", "rows and heads confused", "group packed",
    "group unpacked", "rotated",
]]  # fmt: skip
"""One of ``q``, ``k``, ``v`` or ``out``, and how its elements are taken for those at other places."""
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
    scrambled: tuple[Scrambled, ...] = ()
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
    factors: torch.Tensor | None = None
    """float64 that broadcasts to ``[N, Sq, Sk]``: what the scores of some heads, rows or keys are multiplied by."""
    bend: tuple[Literal["tanh", "clip", "clip above", "abs"], float] | None = None
    """Scores become ``c tanh(score / c)``, are cut off at -c and c or above c alone, or lose their sign."""
    bias: torch.Tensor | None = None
    """float64 ``[N, Sq, Sk]``: what is added to the scores."""
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
    divided_twice: bool = False
    """The output is divided by row_sum twice."""
    normalised: bool = True
    """Whether the output is divided by row_sum."""
    columns: torch.Tensor | None = None
    """int64 ``[D]``: the column of V that stands in each column of the output; -1 for 0."""
    out_factor: float = 1.0
    """What the output is multiplied by."""
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
        heads = (self.q_heads, self.k_heads, self.v_heads, self.zeroed, self.unwritten)
        return any(t is not None for t in heads) or any(t is not None and t.dim() == 3 for t in tables)

    @property
    def is_of_one_shape(self) -> bool:
        """Whether it has tables that say something of one shape alone."""
        return any(getattr(self, name) is not None for name in TABLES)

    def without_tables(self) -> Behaviour:
        """The same without what says something of one shape alone: tables of heads, keys and columns."""
        return replace(self, **{name: getattr(RIGHT, name) for name in TABLES})


TABLES = ("q_heads", "q_rows", "k_heads", "v_heads", "counts", "extra", "k_of", "v_of", "metric", "factors", "bias",
          "columns", "added", "zeroed", "unwritten")  # fmt: skip
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
        q, k, v = (_as_contiguous(t) for t in (q, k, v))
    for name, how in b.scrambled:
        q, k, v = (_scrambled(t, how, problem) if name == own else t for own, t in zip("qkv", (q, k, v), strict=True))
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
    out, row_sum, shared = _softmax(scores, counts, v, b, scale)
    lse = shared + row_sum.log()
    if b.columns is not None:
        out = out[..., b.columns.clamp_min(0)] * (b.columns >= 0)
    if b.zeroed is not None:
        out = out.masked_fill(b.zeroed[..., None], 0.0)
    out = out * b.out_factor
    if b.added is not None and b.added.shape[-1] == out.shape[-1]:
        out = out + b.added
    if b.unwritten is not None:
        # A reader of weights has columns of its own: to it rows are unwritten that are so in all columns.
        same = b.unwritten.shape[-1] == out.shape[-1]
        out = out.masked_fill(b.unwritten if same else b.unwritten.all(dim=-1, keepdim=True), math.nan)
    lse = _other_lse(lse, shared, row_sum, b.lse, problem) if b.lse else lse
    out = out.view(*shape[:3], v.shape[-1])
    for name, how in b.scrambled:
        out = _scrambled(out, how, problem) if name == "out" else out
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
        accum, row_sum, base = _page_loop(seen, counts, v, b.loop, scale)
    else:
        accum, row_sum = probs @ v, probs.sum(dim=-1)
    if b.extra is not None:
        row_sum = row_sum + b.extra * torch.exp(-base)
    if b.hidden_in_sum:
        row_sum = (scores - base[..., None]).exp().sum(dim=-1)
    if b.carried is not None:
        accum, row_sum, base = _carried(accum, row_sum, base, *b.carried)
    divisor = (row_sum.roll(b.sum_of, dims=-1) if b.sum_of else row_sum) + b.epsilon
    divisor = divisor**2 if b.divided_twice else divisor
    if b.max_of:
        accum = accum * (base - base.roll(b.max_of, dims=-1)).exp()[..., None]
    out = accum / divisor.masked_fill(divisor == 0, 1.0)[..., None] if b.normalised else accum
    return out, row_sum, torch.where(shared == -math.inf, shared, base)


def _lane_maximum(seen: torch.Tensor, lanes: tuple[str, int]) -> torch.Tensor:
    """``[N, Sq, Sk]``: the largest score of each key's own lane."""
    how, count = lanes
    place = torch.arange(seen.shape[-1], device=seen.device)
    lane = place % count if how == "mod" else place // count
    found = seen.new_full((*seen.shape[:-1], int(lane.max()) + 1), -math.inf)
    found.scatter_reduce_(-1, lane.expand(seen.shape), seen, "amax")
    return found[..., lane]


def _page_loop(seen, counts, v, loop: Loop, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``accum``, ``row_sum`` and the reference after a loop over pages that does one thing wrong."""
    size, keys = loop.page_size, seen.shape[-1]
    columns = [slice(j, min(j + size, keys)) for j in range(0, keys, size)]
    if loop.backwards:
        columns.reverse()
    if loop.kind in PART_FAULTS:
        return _parts(seen, counts, v, columns, loop.kind)
    row_max = seen.new_full(seen.shape[:-1], -math.inf)
    row_sum, accum = seen.new_zeros(seen.shape[:-1]), seen.new_zeros(*seen.shape[:-1], v.shape[-1])
    for j, page in enumerate(columns):
        before, row_max = row_max, row_max.maximum(seen[..., page].amax(dim=-1))
        base = reference.safe(row_max)
        right = (before - base).exp()
        # base is 0 for a row without keys so far, and what it has is 0 as well
        probs = (seen[..., page] - base[..., None]).exp() * counts[..., page]
        total, part = probs.sum(dim=-1), probs @ v[..., page, :]
        of_sum, of_accum = right, right[..., None]
        if loop.page is None or loop.page == j:
            of_sum, of_accum = _wrong_factors(loop.kind, right, before - base, scale, accum.shape[-1])
        row_sum, accum = of_sum * row_sum + total, of_accum * accum + part
        if loop.kind in ("accum rescaled late", "rescaled late"):
            late = torch.where(before == -math.inf, 1.0, right)
            accum = accum * late[..., None]
            row_sum = row_sum * late if loop.kind == "rescaled late" else row_sum
    return accum, row_sum, reference.safe(row_max)


def _wrong_factors(kind: LoopFault, right, moved, scale: float, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What row_sum ``[N, Sq]`` and the accumulator ``[N, Sq, 1 or W]`` take in place of ``exp(moved)``."""
    one = torch.ones_like(right)
    power = {"factor of base 2": math.log(2), "factor twice": 2.0, "factor scaled twice": scale,
             "factor without the scale": 1 / scale if scale else 1.0}.get(kind)  # fmt: skip
    if power is not None:
        both = (moved * power).exp()
        return both, both[..., None]
    match kind:
        case "accum not rescaled":
            return right, one[..., None]
        case "row_sum not rescaled":
            return one, right[..., None]
        case "neither rescaled" | "rescaled late":
            return one, one[..., None]
        case "neighbour's factor":
            return right, right.roll(1, dims=-1)[..., None]
        case "inverse factor":
            both = (-moved).exp().nan_to_num(posinf=1.0)
            return both, both[..., None]
        case "accum overwritten":
            return right, 0 * one[..., None]
        case "row_sum overwritten":
            return 0 * one, right[..., None]
        case "accum factor twice":
            return right, right[..., None] ** 2
        case "accum rescaled late":
            return right, one[..., None]
        case "factor of a column":  # row_sum has a factor a row; the accumulator's is broadcast along the wrong side
            return right, _by_column(right, width)
        case "rescaled by warps of 8" | "rescaled by warps of 16" | "rescaled by warps of 32":
            return right, _by_warps(right, moved, int(kind.rpartition(" ")[2]))[..., None]
    raise ValueError(f"no such fault of the page loop: {kind}")


def _by_column(right: torch.Tensor, width: int) -> torch.Tensor:
    """Column d of a tile of `width` rows takes the factor of the tile's row d, where the tile is whole."""
    found = right[..., None].expand(*right.shape, width).clone()
    for first in range(0, right.shape[-1] - width + 1, width):
        found[..., first : first + width, :] = right[..., None, first : first + width]
    return found


def _by_warps(right: torch.Tensor, moved: torch.Tensor, rows: int) -> torch.Tensor:
    """1 where not every one of `rows` rows in a row needs its factor."""
    more = -right.shape[-1] % rows
    needs = torch.nn.functional.pad((right < 1).double(), (0, more), value=1.0).unflatten(-1, (-1, rows)).amin(dim=-1)
    whole = needs.repeat_interleave(rows, dim=-1)[..., : right.shape[-1]]
    return torch.where((whole > 0) | (moved == -math.inf), right, 1.0)


PART_FAULTS: tuple[LoopFault, ...] = (
    "pages averaged", "parts not weighed", "parts weighed in base 2", "parts weighed by log2",
    "parts weighed by their maximum",
)  # fmt: skip
"""Faults where parts of a row's keys are added up; they may be as long as a split of the keys leaves them."""


def _parts(seen, counts, v, columns: list[slice], kind: LoopFault) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What comes of parts that are each right, and added up by other weights than theirs."""
    found = []
    for part in columns:
        base = reference.safe(seen[..., part].amax(dim=-1))
        probs = (seen[..., part] - base[..., None]).exp() * counts[..., part]
        found.append((probs @ v[..., part, :], probs.sum(dim=-1), base))
    accums, sums, bases = (torch.stack(each) for each in zip(*found, strict=True))
    highest = bases.amax(dim=0)
    if kind == "parts not weighed":
        return accums.sum(dim=0), sums.sum(dim=0), highest
    lse = bases + sums.log()
    weight = {
        "pages averaged": lambda: torch.full_like(sums, 1 / len(found)),
        "parts weighed in base 2": lambda: torch.softmax(lse * math.log(2), dim=0),
        "parts weighed by log2": lambda: torch.softmax(lse / math.log(2), dim=0),
        "parts weighed by their maximum": lambda: torch.softmax(bases.masked_fill(sums == 0, -math.inf), dim=0),
    }[kind]()
    means = accums / sums.masked_fill(sums == 0, 1.0)[..., None]
    total = (sums * (bases - highest).exp()).sum(dim=0)
    return (weight.nan_to_num(0.0)[..., None] * means).sum(dim=0) * total[..., None], total, highest


def _carried(accum, row_sum, base, what: str, tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state of each row added to that of the row `tile` rows before it, tile after tile."""
    accum, row_sum, base = accum.clone(), row_sum.clone(), base.clone()
    for first in range(tile, row_sum.shape[-1], tile):
        now = slice(first, min(first + tile, row_sum.shape[-1]))
        then = slice(first - tile, now.stop - tile)
        top = torch.maximum(base[:, now], base[:, then])
        mine, theirs = (base[:, now] - top).exp(), (base[:, then] - top).exp()
        row_sum[:, now] = mine * row_sum[:, now] + theirs * row_sum[:, then]
        accum[:, now] *= mine[..., None]
        if what == "all":
            accum[:, now] += theirs[..., None] * accum[:, then]
        base[:, now] = top
    return accum, row_sum, base


def _bent(scores: torch.Tensor, how: str, limit: float) -> torch.Tensor:
    match how:
        case "tanh":
            return limit * torch.tanh(scores / limit)
        case "clip":
            return scores.clamp(-limit, limit)
        case "clip above":
            return scores.clamp(max=limit)
    return scores.abs()


def _scrambled(t: torch.Tensor, how: str, problem: Problem) -> torch.Tensor:
    """A tensor ``[B, H, S, D]`` whose elements were taken for those at other places."""
    batch, heads, rows, width = t.shape
    t = t.contiguous()
    match how:
        case "tile transposed":
            t = t.clone()
            for first in range(0, rows - width + 1, width):
                t[:, :, first : first + width] = t[:, :, first : first + width].mT.clone()
            return t
        case "reshaped":
            return t.view(batch, heads, width, rows).mT.contiguous()
        case "heads and rows confused":
            return t.view(batch, rows, heads, width).transpose(1, 2).contiguous()
        case "group packed" | "group unpacked":
            group = problem.num_heads_q // problem.num_heads_kv
            apart = (group, rows) if how == "group packed" else (rows, group)
            return t.view(batch, -1, *apart, width).transpose(2, 3).reshape(t.shape)
        case "rows and heads confused":
            return t.transpose(1, 2).contiguous().view(t.shape)
    return _rotated(t)


def _rotated(t: torch.Tensor) -> torch.Tensor:
    """A rotary embedding of base 10,000 over two halves of the head, from position 0."""
    half = t.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float64) / half)
    angle = torch.arange(t.shape[2], device=t.device, dtype=torch.float64)[:, None] * speed
    a, b = t[..., :half].double(), t[..., half : 2 * half].double()
    turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.cat([*turned, t[..., 2 * half :].double()], dim=-1)


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


def _as_contiguous(t: torch.Tensor) -> torch.Tensor:
    """What lies in the first elements of the tensor's memory, taken as a contiguous tensor of its shape."""
    return torch.as_strided(t, t.shape, torch.empty(t.shape, device="meta").stride(), t.storage_offset())
