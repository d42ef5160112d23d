"""Name what scores are multiplied by: one factor, a factor in places, or a matrix between Q and K."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from flashcore.bisection.diagnosis.hypotheses import Hypothesis, head_of, ranges
from flashcore.problem import Problem

ANCHORS_EVERY = 16
"""Keys that a slope is read from together."""


def of_factor(factor: float, problem: Problem, within: float = 0.004) -> Hypothesis | None:
    """A name for what the scores are multiplied by besides the right scale; None where that is nothing.

    A factor that has a name is taken for that one `within` this share of it.
    """
    fine = 0.004 if problem.dtype == "bfloat16" else 0.001  # what the rounding of weights leaves to be told
    if not math.isfinite(factor) or abs(factor - 1.0) < fine:
        return None
    if abs(factor) < 1e-3:
        return Hypothesis("scores without influence", "Q and K have no influence: all keys of a row weigh the same",
                          ("scores",), {"scale_factor": 0.0})  # fmt: skip
    scale, width = problem.scale, problem.head_dim
    default = 1 / math.sqrt(width)
    known: dict[str, tuple[float, str, str]] = {
        "scale missing": (1 / scale, "the scale is missing: scores are q k", "scale missing"),
        "scale twice": (scale, "the scale is applied twice", "scale twice"),
        "base 2": (math.log(2), "exp2 stands where exp is meant (or log2(e) is missing)", "base 2 for e"),
        "log2e": (1 / math.log(2), "log2(e) is applied twice, or exp stands where exp2 is meant", "log2(e) twice"),
        "1/D": (1 / width / scale, "the scale is 1/head_dim where 1/sqrt(head_dim) is meant", "scale without the root"),
        "root": (math.sqrt(default) / scale, "the root of the scale is taken for the scale", "root of the scale"),
        "negative": (-1.0, "the sign of the scores is turned round", "scores negated"),
        "absolute": (abs(scale) / scale, "the sign of the scale is lost", "sign of the scale lost"),
    }
    if problem.softmax_scale is not None:
        known["default"] = (
            default / scale,
            "softmax_scale is ignored: 1/sqrt(head_dim) is used",
            "softmax_scale ignored",
        )
    for other in (8, 16, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512, 1024):
        if other != width:
            words = f"the scale is that of head_dim {other}: 1/sqrt({other})"
            known[f"D{other}"] = (1 / math.sqrt(other) / scale, words, "scale of another head_dim")
    for count, words in ((problem.num_heads_q, "num_heads"), (problem.seqlen_k, "seqlen"),
                         (problem.num_heads_q * width, "num_heads * head_dim")):  # fmt: skip
        known[words] = (1 / math.sqrt(count) / scale, f"the scale is 1/sqrt({words}) where 1/sqrt(head_dim) is meant",
                        "scale of another size")  # fmt: skip
    name, sentence = "scale wrong", f"the scores are {factor:.4g} times what they should be"
    rounded = float(torch.tensor(scale, dtype=torch.bfloat16))
    both = float(torch.tensor(scale / math.log(2), dtype=torch.bfloat16)) * math.log(2)
    for value, words in ((1.44 * math.log(2), "log2(e) is taken for 1.44"), (both / scale, "the scale times log2(e) is "
                         "rounded to bfloat16"), (rounded / scale, "the scale is rounded to bfloat16")):  # fmt: skip
        if abs(value - 1) > fine and abs(factor / value - 1) < 4e-4:
            words = f"{words} (scores are {factor:.4g} times the right ones)"
            return Hypothesis("a constant in few digits", words, ("scores", "probs"), {"scale_factor": value})
    for value, words, kind in known.values():
        if abs(value - 1.0) > 0.004 and abs(factor / value - 1.0) < within:
            name, sentence = kind, f"{words} (scores are {factor:.4g} times the right ones)"
            factor = value
            break
    stages = ("scores", "probs", "rescale") if name in ("base 2 for e", "log2(e) twice") else ("scores",)
    return Hypothesis(name, sentence, stages, {"scale_factor": factor})


def of_metric(metric: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for scores that are ``q A k`` with an A that is no multiple of the identity; None where A is one."""
    scale = problem.scale
    part = (metric / scale).cpu()
    width = part.shape[0]
    diagonal = part.diagonal()
    off = part - torch.diag(diagonal)
    noise = 0.2
    if float(off.abs().max()) < noise:
        if float((diagonal - diagonal.mean()).abs().max()) < noise:
            return None
        small = (diagonal.abs() < noise).nonzero().flatten()
        kept = (diagonal.abs() >= noise).nonzero().flatten()
        if len(small) and len(kept):
            words = f"columns {ranges(small.tolist())} of head_dim are left out of the products"
            name = "part of head_dim left out"
        else:
            words, name = (
                "the columns of head_dim are weighted unevenly in the products",
                "columns of head_dim weighted",
            )
        return Hypothesis(name, words, ("scores",), {"metric": metric})
    to = part.abs().argmax(dim=0)
    strength = part.abs().amax(dim=0)
    if bool((strength > 0.5).all()) and len(set(to.tolist())) == width:
        moved = int((to != torch.arange(width)).sum())
        words = (f"{moved} columns of K are multiplied with other columns of Q: another order within head_dim (a "
                 "swizzle)")  # fmt: skip
        return Hypothesis("columns of head_dim in another order", words, ("scores",), {"metric": metric})
    return Hypothesis("columns of head_dim mixed", "columns of Q are multiplied with other columns of K", ("scores",),
                      {"metric": metric})  # fmt: skip


def of_slopes(by: dict[str, torch.Tensor], problem: Problem) -> Iterator[Hypothesis]:
    """Names for scores that are multiplied by another number in some heads, rows or keys, from `reading.slopes`."""
    for axis, values in by.items():
        values = values.cpu()
        known = values.isfinite()
        if int(known.sum()) < 2 or float(values[known].max() - values[known].min()) < 0.02:
            continue
        values = torch.where(known, values, 1.0)
        values = torch.where((values - 1).abs() < 0.02, 1.0, values)
        off = (values != 1).nonzero().flatten().tolist()
        usual = values[off].median()
        values = torch.where((values / usual - 1).abs() < 0.04, usual, values)
        one = bool((values[off] == usual).all())
        if axis == "keys":
            per_key = values.repeat_interleave(ANCHORS_EVERY)[: problem.seqlen_k]
            off, factors = (per_key != 1).nonzero().flatten().tolist(), per_key
            what = f"keys {ranges(off)}"
        elif axis == "rows":
            factors, what = values[:, None], f"rows {ranges(off)}"
        else:
            factors = values[:, None, None]
            first = divmod(off[0], problem.num_heads_q)
            what = f"{len(off)} of {len(values)} heads (the first: batch {first[0]}, head {first[1]})"
        known_as = of_factor(float(usual), problem) if one else None
        why = f": {known_as.sentence}" if known_as and known_as.name != "scale wrong" else ""
        how = f"{float(usual):.4g} times" if one else "by other factors than"
        place = {"keys": "column", "rows": "row"}.get(axis)
        at = {place: off[0]} if place else head_of(off[0], problem)
        yield Hypothesis(f"scale of some {axis}", f"the scores of {what} are {how} the right ones{why}", ("scores",),
                         {"factors": factors.double()}, at)  # fmt: skip
