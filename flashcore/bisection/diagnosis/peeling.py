"""Find the bugs of one function one after another: each probe shows some steps of attention and hides the others.

What a probe showed is put into a `Behaviour`, and the next probe is judged against that. So two bugs at once are both
named, as long as each has a probe that shows it alone. In the end the behaviour has to predict the wrong outputs.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flashcore.bisection.diagnosis import keeping, logsumexp, loops, naming, reading, rounding
from flashcore.bisection.diagnosis.behaviour import RIGHT, Behaviour, Loop, mask_of, simulate
from flashcore.bisection.diagnosis.calling import Broken, Candidate, Refusal
from flashcore.bisection.diagnosis.naming import Hypothesis
from flashcore.bisection.diagnosis.predicting import EXPLAINED, given_to, is_blunt, share_of
from flashcore.bisection.diagnosis.screening import Inputs, Screened
from flashcore.measure import check
from flashcore.numerics import ambient, reference
from flashcore.problem import Problem

LANES = tuple(("mod", n) for n in (2, 4, 8, 16, 32, 64)) + tuple(("block", n) for n in (2, 8, 16, 32, 64))
ROW_TILES = (64, 128, 32, 16)
LIFTS = (8.0, 12.0, 16.0, 40.0, 80.0, 100.0, 150.0, -40.0, -80.0, -110.0, -150.0)
"""What is added to all scores of a row, which may change nothing."""
PROBES = 18
"""How many there are."""
HELD, NOT_HELD = 30_000.0, 80_000.0
"""Products of Q and K that float16 holds, and does not hold."""
FLOAT16_MAX = 65_504
LADDERS = (
    (0.0, 20.0),
    (-20.0, 0.0),
    *((top - 10.0, top) for top in (30.0, 40.0, 50.0, 60.0, 70.0, 80.0, -30.0, -60.0)),
)
"""Least and largest of the scores that are compared with each other; what is 10 below the largest can still be read."""
SCRAMBLES = (
    ("out", "heads and rows confused"), ("out", "rows and heads confused"), ("q", "heads and rows confused"),
    ("k", "heads and rows confused"), ("v", "heads and rows confused"), ("out", "group packed"),
    ("out", "group unpacked"), ("q", "group packed"), ("q", "group unpacked"), ("k", "reshaped"), ("q", "reshaped"),
    ("v", "reshaped"), ("v", "tile transposed"), ("k", "tile transposed"), ("q", "tile transposed"), ("qk", "rotated"),
)  # fmt: skip
"""What is tried of elements that are taken for those at other places, and of which tensor."""


@dataclass(frozen=True)
class ProbeResult:
    """One probe: what it looked at, what it showed, what it cost."""

    name: str
    looks_at: str
    showed: str
    right: bool
    calls: int
    seconds: float


@dataclass(frozen=True)
class Suspicion:
    """Where something is wrong that no hypothesis explains."""

    stages: tuple[str, ...]
    sentence: str
    place: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peeled:
    """What came of the probes."""

    problem: Problem
    """At whose shapes the probes were made."""
    hypotheses: tuple[Hypothesis, ...]
    behaviour: Behaviour
    suspicions: tuple[Suspicion, ...]
    probes: tuple[ProbeResult, ...]
    explained: int
    wrong: int
    """Wrong elements of the failing calls, and how many of them the behaviour predicts."""
    spoiled: int
    """Right elements that it predicts wrongly."""


@ambient.judging
def peel(
    candidate: Candidate, problem: Problem, failing: list[Screened], known: Behaviour = RIGHT,
    *, told: Callable[[str, int, int], None] | None = None,
) -> Peeled:  # fmt: skip
    """Probe a function that is wrong on `failing`, at the shapes of `problem`; `known` was found at other shapes.

    `told` hears the name of each probe before it, how many there were, and how many there are at most.
    """
    return _Peeling(candidate, problem, failing, known, told).all()


@ambient.judging
def look_closer(candidate: Candidate, problem: Problem, told: Callable[[str, int, int], None] | None = None) -> Peeled:
    """Probe a function whose outputs are all within their bounds: for what bounds of ordinary inputs let pass."""
    peeling = _Peeling(candidate, problem, [], RIGHT, told)
    # What was never written may hold the right values of a call before.
    peeling.probe("memory full of NaN", "elements that are never written", peeling.unwritten)
    peeling.probe("other calls before", "what is kept between calls", peeling.earlier)
    peeling.probe("equal keys", "mask and list of keys", peeling.counts)
    peeling.probe("keys that do not exist", "padding", peeling.phantoms)
    peeling.probe("lifted scores", "subtraction of the maximum", peeling.lifted)
    peeling.probe("products past float16", "the range of scores", peeling.far)
    peeling.probe("a small number beside a large one", "precision of scores and sums", peeling.precision)
    return Peeled(
        problem, tuple(peeling.found), peeling.state, tuple(peeling.suspicions), tuple(peeling.probes), 0, 0, 0
    )


class _Peeling:
    def __init__(self, candidate: Candidate, problem: Problem, failing: list[Screened], known: Behaviour, told=None):
        self.candidate, self.problem, self.failing = candidate, problem, failing
        self.state = known
        self.told = told or (lambda *_: None)
        self.varies = False
        self.alternatives: list[Hypothesis] = []
        self.found: list[Hypothesis] = []
        self.suspicions: list[Suspicion] = []
        self.probes: list[ProbeResult] = []
        self._scores: reading.Scores | None = None
        self._bendable: Suspicion | None = None
        """What is left of wrong scores that a bend may explain."""

    # --- the order of the probes ---

    def all(self) -> Peeled:
        self.probe("the same again", "races", self.races)
        self.probe("memory full of NaN", "elements that are never written", self.unwritten)
        if not self.varies and not self.found:  # memory that nobody wrote changes from call to call
            self.probe("other calls before", "what is kept between calls", self.earlier)
        if not self.varies:
            for name, looks_at, run in (
                ("strides", "layout of memory", self.strides),
                ("marks", "heads of Q, K and V", self.marks),
                ("equal values", "columns, rows that are left out", self.columns),
                ("equal keys", "mask and list of keys", self.counts),
                ("keys that do not exist", "padding", self.phantoms),
                ("scores far below 0", "what the mask sets", self.mask_value),
                ("anchored scores", "scale, products, order of keys", self.scores),
                ("a ladder of scores", "caps and other bends", self.ladder),
                ("layouts", "order of elements in memory", self.layouts),
                ("lifted scores", "subtraction of the maximum", self.lifted),
                ("products past float16", "the range of scores", self.far),
                ("a small number beside a large one", "precision of scores and sums", self.precision),
                ("moving maximum", "rescaling from page to page", self.loop),
                ("V by itself", "P V", self.linear),
            ):
                if self.found and not self.suspicions and not self._unexplained():
                    break  # what was found predicts every wrong element: no other bug shows
                self.probe(name, looks_at, run)
        if not any(h.stages == ("lse",) for h in self.found):
            self.probe("lse", "the log-sum-exp", self.lse)
        self._prune()
        explained, wrong, spoiled = self.verify()
        return Peeled(
            self.problem,
            tuple(self.found),
            self.state,
            tuple(self.suspicions),
            tuple(self.probes),
            explained,
            wrong,
            spoiled,
        )

    def probe(self, name: str, looks_at: str, run: Callable[[], str | None]) -> None:
        before = len(self.candidate.calls)
        self.told(f"probe '{name}', which shows {looks_at}", len(self.probes), PROBES)
        try:
            showed = run()
        except Refusal as refusal:
            showed = f"refused: {refusal}"
        except (ArithmeticError, torch.linalg.LinAlgError) as error:  # outputs that no reading makes sense of
            showed = f"nothing that could be read: {error}"
        except Broken as broken:
            showed = broken.sentence
            self.suspicions.append(Suspicion((), broken.sentence))
        calls = self.candidate.calls[before:]
        self.probes.append(
            ProbeResult(name, looks_at, showed or "nothing wrong", showed is None, len(calls), sum(calls))
        )

    def add(self, hypothesis: Hypothesis) -> str:
        changes = {k: v.to(self.candidate.device) if isinstance(v, torch.Tensor) else v
                   for k, v in hypothesis.changes.items()}  # fmt: skip
        self.state = self.state.with_(**changes)
        self.found.append(hypothesis)
        return hypothesis.sentence

    # --- probes ---

    def marks(self) -> str | None:
        problem = self.problem
        if problem.batch * problem.num_heads_q == 1:
            return None
        found = reading.read_marks(self.candidate, problem)
        said = []
        marks = {"Q": found.q, "K": found.k, "V": found.v}
        written = naming.of_output(marks, problem)
        if written:
            return self.add(written)
        for what, table in marks.items():
            hypothesis = None if table is None else naming.of_heads(what, table, problem)
            if hypothesis:
                said.append(self.add(hypothesis))
        return "; ".join(said) or None

    def columns(self) -> str | None:
        """All keys have the same V, so the output is that row, whatever the weights are."""
        rounded = rounding.rounded_output(self.candidate, self.failing) or (
            rounding.rounded_values(self.candidate, self.problem)
        )
        if rounded:
            return self.add(rounded)
        nothing, got, row = reading.read_columns(self.candidate, self.problem)
        added = naming.of_nothing(nothing, self.problem)
        if added:
            return self.add(added)
        seen = mask_of(self.problem, got.device).sum(dim=-1) > 0
        named = naming.of_columns(got, row, seen, self.problem)
        if named:
            return "; ".join([self.add(one) for one in named])
        return self._sums(got / row, seen)

    def _sums(self, ratio: torch.Tensor, seen: torch.Tensor) -> str | None:
        """Weights that add up to another number in each row: by what is in row_sum besides."""
        by_row = ratio[:, seen].median(dim=-1).values
        slack = 4.0 * torch.finfo(reading.dtype_of(self.problem)).eps
        if not bool(by_row.isfinite().all()) or bool(((by_row - 1).abs() <= slack).all()):
            return None
        q, k, v = Inputs(self.problem).make(self.candidate.device)
        tried = (
            [
                Hypothesis(
                    "hidden keys in row_sum",
                    "the mask is applied after the softmax: keys that it hides still count in row_sum",
                    ("row_sum", "probs"),
                    {"hidden_in_sum": True},
                )
            ]
            if self.problem.causal
            else []
        )
        scores = reference_scores(q, k, self.problem)
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
            state = self.state.with_(**one.changes)
            wanted = simulate(q, k, torch.ones_like(v), self.problem, state)[0][..., 0].flatten(0, 1)[:, seen]
            if bool(((by_row - wanted).abs() <= slack * (1 + wanted)).all()):
                return self.add(one)
        return None

    def ladder(self) -> str | None:
        """Scores from -20 to 20, in the last row: what they become beside each other."""
        if self.suspicions and not self._bendable:
            return None
        read = []
        for low, high in LADDERS:
            levels = torch.linspace(low, high, 11, dtype=torch.float64)
            found = reading.read_ladder(self.candidate, self.problem, levels)
            if found is None:
                continue
            logs = found.masked_fill(~(found > 3e-5), math.nan).log()
            if self.state.q_heads is None and float((logs - logs[:1]).abs().nan_to_num(0.0).max()) > 0.1:
                return None  # heads differ, which is another bug
            read.append((levels, logs.nanmedian(dim=0).values.cpu() / self.state.scale_factor))
        bent = naming.of_ladder(read) if read else None
        if bent is None:
            return None
        if self._bendable is not None:
            self.suspicions.remove(self._bendable)
            self._bendable = None
        return self.add(bent)

    def layouts(self) -> str | None:
        """Elements of Q, K, V or the output that are taken for those at other places: tried by simulation."""
        left = [s for s in self._unexplained() if not is_blunt(s, self.candidate)]
        if not left:
            return None
        one = min(left, key=lambda s: (s.inputs.pattern != "normal", s.inputs.strided))
        given, problem = given_to(one, self.candidate), one.inputs.problem
        for how, times in (("the scale", 1.0), ("the scale and log2(e)", 1 / math.log(2))):
            predicted = simulate(*given, problem, self.state.with_(q_rounded=times))[0]
            if problem.dtype != "float32" and share_of(one.answer.out, predicted, one, self.candidate)[0] >= EXPLAINED:
                words = f"Q is multiplied by {how} and rounded to {problem.dtype} before the products"
                return self.add(Hypothesis("scaled Q in 16 bits", words, ("scores",), {"q_rounded": times}))
        for name, how in SCRAMBLES:
            told = Behaviour(scrambled=(("q", how), ("k", how)) if name == "qk" else ((name, how),))
            predicted = simulate(*given, problem, told)[0]
            if share_of(one.answer.out, predicted, one, self.candidate)[0] < EXPLAINED:
                continue
            self.found.clear()  # pieces of it that were seen one by one
            self.suspicions.clear()
            self.state = RIGHT
            words, stages = _layout_words(name, how, problem)
            return self.add(Hypothesis("elements at other places", words, stages, {"scrambled": told.scrambled}))
        return None

    def counts(self) -> str | None:
        found = reading.read_counts(self.candidate, self.problem, self.state.columns)
        wanted = mask_of(self.problem, self.candidate.device)
        rows = wanted.sum(dim=-1) > 0
        total = found.total[:, rows]
        if bool(total.isnan().any()):
            where = total.isnan().nonzero()[0].tolist()
            head = self._head(where[0])
            everywhere = bool(found.total.isnan().all())
            words = "every element is NaN" if everywhere else f"{int(total.isnan().sum())} rows are NaN"
            stages, why = self._stages_of_nan()
            self.suspicions.append(Suspicion(stages, f"{words} even when all scores are 0 and V is 0 or 1{why}", head))
            return words
        if bool(found.total[:, ~rows].isnan().any()):
            self.suspicions.append(Suspicion(
                ("rescale", "probs", "row_sum", "out"), "rows that see no key give NaN where 0 is meant: "
                "-inf minus -inf, or 0 / 0", {"row": int((~rows).nonzero()[0])},
            ))  # fmt: skip
        if not found.clear:
            biased = naming.of_bias(found.counts.log(), self.problem)
            if self._weighs_so(biased):
                return self.add(biased)
            self.suspicions.append(self._unclear(found.counts, wanted))
            return self.suspicions[-1].sentence
        if not bool(found.total[:, rows].any()):
            words = "every element is 0, also where V is 1"
            self.suspicions.append(Suspicion(("scores", "probs", "accum", "out"), words))
            return words
        said = []
        self.alternatives = naming.of_counts(found.counts[:, rows], self.problem) if rows.all() else naming.of_counts(
            found.counts.masked_fill(~rows[:, None], 0.0), self.problem)  # fmt: skip
        gone = naming.of_values_gone(found.counts, found.extra, self.problem)
        if gone:
            self.alternatives = []
            return self.add(gone)
        if self.alternatives:
            said.append(self.add(self.alternatives[0]))
        extra = naming.of_extra(found.extra, self.problem)
        keys = found.counts.sum(dim=-1)[:, rows]
        if bool(((total / keys - 1).abs() < 0.01).all()) and bool((keys > 1).any()):
            said.append(self.add(Hypothesis("not normalised", "the output is not divided by row_sum: the weights of a "
                                            f"row add up to {float(total.max()):.4g} when all scores are 0", ("out",),
                                            {"normalised": False})))  # fmt: skip
        elif extra:
            said.append(self.add(extra))
        elif bool(((total - 1).abs() > 8 * torch.finfo(reading.dtype_of(self.problem)).eps + 1e-4).any()):
            worst = (total - 1).abs().flatten().argmax().item()
            place = {**self._head(worst // total.shape[1]), "row": int(worst % total.shape[1])}
            self.suspicions.append(Suspicion(("row_sum",), "the weights of a row do not add up to 1 when all scores "
                                             f"are 0: {float(total.flatten()[worst]):.4g}", place))  # fmt: skip
            said.append(self.suspicions[-1].sentence)
        return "; ".join(said) or None

    def _weighs_so(self, hypothesis: Hypothesis) -> bool:
        """Whether it predicts weights of anchored inputs too, and not those alone that it was read from."""
        found = reading.read_scores(self.candidate, self.problem, self.state.k_heads, self.state.columns)
        return found is not None and self.disagreement(found, self.state.with_(**hypothesis.changes)) <= 0.02

    def _unclear(self, counts, wanted) -> Suspicion:
        """Weights that are no multiple of a unit, though all scores are 0: beside the usual weight of their row."""
        seen = (wanted > 0).expand(counts.shape)
        usual = counts.masked_fill(~seen, math.nan).nanmedian(dim=-1, keepdim=True).values
        off = (~((counts / usual - 1).abs() < 0.01)) & seen
        place = self._place(off.flatten().to(torch.uint8).argmax().item(), counts.shape)
        one = float((counts / usual).flatten()[off.flatten().to(torch.uint8).argmax()])
        words = (f"{int(off.sum()):,} of {int(seen.sum()):,} keys have another weight than the keys of equal score "
                 f"beside them, the first {one:.3g} times theirs")  # fmt: skip
        return Suspicion(("scores", "probs", "accum"), words, place)

    def phantoms(self) -> str | None:
        if self.state.extra is not None or self.state.counts is not None:
            return None
        found = reading.read_phantoms(self.candidate, self.problem)
        if found is None:
            return None
        median = found.median(dim=0).values
        hypothesis = naming.of_extra(torch.where(median.abs() > 0.5, median, 0.0), self.problem)
        return self.add(hypothesis) if hypothesis else None

    def mask_value(self) -> str | None:
        """What a hidden key scores: keys that are seen are taken far below it, until hidden ones outweigh them."""
        problem = self.problem
        if not problem.causal or self.state.counts is not None or self.candidate.rounds_scores:
            return None
        depths = (20.0, 60.0, 200.0, 2e3, 2e4, 2e5)
        found = [reading.read_hidden(self.candidate, problem, depth) for depth in depths]
        above = next((depth for depth, weight in zip(depths, found, strict=True) if weight and weight > 0.5), None)
        if above is None:
            return None
        low, high = max((d for d in depths if d < above), default=0.0), above
        for _ in range(24):  # half of the weight is where hidden and seen keys score alike, up to their numbers
            middle = (low + high) / 2
            weight = reading.read_hidden(self.candidate, problem, middle) or 0.0
            low, high = (low, middle) if weight > 0.5 else (middle, high)
            if high - low < 1e-3 * high:
                break
        seen = mask_of(problem, self.candidate.device)[0]
        level = -(low + high) / 2 - math.log(float((seen == 0).sum() / seen.sum()))
        near = next((n for n in (-1e4, -1e5, -1e3, -100.0, -50.0, -30.0, -20.0) if abs(level / n - 1) < 0.01), level)
        words = f"hidden keys get a score of {near:g} where -inf is meant, and outweigh keys whose scores lie below it"
        return self.add(Hypothesis("mask too small", words, ("scores",), {"masked_score": near}))

    def scores(self) -> str | None:
        found = self._scores = reading.read_scores(self.candidate, self.problem, self.state.k_heads, self.state.columns)
        if found is None:
            return None
        if self.agrees(found, self.state):
            # A constant in few digits leaves each weight within what its own rounding may be.
            factor = naming.of_factor(found.factor, self.problem) if self.failing else None
            return self.add(factor) if factor and self._explain_most(factor) else None
        tried: list[tuple[float, list[Hypothesis], Behaviour]] = []

        def consider(hypotheses: list[Hypothesis], base: Behaviour) -> None:
            changes: dict[str, Any] = {}
            for one in hypotheses:
                changes |= {
                    k: v.to(found.q.device) if isinstance(v, torch.Tensor) else v for k, v in one.changes.items()
                }
            behaviour = base.with_(**changes)
            tried.append((self.disagreement(found, behaviour), hypotheses, behaviour))

        bases = [([], self.state)]
        if self.state.counts is not None:
            bases.append(([], self._without_counts()))
        for other in self.alternatives[1:]:
            bases.append(([other], self._without_counts().with_(**other.changes)))
        factor = naming.of_factor(found.factor, self.problem)
        for extra, base in bases:
            consider(extra, base)
            if factor:
                consider([*extra, factor], base)
            for more in ([], [factor]) if factor else ([],):
                for one in (*self._row_hypotheses(found, base, more), *self._order_hypotheses(found, base, more)):
                    consider([*extra, *more, one], base)
            for lanes in LANES:
                consider([*extra, Hypothesis("maximum not reduced over lanes", "each lane keeps a maximum of its own "
                          f"({_lane_words(lanes)}) and their sums are added as they are", ("probs", "row_max"),
                          {"lanes": lanes})], base)  # fmt: skip
        if min(t[0] for t in tried) > 0.02:
            small = reading.read_small(self.candidate, self.problem, self.state.columns)
            order = reading.order_of(small)
            if order is not None and bool((order != torch.arange(len(order), device=order.device)).any()):
                rest = torch.arange(len(order), self.problem.seqlen_k, device=order.device)
                consider([naming.of_order(torch.cat([order, rest]), self.problem, "K")], self.state)
            metric = reading.metric_of(small, self.problem)
            hypothesis = None if metric is None else naming.of_metric(metric, self.problem)
            if hypothesis:
                consider([hypothesis], self.state)
        if min(t[0] for t in tried) > 0.02:
            for one in naming.of_slopes(reading.slopes(found, self.problem, self.state.k_heads), self.problem):
                consider([one], self.state)
        best = min(tried, key=lambda t: (t[0] > 0.02, len(t[1]) if t[0] <= 0.02 else 0, t[0]))
        if best[0] <= 0.02 and best[1]:
            if (
                self.alternatives
                and self.alternatives[0] in self.found
                and any(h in self.alternatives for h in best[1])
            ):
                self.found.remove(self.alternatives[0])
            if best[2].counts is None and self.alternatives and self.alternatives[0] in self.found:
                self.found.remove(self.alternatives[0])
            self.found.extend(best[1])
            self.state = best[2]
            return "; ".join(h.sentence for h in best[1])
        rounded = rounding.rounded_weights(found, self.problem, self.state)
        if rounded:
            return self.add(rounded)
        before = len(self.suspicions)
        words = self._unnamed_scores(found)
        self._bendable = self.suspicions[before] if len(self.suspicions) > before else None
        return words

    def _without_counts(self) -> Behaviour:
        return self.state.with_(counts=None)

    def _row_hypotheses(self, found: reading.Scores, base: Behaviour, more: list[Hypothesis]) -> Iterator[Hypothesis]:
        """Rows whose weights are those of another row, the same one in every head."""
        changes: dict[str, Any] = {}
        for one in more:
            changes |= one.changes
        wanted = reading.simulated_weights(found.q, found.k, self.problem, base.with_(**changes, q_rows=None))
        got = found.weights
        if not bool(got.isfinite().all()) or self.problem.seqlen_q < 2:
            return
        distance = torch.cdist(got.transpose(0, 1).flatten(1), wanted.transpose(0, 1).flatten(1))
        named = naming.of_rows(distance.argmin(dim=-1))
        if named:
            yield named

    def _order_hypotheses(self, found: reading.Scores, base: Behaviour, more: list[Hypothesis]) -> Iterator[Hypothesis]:
        """K or V rows at other places: each row's weights beside those that another key would have."""
        problem = self.problem
        changes: dict[str, Any] = {}
        for one in more:
            changes |= one.changes
        plain = base.with_(**changes)
        wanted = reading.simulated_weights(found.q, found.k, problem, plain.with_(counts=None, v_of=None, k_of=None))
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
                yield naming.of_order(k_of, problem, "K")
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
                yield naming.of_order(v_of, problem, "V")

    def _unnamed_scores(self, found: reading.Scores) -> str:
        wanted = reading.simulated_weights(found.q, found.k, self.problem, self.state)
        if not self._lse_tells() and float((found.weights > 0).double().mean()) < 0.999 * float(
            (wanted > 0).double().mean()
        ):
            bad = self._bad_weights(found.weights, wanted)
            place = self._place(bad.flatten().to(torch.uint8).argmax().item(), bad.shape)
            self.suspicions.append(Suspicion(("scores", "probs"), "keys that count have no weight", place))
            return self.suspicions[-1].sentence
        return self._suspect(found.weights, wanted, "weights are not those of q k")

    def _suspect(self, found: torch.Tensor, wanted: torch.Tensor, otherwise: str) -> str:
        """Say where weights go wrong that no hypothesis explains: even by row, by page, or neither."""
        bad = self._bad_weights(found, wanted)
        place = self._place(bad.flatten().to(torch.uint8).argmax().item(), bad.shape)
        slack = 2 * reading.tolerance(self.problem)
        ratio = (found / wanted).masked_fill(wanted < torch.finfo(torch.float16).tiny, math.nan)
        by_row = ratio.nanmedian(dim=-1, keepdim=True).values
        even = ((ratio / by_row - 1).abs() <= slack) | ratio.isnan()
        sums = bool(((found.sum(dim=-1) - 1).abs() > slack)[wanted.sum(dim=-1) > 0.5].any())
        if self._lse_tells():
            stages: tuple[str, ...] = ("probs", "accum", "out")
            why = (
                f"{int(bad.sum()):,} of {bad.numel():,} weights are wrong, and lse is right: the sums of P V are wrong"
            )
        elif bool(even.all()):
            stages, why = ("row_sum",), "the weights of a row are right beside each other, and do not add up to 1"
        elif bool(((found == 0) & bad).sum() > 0.9 * bad.sum()) and not bool((found[bad & (wanted < 0.5)] > 0).any()):
            level = float((wanted / wanted.amax(dim=-1, keepdim=True))[bad].max())
            stages, why = ("probs",), f"weights below about {level:.2g} of the largest of their row become 0"
        elif _even_by_page(ratio, bad, self.problem):
            stages = ("rescale", "probs", "accum") if sums else ("rescale", "probs", "out")
            why = "weights are off by one factor a page: pages, or chains of pages, are weighed by another reference"
        else:
            stages, why = ("scores", "probs"), f"{int(bad.sum()):,} of {bad.numel():,} {otherwise}"
        self.suspicions.append(Suspicion(stages, why, place))
        return why

    def _lse_tells(self) -> bool:
        """Whether lse is right in every call whose output is wrong: then scores and row_sum are right too."""
        wrong = [s for s in self.failing if s.out_wrong and s.lse is not None]
        return bool(wrong) and all(s.lse.passed for s in wrong)

    def _stages_of_nan(self) -> tuple[tuple[str, ...], str]:
        """Where a NaN may come from that shows in the output; what lse says of it."""
        wrong = [s for s in self.failing if s.out_wrong and s.lse is not None]
        if not wrong:
            return ("scores", "probs", "accum", "out"), ""
        if self._lse_tells():
            return ("accum", "out"), ", and lse is right"
        return ("scores", "row_max", "rescale", "probs", "row_sum"), ", and lse is wrong as well"

    def lifted(self) -> str | None:
        problem, device = self.problem, self.candidate.device
        if problem.scale == 0 or abs(150 / problem.scale) > 3e4 or self.candidate.rounds_scores:
            return None
        q, k = reading.anchored(problem, device, 0.125)
        v = check.make_case(problem, 1, "normal", "bhsd", device).v
        k = k.clone()
        base = k[..., 0].clone()
        failed: dict[float, str] = {}
        for lift in (0.0, *LIFTS):
            k[..., 0] = (base.float() + lift / problem.scale).to(k.dtype)
            got = self.candidate(q, k, v, problem).out.double()
            wanted = simulate(q, k, v, problem, self.state)[0]
            bad = ~((got - wanted).abs() <= 0.05 + 0.05 * wanted.abs()) & wanted.isfinite()
            if bool(bad.any()):
                if lift == 0.0:
                    return None  # it is wrong without a lift too, which other probes look into
                gone = bad & (got.abs() < 1e-3 * wanted.abs())
                vanished = bool(gone.sum() > 0.5 * bad.sum())
                nan, inf = bool(got.isnan().any()), bool(got.isinf().any())
                failed[lift] = "NaN" if nan else "Inf" if inf else "vanished" if vanished else "wrong"
        if not failed:
            return None
        up = min((x for x in failed if x > 0), default=None)
        if up is not None and failed[up] in ("NaN", "Inf"):
            dtype = "float16" if up <= 16 else "float32"
            words = (f"no maximum is subtracted before exp: rows whose scores are near {up:g} give {failed[up]} "
                     f"(exp in {dtype} overflows)")  # fmt: skip
            return self.add(Hypothesis("no maximum subtracted", words, ("row_max", "probs"), {"no_max": dtype}))
        down = max((x for x in failed if x < 0), default=None)
        if up is None and failed[down] == "vanished":
            words = (f"rows whose scores are near {down:g} vanish: the reference that is subtracted, or that of a part "
                     "without keys, is 0 or higher")  # fmt: skip
            self.suspicions.append(Suspicion(("row_max", "out"), words))
            return words
        if up is None or failed[up] == "wrong":
            return None  # scores of that size may be rounded too much, which the probe of precision looks into
        words = f"adding {up:g} to all scores of a row makes its result vanish, which it may not"
        self.suspicions.append(Suspicion(("row_max", "scores"), words))
        return words

    def far(self) -> str | None:
        """Products of Q and K that float16 does not hold, beside some that it holds."""
        problem = self.problem
        if problem.head_dim < 2 or problem.seqlen_k < 2 or self.state.no_max is not None:
            return None
        near, found = (reading.read_far(self.candidate, problem, product) for product in (HELD, NOT_HELD))
        if near is None or found is None:
            return None
        seen = mask_of(problem, found.device) > 0
        rows = seen[:, ::2].any(dim=-1) & seen[:, 1::2].any(dim=-1)
        if not bool(rows.any()):
            return None
        if not bool(((near[:, rows, 0] - 1).abs() <= 0.01).all()):
            smallest = Hypothesis(
                "maximum before a negative scale", "the maximum is taken before a negative scale turns the order of "
                "the scores round, so that exp overflows", ("row_max", "probs"), {"smallest": True},
            )  # fmt: skip
            if problem.scale < 0 and bool((~near[:, rows].isfinite()).any()) and self._explain_most(smallest):
                return self.add(smallest)
            return None  # it is wrong without an overflow too, which other probes look into
        even, odd = found[:, rows, 0], found[:, rows, 1]
        if bool(((even - 1).abs() <= 0.01).all()):
            return None
        place = {"row": int(rows.nonzero()[0])}
        if bool((~even.isfinite()).any()):
            return self.add(Hypothesis(
                "scores in 16 bits", f"products of Q and K past {FLOAT16_MAX} become infinite: scores are kept in "
                "float16 before they are scaled", ("scores",), {"scores_rounded": True}, place))  # fmt: skip
        if bool(((even == 0) & (odd == 0)).any()):
            words = (f"rows with products of Q and K past {FLOAT16_MAX} become 0: scores are kept in float16 before "
                     "they are scaled, and the NaN of an overflow is hidden")  # fmt: skip
            return self.add(Hypothesis("scores in 16 bits", words, ("scores",), {"scores_rounded": True}, place))
        if bool((odd > 0.01).any()):
            words = (f"scores that float16 does not hold (products of Q and K past {FLOAT16_MAX}) are set to 0, so "
                     "that the largest keys of a row count like any other")  # fmt: skip
            return self.add(Hypothesis("overflow set to 0", words, ("scores",), {"overflow": 0.0}, place))
        words = f"keys whose products with Q are past {FLOAT16_MAX} lose their weight"
        self.suspicions.append(Suspicion(("scores", "probs"), words, place))
        return words

    def _explain_most(self, hypothesis: Hypothesis) -> bool:
        """Whether it predicts most of the wrong elements, where there are calls to judge by."""
        before, self.state = self.state, self.state.with_(**hypothesis.changes)
        explained, wrong, _ = self.verify()
        self.state = before
        return explained > 0.5 * wrong

    def precision(self) -> str | None:
        """Sums and scores that need more than 16 bits, made so that 32 bits hold them exactly.

        Each has a control of the same kind that 16 bits hold as well: a function that fails it is wrong otherwise.
        """
        if self.suspicions:
            return None
        problem = self.problem
        fitting = [s for s in self.failing if self._fits_shape(s.inputs.problem)]
        if rounding.far_off(self.candidate, fitting, self.state) or any(h.by_rounding for h in self.found):
            return None
        said = []
        if problem.seqlen_k >= 32 and self._sums_wrong(4096.0) and not self._sums_wrong(16.0):
            said.append(self._precise("accumulation in 16 bits", "sums of P V are kept in 16 bits (or in less than "
                                      "float32): 4096 + 1 loses the 1", ("accum",)))  # fmt: skip
        plain = problem.scale != 0 and problem.head_dim >= 2 and self.state.no_max is None
        if plain and not self.candidate.rounds_scores and self._scores_wrong(2048.0) and not self._scores_wrong(16.0):
            rounded = Hypothesis("scores in 16 bits", "", ("scores",), {"scores_rounded": True})
            sharp = [s for s in self.failing if s.out_wrong and not is_blunt(s, self.candidate)]
            if sharp and not self._explain_most(rounded):
                return "; ".join(said) or None
            said.append(self._precise("scores in 16 bits", "scores are rounded to 16 bits before the softmax: 2048 and "
                                      "2049 times the scale become the same", ("scores",),
                                      {"scores_rounded": True}))  # fmt: skip
        if not said and not any(h.by_rounding for h in self.found) and self.failing:
            rounded = None if self._scores is None else rounding.rounded_weights(self._scores, self.problem, self.state)
            rounded = rounded or rounding.rounded_sums(self.candidate, self.problem)
            if rounded:
                said.append(self.add(rounded))
        return "; ".join(said) or None

    def _sums_wrong(self, large: float) -> bool:
        """Whether the last row's sum of V is wrong where `large` and its negative stand beside a few ones."""
        problem, device = self.problem, self.candidate.device
        q, k, v = (torch.zeros_like(t) for t in Inputs(problem).make(device))
        keys = problem.seqlen_k
        ones = (torch.rand(keys, generator=torch.Generator().manual_seed(7)) < 0.05).double()
        ones[0], ones[-1] = large, -large
        v[:] = ones.to(device=device, dtype=v.dtype)[:, None]
        got = self.candidate(q, k, v, problem).out.double()[:, :, -1]
        wanted = simulate(q, k, v, problem, self.state)[0][:, :, -1]
        slack = 0.25 / keys + 4 * torch.finfo(v.dtype).eps * wanted.abs()
        return not bool(((got - wanted).abs() <= slack).all())

    def _scores_wrong(self, large: float) -> bool:
        """Whether weights are wrong where scores are `large` and `large` + 1, times the scale."""
        problem = self.problem
        step = abs(math.expm1(problem.scale))
        if step < 4e-3:
            return False
        q, k, _ = (torch.zeros_like(t) for t in Inputs(problem).make(self.candidate.device))
        q[..., 0] = q[..., 1] = 1.0
        k[..., 0] = large
        k[:, :, 1::2, 1] = 1.0
        found = reading.weights(self.candidate, q, k, problem, self.state.columns)
        wanted = reading.simulated_weights(q, k, problem, self.state)
        slack = (0.2 * min(step, 1.0) + reading.tolerance(problem)) * wanted
        return not bool(((found - wanted).abs() <= slack).all())

    def _precise(self, name: str, sentence: str, stages: tuple[str, ...], changes: dict | None = None) -> str:
        return self.add(Hypothesis(name, sentence, stages, changes or {}, by_rounding=True))

    def strides(self) -> str | None:
        plain = {s.inputs for s in self.failing if not s.inputs.strided}
        only = [s for s in self.failing if s.inputs.strided and replace(s.inputs, strided=False) not in plain]
        for one in only:
            if one.answer is None:
                continue
            # In an order without gaps, so that all that is read in a wrong order is known.
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in one.inputs.make(self.candidate.device))
            out = self.candidate(q, k, v, one.inputs.problem).out
            predicted = simulate(q, k, v, one.inputs.problem, self.state.with_(strides_ignored=True))[0]
            words = "strides are ignored: inputs that are not contiguous are read as if they were"
            if share_of(out, predicted, one, self.candidate)[0] >= EXPLAINED:
                return self.add(Hypothesis("strides ignored", words, ("scores",), {"strides_ignored": True}))
            self.suspicions.append(self._strided_alone(one))
            return self.suspicions[-1].sentence
        return None

    def _strided_alone(self, one: Screened) -> Suspicion:
        """Which of Q, K and V gives a wrong result when it alone lies in memory as ``[B, S, H, D]``."""
        case = one.inputs.case(self.candidate)
        wrong = []
        for place, name in enumerate("qkv"):
            given = [t.contiguous() for t in (case.q, case.k, case.v)]
            given[place] = given[place].transpose(1, 2).contiguous().transpose(1, 2)
            out = self.candidate(*given, one.inputs.problem).out.double()
            if not bool(((out - case.out).abs() <= case.out_atol + case.out_rtol * case.out.abs()).all()):
                wrong.append(name.upper())
        stages = tuple(dict.fromkeys("accum" if name == "V" else "scores" for name in wrong)) or ("scores", "accum")
        which = f"; {' or '.join(wrong)} alone is enough" if wrong else ""
        return Suspicion(stages, f"only inputs that are not contiguous give a wrong result{which}")

    def unwritten(self) -> str | None:
        inputs = self.failing[0].inputs if self.failing else Inputs(self.problem)
        q, k, v = inputs.make(self.candidate.device)
        filled, plain, lse_of = [], [], []
        for _ in range(2):
            with full_of_nan():
                answer = self.candidate(q, k, v, inputs.problem)
            filled.append(answer.out.isnan())
            lse_of.append(None if answer.lse is None else answer.lse.isnan())
            for _ in range(3):  # what lies in memory that is handed out next is no NaN then
                primed = [torch.full_like(q, 0.5) for _ in range(4)]
                primed += [
                    q.new_full((q.numel() * n,), 0.5, dtype=torch.float32) for n in (1, 2, 3, 4, 8)
                ]  # workspaces
                del primed
            answer = self.candidate(q, k, v, inputs.problem)
            plain.append(answer.out.isnan())
            lse_of.append(None if answer.lse is None else answer.lse.isnan())
        fresh = filled[0] & ~plain[0]
        if bool((filled[0] != filled[1]).any()):  # a race, not this
            return None
        if not bool(fresh.any()):
            return self._unwritten_lse(lse_of)
        rows = fresh.any(dim=-1).flatten(0, 1).any(dim=0).nonzero().flatten().tolist()
        place = dict(zip(("batch", "head", "row", "column"), fresh.nonzero()[0].tolist(), strict=True))
        words = (f"{int(fresh.sum())} elements of the output come from memory that was never written: rows "
                 f"{naming._ranges(rows)}")  # fmt: skip
        columns = fresh.flatten(0, 2).any(dim=0).nonzero().flatten().tolist()
        heads = fresh.flatten(0, 1).flatten(1).any(dim=-1)
        if len(columns) < fresh.shape[-1]:
            words += f", columns {naming._ranges(columns)}"
        if not bool(heads.all()):
            words += f", of {int(heads.sum())} of {len(heads)} heads"
        changes = {"unwritten": fresh.flatten(0, 1)}
        return self.add(Hypothesis("uninitialised memory", words, ("out",), changes, place))

    def earlier(self) -> str | None:
        found = keeping.kept_between_calls(self.candidate, self.problem, self.state)
        self.varies = self.varies or found is not None
        return self.add(found) if found else None

    def _unwritten_lse(self, seen: list[torch.Tensor | None]) -> str | None:
        """The same of lse: NaN where memory is full of it, each time, and no NaN otherwise."""
        if any(one is None for one in seen):
            return None
        fresh = seen[0] & seen[2] & ~seen[1]
        if not bool(fresh.any()):
            return None
        rows = fresh.flatten(0, 1).any(dim=0).nonzero().flatten().tolist()
        place = dict(zip(("batch", "head", "row"), fresh.nonzero()[0].tolist(), strict=True))
        words = (f"{int(fresh.sum())} elements of lse come from memory that was never written: rows "
                 f"{naming._ranges(rows)}")  # fmt: skip
        return self.add(Hypothesis("uninitialised memory", words, ("lse",), {}, place))

    def races(self) -> str | None:
        if all(s.repeats for s in self.failing) and not self._varies():
            return None
        if self._varies_when_zeroed():
            words = "the same call gives other results each time: a race, or memory that is read before it is written"
        else:
            return None  # memory that nobody wrote: the next probe names it
        self.varies = True
        self.suspicions.append(Suspicion(("scores", "probs", "accum", "out"), words, self._where_it_varies()))
        return words

    def _varies_when_zeroed(self) -> bool:
        """Whether results still vary when no memory is handed out uninitialised."""
        with full_of_nan():
            return self._varies()

    def _where_it_varies(self) -> dict[str, int]:
        one = self.failing[0]
        q, k, v = one.inputs.make(self.candidate.device)
        for _ in range(5):
            now = self.candidate(q, k, v, one.inputs.problem, default_scale=one.inputs.default_scale).out
            other = (now != one.answer.out) & ~(now.isnan() & one.answer.out.isnan())
            if bool(other.any()):
                return dict(zip(("batch", "head", "row", "column"), other.nonzero()[0].tolist(), strict=True))
        return {}

    def _varies(self) -> bool:
        if not self.failing or self.failing[0].answer is None:
            return False
        inputs = self.failing[0].inputs
        q, k, v = inputs.make(self.candidate.device)
        first = self.candidate(q, k, v, inputs.problem, default_scale=inputs.default_scale).out
        scale = max(float(first.nan_to_num(0).abs().max()), 1e-6)
        for _ in range(3):
            now = self.candidate(q, k, v, inputs.problem, default_scale=inputs.default_scale).out
            if bool(((now - first).abs().nan_to_num(0) > 0.01 * scale).any()):
                return True
        return False

    def loop(self) -> str | None:
        """Faults of the page loop, tried on a failing call that nothing explains so far."""
        if any(not s.stages or not s.place for s in self.suspicions) or any(h.by_rounding for h in self.found):
            return None  # nothing that pages could explain
        left = [s for s in self._unexplained() if s.inputs.problem.seqlen_k > min(loops.LOOP_SIZES)]
        if not left:
            return None
        sharp = [s for s in left if not is_blunt(s, self.candidate)]
        if not sharp:
            return self._unnamed_loop(left[0])
        left = sharp
        one = min(left, key=lambda s: (s.inputs.pattern not in ("rising", "normal"), s.inputs.problem.seqlen_k))
        q, k, v = given_to(one, self.candidate)
        problem = one.inputs.problem
        small = self._first_group(problem, q, k, v, one)
        best: tuple[float, Loop] | None = None
        for together in loops.loops_of(problem):
            for loop in together:
                share = share_of(*small(loop), one, self.candidate)[0]
                if share > (best[0] if best else 0.5):
                    best = (share, loop)
            if best and best[0] >= EXPLAINED:
                break
        if best is None or best[0] < 0.9:
            return self._carried(one, q, k, v) or self._unnamed_loop(one)
        if best[0] >= EXPLAINED:
            self.suspicions.clear()  # what was seen of it in the weights
        elif self.suspicions:
            return None
        loop = best[1]
        words, stages = loops.words_of(loop)
        return self.add(Hypothesis(loop.kind, words, stages, {"loop": loop},
                                   {"page": loop.page} if loop.page is not None else {}))  # fmt: skip

    def _carried(self, one: Screened, q, k, v) -> str | None:
        """Rows that go on from the state in which the rows of the tile before ended."""
        problem = one.inputs.problem
        for what in ("row_sum", "all"):
            for tile in (s for s in ROW_TILES if s < problem.seqlen_q):
                told = {"carried": (what, tile)}
                predicted = simulate(q, k, v, problem, RIGHT.with_(**told))[0]
                if share_of(one.answer.out, predicted, one, self.candidate)[0] >= EXPLAINED:
                    self.suspicions.clear()
                    self.found.clear()
                    self.state = RIGHT
                    parts = "row_max and row_sum are" if what == "row_sum" else "row_max, row_sum and accum are"
                    words = (
                        f"{parts} not reset between tiles of {tile} rows: each goes on where the one before it ended"
                    )
                    stages = ("row_sum",) if what == "row_sum" else ("row_sum", "accum")
                    return self.add(Hypothesis("state carried over", words, stages, told, {"row": tile}))
        return None

    def _first_group(self, problem: Problem, q, k, v, one: Screened):
        """A function that gives ``got, predicted`` of one group of heads: enough to tell loops apart, and quick."""
        group = problem.num_heads_q // problem.num_heads_kv
        if self.state.tells_heads_apart:
            return lambda loop: (one.answer.out, simulate(q, k, v, problem, self.state.with_(loop=loop))[0])
        part = problem.with_(batch=1, num_heads_q=group, num_heads_kv=1)
        pieces = q[-1:, -group:], k[-1:, -1:], v[-1:, -1:]
        got = one.answer.out[-1:, -group:]
        return lambda loop: (got, simulate(*pieces, part, self.state.with_(loop=loop))[0])

    def _unnamed_loop(self, one: Screened) -> str | None:
        """Weights of a failing call that no loop explains."""
        if self.suspicions or one.inputs.problem.mathematics != self.problem.mathematics:
            return None
        case = one.inputs.case(self.candidate)
        lost = ~one.answer.out.isfinite() & case.out.isfinite()
        if bool(lost.any()):
            place = dict(zip(("batch", "head", "row", "column"), lost.nonzero()[0].tolist(), strict=True))
            stages = ("row_max", "probs", "accum" if self._lse_tells() else "scores", "out")
            words = (f"{int(lost.sum()):,} elements are NaN or Inf with inputs '{one.inputs.pattern}', as where an "
                     "exponential outgrows its reference, in a page or where parts are added up")  # fmt: skip
            self.suspicions.append(Suspicion(stages, words, place))
            return words
        if is_blunt(one, self.candidate):
            words = (f"inputs '{one.inputs.pattern}' give a wrong result, and bounds as wide as the output there tell "
                     "no more")  # fmt: skip
            stages = ("scores", "row_max", "rescale", "probs", "row_sum", "accum", "out")
            self.suspicions.append(Suspicion(stages, words, dict(one.out.first_bad or {})))
            return words
        found = reading.weights(self.candidate, case.q, case.k, self.problem, self.state.columns)
        wanted = reading.simulated_weights(case.q, case.k, self.problem, self.state)
        if not bool(self._bad_weights(found, wanted).any()):
            return None
        return self._suspect(found, wanted, f"weights are wrong with inputs '{one.inputs.pattern}'")

    def linear(self) -> str | None:
        """Whether the output is the weights times V: judged where the weights themselves are as they should be."""
        left = [s for s in self._unexplained() if s.inputs.problem.mathematics == self.problem.mathematics
                and not is_blunt(s, self.candidate)]  # fmt: skip
        if not left or self.suspicions:
            return None
        one = left[0]
        q, k, v = one.inputs.make(self.candidate.device)
        found = reading.weights(self.candidate, q, k, one.inputs.problem, self.state.columns)
        heads = reference.kv_head_index(self.problem, q.device)
        values = v.reshape(-1, *v.shape[2:]).double()[heads if self.state.v_heads is None else self.state.v_heads]
        made = (found @ values).view(one.answer.out.shape)
        case = one.inputs.case(self.candidate)
        bound = 4 * case.out_atol + 8 * case.out_rtol * made.abs()
        off = ~((one.answer.out.double() - made).abs() <= bound)
        if not bool(off.any()):
            return None
        place = dict(zip(("batch", "head", "row", "column"), off.nonzero()[0].tolist(), strict=True))
        words = f"the output is not the sum of V by the weights that were read: {int(off.sum())} elements"
        self.suspicions.append(Suspicion(("accum",), words, place))
        return words

    def lse(self) -> str | None:
        wrong = [s for s in self.failing if s.lse is not None and not s.lse.passed and s.answer is not None]
        for one in sorted(wrong, key=lambda s: s.inputs.pattern != "normal"):
            case, problem = one.inputs.case(self.candidate, again=True), one.inputs.problem
            if logsumexp.follows(one.answer.lse, case, problem, self.state):
                continue
            if one.lse_alone or self._fits_shape(problem):
                named = logsumexp.name_lse(one.answer.lse, case, problem, self.state)
                if named:
                    return self.add(named)
            if one.lse_alone or not (self.suspicions or self.found):
                words = f"lse is wrong: {one.lse.sentence()}"
                self.suspicions.append(Suspicion(("lse",) if one.lse_alone else ("row_sum", "lse"), words,
                                                 dict(one.lse.first_bad or {})))  # fmt: skip
                return words
            return "lse follows the wrong output"
        return None

    # --- what the state predicts ---

    def verify(self) -> tuple[int, int, int]:
        """Wrong elements that the state predicts, all wrong ones, and right ones that it predicts wrongly."""
        explained = wrong = spoiled = 0
        for one in self.failing:
            if one.answer is None or not one.out_wrong or not self._fits_shape(one.inputs.problem):
                continue
            if is_blunt(one, self.candidate):
                continue
            predicted = simulate(*given_to(one, self.candidate), one.inputs.problem, self.state)[0]
            _, mine, all_wrong, bad = share_of(one.answer.out, predicted, one, self.candidate, self.state.unwritten)
            explained, wrong, spoiled = explained + mine, wrong + all_wrong, spoiled + bad
        return explained, wrong, spoiled

    def _prune(self) -> None:
        """Drop hypotheses without which the wrong outputs are predicted as well."""
        if len(self.found) < 2:
            return
        for hypothesis in list(self.found):
            rest = {name: getattr(RIGHT, name) for name in hypothesis.changes}
            if (
                not rest
                or hypothesis.by_rounding
                or hypothesis.stages == ("lse",)  # what it explains is not in the output
                or any(name in other.changes for other in self.found if other is not hypothesis for name in rest)
            ):
                continue
            before, state = self.verify(), self.state
            self.state = state.with_(**rest)
            now = self.verify()
            if now[0] - now[2] >= before[0] - before[2] and now[0] > 0:
                self.found.remove(hypothesis)
            else:
                self.state = state

    def _unexplained(self) -> list[Screened]:
        left = []
        for one in self.failing:
            if one.answer is None or not one.out_wrong or not self._fits_shape(one.inputs.problem):
                continue
            if is_blunt(one, self.candidate):
                if not self.found:
                    left.append(one)
                continue
            predicted = simulate(*given_to(one, self.candidate), one.inputs.problem, self.state)[0]
            if share_of(one.answer.out, predicted, one, self.candidate, self.state.unwritten)[0] < EXPLAINED:
                left.append(one)
        return left

    def _fits_shape(self, problem: Problem) -> bool:
        """Whether what was read at the probed shapes says something of this problem."""
        same = all(getattr(problem, name) == getattr(self.problem, name)
                   for name in ("batch", "num_heads_q", "num_heads_kv", "seqlen_q", "seqlen_k", "head_dim",
                                "causal"))  # fmt: skip
        return same or not self.state.is_of_one_shape

    def agrees(self, found: reading.Scores, behaviour: Behaviour) -> bool:
        return self.disagreement(found, behaviour) == 0.0

    def disagreement(self, found: reading.Scores, behaviour: Behaviour) -> float:
        """Share of the weights that the behaviour does not predict."""
        wanted = reading.simulated_weights(found.q, found.k, self.problem, behaviour)
        return float(self._bad_weights(found.weights, wanted).double().mean())

    def _bad_weights(self, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        slack = reading.tolerance(self.problem) * wanted.abs() + 4 * torch.finfo(torch.float16).tiny
        return ~((found - wanted).abs() <= slack) & ~(found.isnan() & wanted.isnan())

    def _head(self, flat: int) -> dict[str, int]:
        return {"batch": flat // self.problem.num_heads_q, "head": flat % self.problem.num_heads_q}

    def _place(self, index: int, shape: tuple[int, ...]) -> dict[str, int]:
        head, rest = divmod(index, shape[1] * shape[2])
        row, column = divmod(rest, shape[2])
        return {**self._head(head), "row": row, "column": column}


@contextlib.contextmanager
def full_of_nan(value: bool = True) -> Iterator[None]:
    """Inside, memory that torch hands out uninitialised is full of NaN; with `value` False it is as it comes.

    One thread at a time is inside.
    """
    memory = torch.utils.deterministic
    with ambient.alone, warnings.catch_warnings():  # which belong to the process, too
        warnings.simplefilter("ignore")
        filled = memory.fill_uninitialized_memory
        with ambient.deterministic("warn" if value else "default"):
            memory.fill_uninitialized_memory = value
            try:
                yield
            finally:
                memory.fill_uninitialized_memory = filled


def _lane_words(lanes: tuple[str, int]) -> str:
    how, count = lanes
    return f"{count} lanes, key j in lane j % {count}" if how == "mod" else f"{count} keys a lane"


def _layout_words(name: str, how: str, problem: Problem) -> tuple[str, tuple[str, ...]]:
    width = problem.head_dim
    stages = {"out": ("out",), "v": ("accum",)}.get(name, ("scores",))
    what = "the output" if name == "out" else "Q and K" if name == "qk" else name.upper()
    words = {
        "heads and rows confused": f"{what} lies in memory as [B, S, H, D] and is taken for [B, H, S, D], or "
        "the other way round: heads and rows are confused",
        "rows and heads confused": f"{what} is written as [B, S, H, D] into memory that is read as [B, H, S, D]",
        "group packed": f"the heads of a group and their rows are packed as [S, G] and read as [G, S] in {what}",
        "group unpacked": f"the heads of a group and their rows are packed as [G, S] and read as [S, G] in {what}",
        "reshaped": f"{what} is reshaped where it should be transposed",
        "tile transposed": f"whole tiles of {what} ({width} rows and {width} columns) are read transposed",
        "rotated": "a rotary embedding is applied to Q and K that nobody asked for",
    }[how]
    return words, stages


def reference_scores(q, k, problem: Problem) -> torch.Tensor:
    """float64 ``[N, Sq, Sk]``: the right scores, -inf behind the mask."""
    flat_q, flat_k, _ = reference.flat_inputs(q, k, k, problem, slice(None))
    scores = flat_q @ flat_k.mT * problem.scale
    return scores.masked_fill(mask_of(problem, q.device) == 0, -math.inf)


def _even_by_page(ratio: torch.Tensor, bad: torch.Tensor, problem: Problem) -> bool:
    """Whether the ratio is one number within every page of 16 keys of a row that has a wrong weight in it."""
    keys = ratio.shape[-1] // 16 * 16
    pages = ratio[..., :keys].unflatten(-1, (-1, 16))
    middle = pages.nanmedian(dim=-1, keepdim=True).values
    even = ((pages / middle - 1).abs() <= 2 * reading.tolerance(problem)) | pages.isnan()
    touched = bad[..., :keys].unflatten(-1, (-1, 16)).any(dim=-1)
    return bool(touched.any()) and bool(even[touched].double().mean() > 0.98)


def _carry_anchors(k_of: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """Anchors look all alike: each goes where its neighbours went."""
    k_of = k_of.clone()
    for place in anchor.nonzero().flatten().tolist():
        beside = place + 1 if place + 1 < len(k_of) else place - 1
        there = k_of[beside]
        k_of[place] = there if there < 0 else (there + place - beside).clamp(0, len(k_of) - 1)
    return k_of
