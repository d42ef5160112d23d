"""Try whole formulas on a wrong call: other weights than softmax's, other tensors, offsets that wrap, fewer bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from flashcore.bisection.diagnosis.behaviour import RIGHT, Behaviour, simulate
from flashcore.bisection.diagnosis.elements import FEWER_BITS, WRAPS
from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.predicting import EXPLAINED, given_to, is_blunt
from flashcore.bisection.diagnosis.probes import rounding, scales
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.bisection.diagnosis.screening import Inputs, Screened, screen_one
from flashcore.problem import Problem

WEIGHED = {
    "sigmoid": ("a sigmoid of each score stands where softmax is meant: each weight depends on its own score alone, "
                "and they do not add up to 1", "probs"),
    "sigmoid less log(keys)": ("a sigmoid of each score less log(keys) stands where softmax is meant: each weight "
                               "depends on its own score alone, and they do not add up to 1", "probs"),
    "over rows": ("softmax is taken over the rows of each key, where it is meant over the keys of each row", "row_sum"),
    "over heads": ("softmax is taken over the heads, where it is meant over the keys of each row", "row_sum"),
    "softmax twice": ("softmax is taken twice: its results are taken for scores once more", "probs"),
    "scores": ("there is no softmax: scores are taken for weights", "probs"),
    "relu": ("relu of the scores stands where softmax is meant", "probs"),
    "log of the softmax": ("logarithms of the weights are taken for the weights (log_softmax for softmax)", "probs"),
    "linear": ("weights are products of elu(q) + 1 and elu(k) + 1, as in linear attention, where softmax is meant",
               "probs"),
}  # fmt: skip
"""A formula for the weights in words, and the stage that it belongs to."""
UNSCALED = ("sigmoid", "scores", "relu")
"""Weights that nobody normalises: some multiply them by a constant, as by 1 / number of keys."""
TAKEN = {
    "qvk": "K and V are exchanged", "qvv": "V is taken for K", "qkk": "K is taken for V", "qqv": "Q is taken for K",
    "kqv": "Q and K are exchanged", "kkv": "K is taken for Q", "qkq": "Q is taken for V",
    "vkq": "Q and V are exchanged",
}  # fmt: skip
"""Tensors that stand at the places of Q, K and V."""
ROUNDED = ("v", "k", "q", "kv", "qk", "qkv")
"""Tensors that are rounded together."""
MANY = 8
"""Elements that are all as large as the largest, from which on that looks like a limit."""
NEARER = 0.1
"""Share of the squared error that a formula may leave."""


def formulas(inquiry: Inquiry) -> str | None:
    """A formula that predicts every wrong call of these shapes, to the element, together with what is known so far."""
    if inquiry.state is inquiry.formulas_under:
        return None  # nothing was found since they were tried
    inquiry.formulas_under = inquiry.state
    left = _left(inquiry)
    if not left:
        return None
    rounded = not rounding.far_off(inquiry.candidate, left, inquiry.state)
    limit = _limit(left[0])
    groups = _of(left[0].inputs.problem, rounded=rounded)
    best = _best(inquiry, left, ([limit] if limit else [], *groups), inquiry.state)
    if best is None:
        return None
    inquiry.suspicions.clear()  # what was seen of it piece by piece
    return inquiry.add(best)


def with_a_wrong_scale(inquiry: Inquiry) -> str | None:
    """A formula and a scale that is missing, there twice, or of another base: two bugs that hide each other."""
    left = _left(inquiry)
    problem = inquiry.problem
    if not left or problem.scale == 0 or left[0].inputs.problem.scale != problem.scale:
        return None
    for scale in _scales(problem):
        groups = ([one for one in together if "scale_factor" not in one.changes]
                  for together in _of(problem, rounded=False))  # fmt: skip
        best = _best(inquiry, left, groups, RIGHT.with_(**scale.changes))
        if best:
            inquiry.found.clear()  # pieces of both that were seen one by one
            inquiry.suspicions.clear()
            inquiry.state = RIGHT
            return "; ".join(inquiry.add(one) for one in (best, scale))
    return None


def _scales(problem: Problem) -> Iterator[Hypothesis]:
    """A scale that is missing, there twice, or of another base."""
    if problem.scale:
        named = (scales.of_factor(factor, problem)
                 for factor in (1 / problem.scale, problem.scale, math.log(2), 1 / math.log(2)))  # fmt: skip
        yield from (one for one in named if one is not None)


def _left(inquiry: Inquiry) -> list[Screened]:
    """The calls that nothing explains so far, the plainest first."""
    left = [s for s in inquiry.unexplained() if not is_blunt(s, inquiry.candidate)]
    return sorted(left, key=lambda s: (s.inputs.pattern != "normal", s.inputs.strided))


def _best(
    inquiry: Inquiry, left: list[Screened], groups: Iterable[list[Hypothesis]], base: Behaviour
) -> Hypothesis | None:
    """Of the first group that has one, the formula that leaves least of the error of all calls."""
    control = screen_one(inquiry.candidate, Inputs(left[0].inputs.problem))
    for together in groups:
        fit: list[tuple[float, Hypothesis]] = []
        for one in together:
            one = _with_its_factor(inquiry, left[0], one, base)
            state = base.with_(**one.changes)
            misses = []
            for call in left:  # the plainest first, at which nearly every formula ends
                misses.append(_miss(inquiry, call, state))
                if misses[-1] is None:
                    break
            if None not in misses and _leaves(inquiry, control, state):
                fit.append((sum(misses), one))
        if fit:
            return min(fit, key=lambda tried: tried[0])[1]
    return None


def _limit(call: Screened) -> Hypothesis | None:
    """An output of which some elements hold the largest number that there is, or its negative."""
    out = call.answer.out.double()
    largest = float(out.abs().max())
    if not largest or not math.isfinite(largest) or int((out.abs() == largest).sum()) < MANY:
        return None
    words = f"the output is cut off at -{largest:.4g} and {largest:.4g}"
    return Hypothesis("output cut off", words, ("out",), {"out_limit": largest})


def _miss(inquiry: Inquiry, call: Screened, state: Behaviour) -> float | None:
    """The share of the squared error that a formula leaves of a wrong call; None where it does not explain it."""
    case = call.inputs.case(inquiry.candidate, again=True)
    predicted, (share, *_) = inquiry.predict(state, call)
    if share < EXPLAINED:
        return None
    # Errors as small as roundings are within the slack of many predictions: theirs must be the very errors.
    got, known = call.answer.out.double(), call.answer.out.isfinite() & predicted.isfinite() & case.out.isfinite()
    left, error = ((got - one)[known].square().sum() for one in (predicted, case.out))
    miss = float(left / error.clamp_min(1e-300))
    return miss if miss <= NEARER else None


def _leaves(inquiry: Inquiry, control: Screened, state: Behaviour) -> bool:
    """Whether a formula leaves right what is right of an ordinary call: zeros alone fit many formulas."""
    if control.answer is None:
        return True
    predicted, (_, _, wrong, spoiled) = inquiry.predict(state, control)
    return spoiled <= (1 - EXPLAINED) * max(1, predicted.numel() - wrong)


def _with_its_factor(inquiry: Inquiry, call: Screened, one: Hypothesis, base: Behaviour) -> Hypothesis:
    """A formula that nobody normalises, with the constant that the output is multiplied by, by least squares."""
    if one.changes.get("weighing") not in UNSCALED:
        return one
    predicted = simulate(*given_to(call, inquiry.candidate), call.inputs.problem, base.with_(**one.changes))[0]
    got = call.answer.out.double()
    factor = float((got * predicted).sum() / predicted.square().sum().clamp_min(1e-30))
    if not math.isfinite(factor) or not factor or abs(factor - 1) <= 0.01:
        return one
    if abs(factor * call.inputs.problem.seqlen_k - 1) < 0.01:
        words = f"{one.sentence}; and the output is divided by the number of keys"
        return replace(one, sentence=words, changes={**one.changes, "over_keys": True})
    words = f"{one.sentence}; and the output is multiplied by {factor:.4g}"
    return replace(one, sentence=words, changes={**one.changes, "out_factor": factor})


def _of(problem: Problem, *, rounded: bool) -> Iterator[list[Hypothesis]]:
    """The formulas that mean something for a problem, in groups of which the best is taken, the plainest first.

    Those of fewer bits are among them if `rounded`: where results are as near as roundings leave them.
    """
    yield list(_plain(problem))
    yield list(_wrapped(problem))
    if rounded:
        yield list(_rounded(problem))


def _plain(problem: Problem) -> Iterator[Hypothesis]:
    words = "Q and K have no influence: all keys of a row weigh the same"
    yield Hypothesis("scores without influence", words, ("scores",), {"scale_factor": 0.0})
    yield from _scales(problem)  # which what is normed is much like
    yield Hypothesis("Q added to the output", "Q is added to the output, as a residual", ("out",), {"plus": "q"})
    for kind, (words, stage) in WEIGHED.items():
        if kind == "over heads" and problem.num_heads_q == 1:
            continue
        name = "softmax over the wrong axis" if kind.startswith("over") else f"{kind} in place of softmax"
        yield Hypothesis(name, words, (stage,), {"weighing": kind})
    words = "the divisors of rows are laid along the columns of the output (row_sum is broadcast wrongly)"
    yield Hypothesis("divided along the columns", words, ("row_sum", "out"), {"divided_by_column": True})
    alike = problem.seqlen_q == problem.seqlen_k
    for taken, words in TAKEN.items():
        if alike or (taken[0] == "q" and taken.count("q") == 1):
            stages = ("scores",) if taken[2] == "v" else ("accum",) if taken[:2] == "qk" else ("scores", "accum")
            yield Hypothesis("another tensor taken", words, stages, {"taken": taken})
    for names in ("qk", "q", "k"):
        what = _words(names)
        words = f"rows of {what} are divided by their root mean square before the products"
        for more in ("", " with 1e-06", " with 1e-05"):
            told = {"scrambled": tuple((name, f"normed{more}") for name in names)}
            yield Hypothesis("normed before the products", words, ("scores",), told)
        told = {"scrambled": tuple((name, "normed") for name in names)}
        cosine = {**told, "scale_factor": problem.head_dim ** (-0.5 * len(names))}
        words = f"rows of {what} are divided by their length before the products"
        yield Hypothesis("normed before the products", words, ("scores",), cosine)
    words = "a rotary embedding of neighbouring pairs is applied to Q and K that nobody asked for"
    pairs = (("q", "rotated in pairs"), ("k", "rotated in pairs"))
    yield Hypothesis("elements at other places", words, ("scores",), {"scrambled": pairs})


def _wrapped(problem: Problem) -> Iterator[Hypothesis]:
    heads = {"q": problem.num_heads_q, "k": problem.num_heads_kv, "v": problem.num_heads_kv}
    rows = {"q": problem.seqlen_q, "k": problem.seqlen_k, "v": problem.seqlen_k}
    stages = {"q": ("scores",), "k": ("scores",), "v": ("accum",), "kv": ("scores", "accum"),
              "qkv": ("scores", "accum"), "out": ("out",)}  # fmt: skip
    for count in WRAPS:
        for names in ("k", "v", "kv", "q", "qkv", "out"):
            of = "q" if names == "out" else names
            inside = min(rows[name] for name in of) * problem.head_dim
            whole = min(problem.batch * heads[name] * rows[name] for name in of) * problem.head_dim
            for how, size, where in (("wrapped in a head", inside, " of a head"), ("wrapped", whole, "")):
                if size <= count or (names == "out" and where):
                    continue
                what = "the output" if names == "out" else _words(names)
                bits = "16 bits" if count == WRAPS[0] else "16 bits, with a sign or in bytes"
                words = f"offsets into {what} wrap: element {count:,}{where} is taken for element 0 (offsets of {bits})"
                each = (("out", f"written round at {count}"),) if names == "out" else tuple(
                    (name, f"{how} at {count}") for name in names)  # fmt: skip
                yield Hypothesis("offsets that wrap", words, stages[names], {"scrambled": each})


def _rounded(problem: Problem) -> Iterator[Hypothesis]:
    single = problem.dtype == "float32"
    kinds = [kind for kind in FEWER_BITS if kind != problem.dtype and (single or not kind.startswith("tfloat32"))]
    for kind in kinds:
        for names in ROUNDED:
            what = _words(names)
            into = kind
            if kind.startswith("int8"):
                into = f"whole numbers of 8 bits, by one scale {kind.removeprefix('int8').strip() or 'for all'},"
            elif kind == "tfloat32":
                into = f"{kind} (or float16, which has as many bits)"
            before = "it is summed" if names == "v" else "the products"
            words = f"{what} {'is' if len(names) == 1 else 'are'} rounded to {into} before {before}"
            stages = {"v": ("accum",)}.get(names, ("scores", "accum") if "v" in names else ("scores",))
            told = {"scrambled": tuple((name, f"in {kind}") for name in names)}
            yield Hypothesis(f"{what} in fewer bits", words, stages, told)


def _words(names: str) -> str:
    """``Q, K and V`` of their letters."""
    *first, last = names.upper()
    return f"{', '.join(first)} and {last}" if first else last
