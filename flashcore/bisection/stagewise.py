"""Judge the stages of a trace: what each should hold, how far off precision lets it be, and where it first is not.

Bounds
------
Twice a model of the error that the same maths makes at the backend's precision, element by element. ``u`` is float32's
unit roundoff 2^-24, ``u_d`` that of the problem's dtype and ``eta_d`` half its smallest step (float16) or its smallest
normal number (a flushed subnormal); ``g(x) = u (4x + 8)``. A float32 sum of n terms in any order is off by
``(sqrt(n) + 4) u`` of the sum of magnitudes (Higham and Mary, "A New Approach to Probabilistic Rounding Error
Analysis", SIAM J. Sci. Comput. 41, 2019). A stage that is stored in fewer bits than float32 adds the rounding of that.
Page j continues page p: the one before it, unless the trace has several chains (`flashcore.numerics.reference`).

========  =======================================================================================================
scores    ``(sqrt(D) + 4) u scale (|q| @ |k|^T)``, and under a softcap ``softcap t`` more
row_max   no error model: any reference that keeps `probs` finite and does not lose the row (`_legal_row_max`)
rescale   ``rescale (g(|row_max_p| + |row_max_j|) + u) + 2^-126``; while the chain saw no key, any finite value
probs     ``probs (g(|scores| + |row_max|) + u_d) + eta_d``
row_sum   ``(n/2 + 4) u rescale row_sum_p + (u_d + (sqrt(n) + 4) u) sum(probs) + n eta_d``
accum     ``(n/2 + 4) u rescale |accum_p| + ((u_d + (sqrt(n) + 4) u) probs + eta_d) @ |v|``
out       ``(u_d + 4 u) |out| + eta_d``
lse       ``g(|row_max| + |ln row_sum|)``
========  =======================================================================================================

What earlier pages left is added to up to n times by a kernel that sums key by key, and small terms are then rounded
away in one direction; hence n/2 and not sqrt(n) there.

Where C > 1 chains are combined, the weight of each has the error of an exponential, ``e_c = g(|row_max_c| +
|shared|)``, either sum over the chains that of C terms, ``s = (sqrt(C) + 4) u``, and a weight below 2^-126 is flushed.
With ``W = sum_c weight_c row_sum_c``, K the number of keys and V the sum of their ``|v|``, there is this much more::

    out  (sum_c (e_c + s) weight_c (|accum_c| + |out| row_sum_c) + 2^-126 (V + |out| K)) / W
    lse  (sum_c (e_c + s) weight_c row_sum_c + 2^-126 K) / W        (and its g has |shared| and |ln W|)

A sink is one more chain, whose row_max is the sink, whose row_sum is 1 and exact, and whose accum is 0. A softcap makes
no error of its argument larger, and t is that of the tanh: 2^-21, or what the backend says (`Backend.tanh_error`).

Globally the same terms travel with the dataflow: the error of `scores` enters `probs` as a relative error, that of
`probs` enters both sums, and theirs `out` and `lse`. `row_max` is the backend's own there, since any legal one may be
subtracted; so `probs`, `row_sum` and `accum` are compared at one reference, and `out` and `lse` depend on none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore.numerics import reference
from flashcore.numerics.reference import STAGES, FlatMasks, Trace
from flashcore.numerics.tolerance import TANH_ERROR, UNIT_FLOAT32, coordinates
from flashcore.problem import Problem
from flashcore.records import digits

HEADROOM = 2.0
"""Bounds are this many times the error model."""
_AXES = {
    "scores": ("head", "row", "column"), "probs": ("head", "row", "column"), "row_max": ("head", "page", "row"),
    "rescale": ("head", "page", "row"), "row_sum": ("head", "page", "row"), "accum": ("head", "page", "row", "column"),
    "out": ("head", "row", "column"), "lse": ("head", "row"),
}  # fmt: skip
_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
_ETA = {"float16": 2.0**-25, "bfloat16": 2.0**-126, "float32": 2.0**-126}
_FLUSHED = 2.0**-126
"""Smallest normal float32: kernels flush what lies below to zero."""
_LOG_MAX = {"float16": math.log(65504.0), "bfloat16": 88.0, "float32": 88.0}
"""Natural log of the largest finite prob: a reference further below the scores makes an infinity."""
_LOG_TINY = {"float16": 14 * math.log(2.0), "bfloat16": 87.0, "float32": 87.0}
"""Minus the natural log of the smallest normal prob: a reference further above the whole row loses it."""
_LOG_WEIGHT = 102 * math.log(2.0)
"""Minus the natural log of the smallest weight of a chain beside which what is flushed, 2^-126, is within rounding."""

_SCORE_UNKNOWN = 50.0
"""A score that may be off by this much (a large one stored in 16 bits) says nothing of its prob: it may be anything."""
_ANYTHING = 1e300


@dataclass
class Judgement:
    """One stage, judged against one expectation, over every element."""

    checked: int = 0
    num_bad: int = 0
    num_nan: int = 0
    num_inf: int = 0
    worst_error: float = 0.0
    """Absolute error where it is largest as a share of its bound; inf for a NaN or an infinity not expected."""
    bound: float = 0.0
    """The bound at that element."""
    first_bad: dict[str, Any] | None = None
    """In dataflow order: page, then batch, head, row, column, with `got`, `expected` and `kind` (NaN, Inf or wrong)."""
    worst: dict[str, Any] | None = None
    _worst_share: float = field(default=-1.0, repr=False)
    _shares: list[float] = field(default_factory=list, repr=False)

    @property
    def shares(self) -> list[float]:
        """Worst error of each page as a share of its bound: up to 1 passes. One figure for a stage without pages."""
        return self._shares

    @property
    def passed(self) -> bool:
        return self.num_bad == 0

    def to_dict(self) -> dict[str, Any]:
        kept = {k: v for k, v in vars(self).items() if not k.startswith("_")} | {"passed": self.passed}
        if self.passed:  # where a right stage is least exact is no finding
            del kept["worst"], kept["first_bad"]
        return kept | {"worst_error": digits(self.worst_error), "bound": digits(self.bound)}


def _relative_exp(exponent: torch.Tensor) -> torch.Tensor:
    """``g(x)``: relative error of a float32 exponential or logarithm whose argument has terms that sum to x."""
    return UNIT_FLOAT32 * (4 * exponent + 8)


class Judges:
    """Error models and comparison of one chunk of flat heads; tensors are float64, shapes as in `Trace` with [N]."""

    def __init__(
        self, mine: Trace, own: Trace, inputs, problem: Problem, head_offset: int, masks: FlatMasks | None = None,
        tanh_error: float = TANH_ERROR,
    ):  # fmt: skip
        self.mine, self.problem, self.offset = mine, problem, head_offset
        self.q, self.k, self.v = inputs
        self.pages = reference.pages(problem, own.page_size)
        self.unit, self.eta = _UNIT[problem.dtype], _ETA[problem.dtype]
        # What storing a stage costs: nothing more than float32 already counts, unless it was stored in 16 bits.
        self.stored = {s: 0.0 if getattr(own, s).dtype.itemsize >= 4 else torch.finfo(getattr(own, s).dtype).eps / 2
                       for s in STAGES}  # fmt: skip
        self.chain = reference.links(own.previous, len(self.pages))
        self.last = reference.ends(self.chain)
        self.before = reference.before_page(mine.row_max, self.chain, -math.inf)
        self.sink = (masks or FlatMasks()).sink_of_rows(slice(0, problem.seqlen_q))
        self.weights, self.shared, self.sink_weight = reference.combine_weights(mine.row_max, self.last, self.sink)
        self.cap_error = 0.0 if problem.softcap is None else problem.softcap * tanh_error

    @staticmethod
    def _sum_unit(num_terms: int) -> float:
        return (math.sqrt(num_terms) + 4) * UNIT_FLOAT32

    @staticmethod
    def _carried_unit(num_terms: int) -> float:
        return (num_terms / 2 + 4) * UNIT_FLOAT32

    def _scores_model(self, scores):
        magnitudes = self.q.abs() @ self.k.abs().transpose(-1, -2)
        model = magnitudes.mul_(self._sum_unit(self.problem.head_dim) * abs(self.problem.scale))
        rounding = self.stored["scores"] * self._finite(scores).abs()
        return model + rounding + self.cap_error + (self.eta if self.stored["scores"] else 0.0)

    @staticmethod
    def _finite(tensor):
        return tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _reference_of_columns(self):
        """|row_max_j| of each score's page, ``[N, Sq, Sk]``."""
        reach = self._finite(self.mine.row_max).abs()
        return torch.cat([reach[:, j, :, None].expand(-1, -1, p.stop - p.start) for j, p in enumerate(self.pages)], -1)

    def _probs_relative(self, scores):
        return _relative_exp(self._finite(scores).abs() + self._reference_of_columns())

    def _rescale_relative(self):
        return _relative_exp(self._finite(self.before).abs() + self._finite(self.mine.row_max).abs()) + UNIT_FLOAT32

    def _lse_model(self, total):
        return _relative_exp(self._finite(self.shared).abs() + self._finite(total.log()).abs())

    def _combined(self, sums):
        return reference.combined(sums, self.weights, self.last)

    def _total(self, row_sum):
        """The softmax denominator: the sums of all chains, and the sink."""
        total = self._combined(row_sum)
        return total if self.sink is None else total + self.sink_weight

    def _combine_models(self, row_sum, accum, out):
        """What combining several chains, or one and a sink, adds to the error of `out` and of `lse`."""
        if len(self.last) == 1 and self.sink is None:
            return 0.0, 0.0
        shared, unit = self._finite(self.shared).abs(), self._sum_unit(len(self.last) + (self.sink is not None))
        reach = self._finite(self.mine.row_max[:, self.last]).abs() + shared[:, None]
        off = self.weights * (_relative_exp(reach) + unit)
        # A flushed weight loses 2^-126 of its chain's sums. Those may be huge, after a reference far below the scores,
        # and to lose them then is an error. So it counts for sums of probs up to 1, as ordinary references leave them.
        keys, values = self.problem.seqlen_k, self.v.abs().sum(dim=1)
        picked = range(len(self.last))
        sums = reference.combined(row_sum[:, self.last].abs(), off, picked) + _FLUSHED * keys
        moved = reference.combined(accum[:, self.last].abs(), off, picked) + _FLUSHED * values[:, None]
        if self.sink is not None:
            sums = sums + self.sink_weight * (_relative_exp(self._finite(self.sink).abs() + shared) + unit)
        total = self._or_one(self._total(row_sum)).abs()
        return (moved + out.abs() * sums[..., None]) / total[..., None], sums / total

    @staticmethod
    def _or_one(total):
        """1 in place of the 0 of a row that saw no key, to divide by."""
        return total.masked_fill(total == 0, 1.0)

    def local_models(self, wanted: Trace) -> dict[str, torch.Tensor]:
        """The error model of each stage from its own inputs (the table at the top of this file)."""
        mine, u, v = self.mine, UNIT_FLOAT32, self.v.abs()
        sums, accum = torch.empty_like(mine.row_sum), torch.empty_like(mine.accum)
        for j, page in enumerate(self.pages):
            n, probs = page.stop - page.start, mine.probs[..., page].abs()
            unit = self.unit + self._sum_unit(n)
            sums[:, j] = unit * probs.sum(dim=-1) + n * self.eta
            accum[:, j] = (unit * probs + self.eta) @ v[:, page]
            if (p := self.chain[j]) >= 0:
                carried = self._carried_unit(n)
                sums[:, j] += carried * (mine.rescale[:, j] * mine.row_sum[:, p]).abs()
                accum[:, j] += carried * (mine.rescale[:, j, :, None] * mine.accum[:, p]).abs()
        more_out, more_lse = self._combine_models(mine.row_sum, mine.accum, wanted.out)
        return {
            "scores": self._scores_model(wanted.scores),
            "rescale": wanted.rescale * (self._rescale_relative() + self.stored["rescale"]) + _FLUSHED,
            "probs": wanted.probs * (self._probs_relative(mine.scores) + self.unit) + self.eta,
            "row_sum": sums + self.stored["row_sum"] * wanted.row_sum.abs(),
            "accum": accum + self.stored["accum"] * wanted.accum.abs(),
            "out": (self.unit + 4 * u) * wanted.out.abs() + self.eta + more_out,
            "lse": self._lse_model(self._total(mine.row_sum)) + more_lse,
        }

    def global_models(self, truth: Trace) -> dict[str, torch.Tensor]:
        """The same errors carried along the dataflow from Q, K and V."""
        u, v = UNIT_FLOAT32, self.v.abs()
        scores = self._scores_model(truth.scores)
        probs = truth.probs * (torch.expm1(scores) + self._probs_relative(truth.scores) + self.unit) + self.eta
        probs = probs.masked_fill(scores > _SCORE_UNKNOWN, _ANYTHING)
        moved = self._rescale_relative()
        sums, accum = torch.empty_like(truth.row_sum), torch.empty_like(truth.accum)
        # The sum of |probs * v| so far, which rounding of the sums goes by, after the newest page of each chain.
        sizes: dict[int, torch.Tensor] = {}
        for j, page in enumerate(self.pages):
            n, own = page.stop - page.start, truth.probs[..., page]
            unit = self._sum_unit(n)
            sums[:, j] = probs[..., page].sum(dim=-1) + unit * own.sum(dim=-1)
            accum[:, j] = (probs[..., page] + unit * own) @ v[:, page]
            size = torch.zeros_like(accum[:, j])
            if (p := self.chain[j]) >= 0:
                rescale, size = truth.rescale[:, j], sizes.pop(p)
                error = moved[:, j] + self._carried_unit(n)
                sums[:, j] += rescale * (sums[:, p] + error * truth.row_sum[:, p])
                accum[:, j] += rescale[..., None] * (accum[:, p] + error[..., None] * size)
                size = rescale[..., None] * size
            sizes[j] = size + own @ v[:, page]
        total, off = self._total(truth.row_sum), self._combined(sums)
        spread = (self._combined(accum) + truth.out.abs() * off[..., None]) / self._or_one(total)[..., None]
        more_out, more_lse = self._combine_models(truth.row_sum, truth.accum, truth.out)
        return {
            "scores": scores,
            "rescale": truth.rescale * (moved + self.stored["rescale"]) + _FLUSHED,
            "probs": probs,
            "row_sum": sums + self.stored["row_sum"] * truth.row_sum,
            "accum": accum + self.stored["accum"] * truth.accum.abs(),
            "out": spread + (self.unit + 4 * u) * truth.out.abs() + self.eta + more_out,
            "lse": off / self._or_one(total) + self._lse_model(total) + more_lse,
        }

    def all(self, into: dict[str, Judgement], wanted: Trace, models, scores, *, is_local: bool) -> None:
        """Judge every stage of this chunk. Locally a NaN that follows from a NaN in the inputs is no new error."""
        for stage in STAGES:
            self._record(into[stage], stage, *self._compared(stage, wanted, models, scores, is_local))

    def shares(self, stage: str, wanted: Trace, models, scores, *, is_local: bool) -> torch.Tensor:
        """Error of each element of a stage as a share of its bound, shaped as the stage: what is beyond 1 is wrong."""
        _, _, error, bound, bad = self._compared(stage, wanted, models, scores, is_local)
        found = torch.where(error == 0, 0.0, error.nan_to_num(nan=math.inf, posinf=math.inf) / bound)
        return found.masked_fill(bad & ~(found > 1), math.inf)

    def _compared(self, stage: str, wanted: Trace, models, scores, is_local: bool) -> tuple[torch.Tensor, ...]:
        """Got, expected, error, bound of each element of one stage, and whether it is bad."""
        got, expected = getattr(self.mine, stage), getattr(wanted, stage)
        if stage == "row_max":
            slack = None if is_local else HEADROOM * models["scores"]
            error, expected = self._legal_row_max(scores, slack)
            return got, expected, error, torch.zeros_like(error), ~(error <= 0)
        if stage == "rescale":
            # While the chain has seen no key the accumulator is zero, and any finite number may multiply it.
            free = (self.before == -math.inf) & got.isfinite()
            expected = torch.where(free, got, expected)
        elif stage == "probs" and is_local:
            # A prob past the largest number is the fault of the reference that was subtracted, judged above.
            spilt = (got == math.inf) & (expected > math.exp(_LOG_MAX[self.problem.dtype]))
            expected = expected.masked_fill(spilt, math.inf)
        return self._within(got, expected, models[stage], is_local)

    def _legal_row_max(self, scores, slack=None) -> tuple[torch.Tensor, torch.Tensor]:
        """How far outside the legal range each row_max lies (0 inside, NaN for NaN), and the running maximum.

        Legal is any finite number that leaves the page's probs finite and the row's largest prob a normal number of the
        dtype, and at the end of one of several chains does not make the weights of the others vanish; -inf only while
        the chain has seen no key. Where the scores themselves hold NaN or +inf none is legal, and the fault is theirs:
        such rows are not judged here. `slack` is how far each score may be off, which widens the range: the backend
        took its reference from its own scores.
        """
        tops = torch.stack([scores[..., page].amax(dim=-1) for page in self.pages], dim=1)
        running = reference.running_maximum(scores, self.pages, self.chain)
        # What a reference loses is measured against the whole row, also where chains share the row. A prob is off by
        # up to eta_d, which in the end is weighed to eta_d exp(row_max_c - top) of the row's largest term, wherever the
        # top of its own chain lies. So each chain may go as far above the top of the row as the one chain of an
        # ordinary kernel may, and no further. That may be far above its own scores; what vanishes from it then would
        # vanish from an ordinary kernel too.
        top, got = tops.amax(dim=1, keepdim=True), self.mine.row_max
        low, high = tops - _LOG_MAX[self.problem.dtype], top + _LOG_TINY[self.problem.dtype]
        if slack is not None:
            room = torch.stack([slack[..., page].amax(dim=-1) for page in self.pages], dim=1)
            low, high = low - room, high + room.amax(dim=1, keepdim=True)
            top = top + room.amax(dim=1, keepdim=True)
        outside = torch.maximum(low - got, got - high).clamp(min=0.0)
        seen = running > -math.inf
        outside = torch.where(seen, outside, torch.where(got == math.inf, math.inf, torch.zeros_like(got)))
        if len(self.last) > 1:
            outside[:, self.last] = outside[:, self.last].maximum(self._weighs_too_much(top))
        # A row that sees no key at all (top -inf) may keep any finite reference: its probs are all zero.
        outside = torch.where(seen & (got == -math.inf), math.inf, outside)
        outside = torch.where(got.isnan(), math.nan, outside)
        broken = scores.isnan().any(dim=-1) | (scores == math.inf).any(dim=-1)
        return outside.masked_fill(broken[:, None], 0.0), running

    def _weighs_too_much(self, top):
        """How far each chain's last reference lies above what leaves the others a weight, ``[N, C, Sq]``.

        The largest of them is what every chain is weighed against, also when its own chain saw no key of the row and
        has nothing to lose. The float32 weight of the chain that holds the row's `top` ``[N, 1, Sq]`` must not vanish.
        """
        over = self.mine.row_max[:, self.last] - top - _LOG_WEIGHT
        return over.clamp(min=0.0).masked_fill(top == -math.inf, 0.0)

    def add(self, into: Judgement, stage, got, expected, model, nan_is_equal: bool) -> None:
        """Judge one stage of this chunk against ``HEADROOM * model``."""
        self._record(into, stage, *self._within(got, expected, model, nan_is_equal))

    @staticmethod
    def _within(got, expected, model, nan_is_equal: bool) -> tuple[torch.Tensor, ...]:
        # Where the model is NaN only equality will do; where it is past the largest number, any finite value will.
        bound = (HEADROOM * model).nan_to_num(nan=0.0)
        same = got == expected
        if nan_is_equal:
            same |= got.isnan() & expected.isnan()
        error = (got - expected).abs().masked_fill(same, 0.0)
        good = same | ((error <= bound) & expected.isfinite())
        return got, expected, error, bound, ~good

    def _record(self, into: Judgement, stage, got, expected, error, bound, bad) -> None:
        error = error.nan_to_num(nan=math.inf, posinf=math.inf)
        count = int(bad.sum())
        into.checked += got.numel()
        share = torch.where(error == 0, 0.0, error / bound)
        shares = self._by_page(stage, share)
        into._shares = [max(pair) for pair in zip(shares, into._shares or shares, strict=True)]
        if count:
            share = share.masked_fill(~bad, -1.0)
        at = int(share.flatten().argmax())
        # A bad element always outranks one that passes, whatever chunk it is in.
        rank = float(share.flatten()[at]) if not count else math.inf
        if rank > into._worst_share:
            into._worst_share = rank
            into.worst_error, into.bound = float(error.flatten()[at]), float(bound.flatten()[at])
            into.worst = self._element(stage, at, got, expected)
        if not count:
            return
        into.num_bad += count
        into.num_nan += int((bad & got.isnan()).sum())
        into.num_inf += int((bad & got.isinf()).sum())
        first = self._element(stage, self._first(stage, bad), got, expected)
        if into.first_bad is None or _order(first) < _order(into.first_bad):
            into.first_bad = first

    def _by_page(self, stage: str, share) -> list[float]:
        """The largest value of each page, or of the whole where the stage has no pages."""
        if "page" in _AXES[stage]:
            return share.transpose(0, 1).flatten(1).amax(dim=1).tolist()
        if stage in ("scores", "probs"):
            return torch.stack([share[..., page].amax() for page in self.pages]).tolist()
        return [float(share.amax())]

    def _first(self, stage: str, bad) -> int:
        """Flat index of the first bad element in dataflow order: the lowest page, then head, row and column."""
        axes = _AXES[stage]
        if "page" in axes:
            page = int(bad.flatten(2).any(dim=2).any(dim=0).to(torch.uint8).argmax())
            only = torch.zeros_like(bad)
            only[:, page] = bad[:, page]
        elif stage in ("scores", "probs"):
            column = int(bad.flatten(0, 1).any(dim=0).to(torch.uint8).argmax())
            page = next(p for p in self.pages if p.start <= column < p.stop)
            only = torch.zeros_like(bad)
            only[..., page] = bad[..., page]
        else:
            only = bad
        return int(only.flatten().to(torch.uint8).argmax())

    def _element(self, stage: str, index: int, got, expected) -> dict[str, Any]:
        place = coordinates(index, got.shape, _AXES[stage])
        flat_head = place["head"] + self.offset
        page = place.get("page")
        if stage in ("scores", "probs"):
            page = place["column"] // (self.pages[0].stop - self.pages[0].start)
        value, truth = float(got.flatten()[index]), float(expected.flatten()[index])
        kind = "NaN" if math.isnan(value) else "Inf" if math.isinf(value) else "wrong"
        where = {
            "stage": stage, "page": page, "batch": flat_head // self.problem.num_heads_q,
            "head": flat_head % self.problem.num_heads_q, "row": place["row"], "column": place.get("column"),
        }  # fmt: skip
        return {k: x for k, x in where.items() if x is not None} | {"got": value, "expected": truth, "kind": kind}


def _order(element: dict[str, Any]) -> tuple[int, ...]:
    return tuple(element.get(axis, 0) for axis in ("page", "batch", "head", "row", "column"))
