"""Probe in which order elements of Q, K, V and the output are taken to lie in memory."""

from __future__ import annotations

import math
from dataclasses import replace

from flashcore.bisection.diagnosis.behaviour import RIGHT, Behaviour, simulate
from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.predicting import EXPLAINED, given_to, is_blunt, share_of
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.bisection.diagnosis.screening import Screened
from flashcore.problem import Problem

SCRAMBLES = (
    ("out", "heads and rows confused"), ("out", "rows and heads confused"), ("q", "heads and rows confused"),
    ("k", "heads and rows confused"), ("v", "heads and rows confused"), ("out", "group packed"),
    ("out", "group unpacked"), ("q", "group packed"), ("q", "group unpacked"), ("k", "reshaped"), ("q", "reshaped"),
    ("v", "reshaped"), ("v", "tile transposed"), ("k", "tile transposed"), ("q", "tile transposed"), ("qk", "rotated"),
)  # fmt: skip
"""What is tried of elements that are taken for those at other places, and of which tensor."""


def strides(inquiry: Inquiry) -> str | None:
    plain = {s.inputs for s in inquiry.failing if not s.inputs.strided}
    only = [s for s in inquiry.failing if s.inputs.strided and replace(s.inputs, strided=False) not in plain]
    for one in only:
        if one.answer is None:
            continue
        # In an order without gaps, so that all that is read in a wrong order is known.
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in one.inputs.make(inquiry.candidate.device))
        out = inquiry.candidate(q, k, v, one.inputs.problem).out
        predicted = simulate(q, k, v, one.inputs.problem, inquiry.state.with_(strides_ignored=True))[0]
        words = "strides are ignored: inputs that are not contiguous are read as if they were"
        if share_of(out, predicted, one, inquiry.candidate)[0] >= EXPLAINED:
            return inquiry.add(Hypothesis("strides ignored", words, ("scores",), {"strides_ignored": True}))
        return _strided_alone(inquiry, one)
    return None


def _strided_alone(inquiry: Inquiry, one: Screened) -> str:
    """Which of Q, K and V gives a wrong result when it alone lies in memory as ``[B, S, H, D]``."""
    case = one.inputs.case(inquiry.candidate)
    wrong = []
    for place, name in enumerate("qkv"):
        given = [t.contiguous() for t in (case.q, case.k, case.v)]
        given[place] = given[place].transpose(1, 2).contiguous().transpose(1, 2)
        out = inquiry.candidate(*given, one.inputs.problem).out.double()
        if not bool(((out - case.out).abs() <= case.out_atol + case.out_rtol * case.out.abs()).all()):
            wrong.append(name.upper())
    stages = tuple(dict.fromkeys("accum" if name == "V" else "scores" for name in wrong)) or ("scores", "accum")
    which = f"; {' or '.join(wrong)} alone is enough" if wrong else ""
    return inquiry.suspect(stages, f"only inputs that are not contiguous give a wrong result{which}")


def elsewhere(inquiry: Inquiry) -> str | None:
    """Elements of Q, K, V or the output that are taken for those at other places: tried by simulation."""
    left = [s for s in inquiry.unexplained() if not is_blunt(s, inquiry.candidate)]
    if not left:
        return None
    one = min(left, key=lambda s: (s.inputs.pattern != "normal", s.inputs.strided))
    given, problem = given_to(one, inquiry.candidate), one.inputs.problem
    for how, times in (("the scale", 1.0), ("the scale and log2(e)", 1 / math.log(2))):
        predicted = simulate(*given, problem, inquiry.state.with_(q_rounded=times))[0]
        if problem.dtype != "float32" and share_of(one.answer.out, predicted, one, inquiry.candidate)[0] >= EXPLAINED:
            words = f"Q is multiplied by {how} and rounded to {problem.dtype} before the products"
            return inquiry.add(Hypothesis("scaled Q in 16 bits", words, ("scores",), {"q_rounded": times}))
    for name, how in SCRAMBLES:
        told = Behaviour(scrambled=(("q", how), ("k", how)) if name == "qk" else ((name, how),))
        predicted = simulate(*given, problem, told)[0]
        if share_of(one.answer.out, predicted, one, inquiry.candidate)[0] < EXPLAINED:
            continue
        inquiry.found.clear()  # pieces of it that were seen one by one
        inquiry.suspicions.clear()
        inquiry.state = RIGHT
        words, stages = _layout_words(name, how, problem)
        return inquiry.add(Hypothesis("elements at other places", words, stages, {"scrambled": told.scrambled}))
    return None


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
