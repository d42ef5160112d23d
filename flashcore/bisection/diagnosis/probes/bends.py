"""Probe a ladder of scores, and name what bends them or is added to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.hypotheses import Hypothesis, place_of
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.problem import Problem

LADDERS = (
    (0.0, 20.0),
    (-20.0, 0.0),
    *((top - 10.0, top) for top in (30.0, 40.0, 50.0, 60.0, 70.0, 80.0, -30.0, -60.0)),
)
"""Least and largest of the scores that are compared with each other; what is 10 below the largest can still be read."""


def ladder(inquiry: Inquiry) -> str | None:
    """Scores from -20 to 20, in the last row: what they become beside each other."""
    if inquiry.suspicions and not inquiry.bendable:
        return None
    read = []
    counts = inquiry.state.counts if inquiry.state.counts is not None and inquiry.state.counts.dim() == 2 else None
    for low, high in LADDERS:
        levels = torch.linspace(low, high, 11, dtype=torch.float64)
        found = reading.read_ladder(inquiry.candidate, inquiry.problem, levels, counts)
        if found is None:
            continue
        logs = found.masked_fill(~(found > 3e-5), math.nan).log()
        if inquiry.state.q_heads is None and float((logs - logs[:1]).abs().nan_to_num(0.0).max()) > 0.1:
            return None  # heads differ, which is another bug
        read.append((levels, logs.nanmedian(dim=0).values.cpu() / inquiry.state.scale_factor))
    bent = of_ladder(read) if read else None
    if bent is None:
        return None
    if inquiry.bendable is not None:
        inquiry.suspicions.remove(inquiry.bendable)
        inquiry.bendable = None
    said = [] if inquiry.state.bend else [inquiry.add(bent)]
    hidden = _of_hidden(inquiry)
    if hidden:
        inquiry.found = [one for one in inquiry.found if one.name != "mask too small"]
        said.append(inquiry.add(hidden))
    return "; and ".join(said) or None


def _of_hidden(inquiry: Inquiry) -> Hypothesis | None:
    """A cap that is taken of hidden scores too: they become -c, whatever a mask was thought to set."""
    kind, limit = inquiry.state.bend
    if kind not in ("tanh", "clip") or not inquiry.problem.causal:
        return None
    words = f"the cap is taken of hidden keys too: their -inf becomes -{limit:.3g}"
    capped = Hypothesis("cap after the mask", words, ("scores",), {"masked_score": -limit})
    more = inquiry.explained_with(capped) - inquiry.explained_now()
    return capped if more > 0 or (more == 0 and inquiry.state.masked_score is not None) else None


def of_ladder(read: list[tuple[torch.Tensor, torch.Tensor]]) -> Hypothesis | None:
    """A name for scores that are bent, from the differences between scores; None for straight ones.

    Parameters
    ----------
    read
        For some ladders of scores ``[L]``, float64: those scores, and what they are less the last of them; NaN where a
        weight was too small to be read.
    """

    def offs(of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.cat([got - (of(at) - of(at[-1])) for at, got in read])

    def fits(of: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        allowed = torch.cat([0.05 + 0.02 * (of(at) - of(at[-1])).abs() for at, _ in read])
        off = offs(of).abs()
        return bool(((off <= allowed) | off.isnan()).all())

    if fits(lambda x: x):
        return None
    if fits(torch.relu):
        return Hypothesis("negative scores set to 0", "scores below 0 become 0: a score of -5 counts like one of 0",
                          ("scores",), {"bend": ("relu", 0.0)})  # fmt: skip
    if fits(torch.abs):
        return Hypothesis("sign of the scores lost", "scores lose their sign: a score of -5 counts like one of 5",
                          ("scores",), {"bend": ("abs", 0.0)})  # fmt: skip
    grid = torch.logspace(-0.5, 2.3, 141, base=10.0, dtype=torch.float64).tolist()
    kinds: dict[str, Callable[[float], Callable[[torch.Tensor], torch.Tensor]]] = {
        "tanh": lambda c: lambda x: c * torch.tanh(x / c),
        "clip above": lambda c: lambda x: x.clamp(max=c),
        "clip": lambda c: lambda x: x.clamp(-c, c),
    }
    for kind, of in kinds.items():
        miss = lambda c, of=of: float(offs(of(c)).nan_to_num(0.0).square().sum())  # noqa: E731
        coarse = min(grid, key=miss)
        best = min(torch.linspace(0.95 * coarse, 1.05 * coarse, 81, dtype=torch.float64).tolist(), key=miss)
        best = float(round(best)) if round(best) and fits(of(float(round(best)))) else best
        if not fits(of(best)):
            continue
        words = {"tanh": f"a softcap that nobody asked for: scores become {best:.3g} tanh(score / {best:.3g})",
                 "clip": f"scores are cut off at -{best:.3g} and {best:.3g}",
                 "clip above": f"scores are cut off above {best:.3g}"}[kind]  # fmt: skip
        name = "softcap not asked for" if kind == "tanh" else "scores cut off"
        return Hypothesis(name, words, ("scores",), {"bend": (kind, best)})
    return None


def of_bias(bias: torch.Tensor, problem: Problem) -> Hypothesis:
    """A name for what is added to the scores, float64 ``[N, Sq, Sk]``, -inf where a key is not counted.

    What is added to all scores of a row changes nothing, so it counts beside the usual number of its row.
    """
    bias = bias - bias.masked_fill(bias == -math.inf, math.nan).nanmedian(dim=-1, keepdim=True).values.nan_to_num(0.0)
    changes = {"bias": bias}
    slopes = [_slope_of(one) for one in bias]
    if all(slope is not None and slope != 0 for slope in slopes):
        even = max(slopes) - min(slopes) < 0.02 * abs(slopes[0])
        words = f"{slopes[0]:.3g}" if even else f"{slopes[0]:.3g} in the first head, {slopes[-1]:.3g} in the last"
        words = f"a bias that nobody asked for is added to the scores: {words} for each key of distance, as ALiBi does"
        return Hypothesis("bias by distance", words, ("scores",), changes)
    off = (bias.abs() > 0.02) & bias.isfinite()
    if not bool(off.any()):
        return Hypothesis("scores shifted", "numbers are added to the scores", ("scores", "probs"), changes)
    head, row, key = off.nonzero()[0].tolist()
    at = place_of(off, problem)
    many = int(off.sum())
    words = (f"{float(bias[head, row, key]):.3g} is added to the score of key {key} in row {row} of batch "
             f"{at['batch']}, head {at['head']}")  # fmt: skip
    if many > 1:
        words += f", and something to {many - 1:,} more"
    return Hypothesis("scores shifted", words, ("scores", "probs"), changes, at)


def _slope_of(bias: torch.Tensor) -> float | None:
    """What a bias of one head, ``[Sq, Sk]``, falls by for each key of distance; None where it is not straight."""
    rows, keys = bias.shape
    row = torch.arange(rows, device=bias.device)[:, None] + (keys - rows)
    far = (row - torch.arange(keys, device=bias.device)[None, :]).abs().double()
    known = bias.isfinite()
    levels = [t - (t * known).nan_to_num(0.0).sum(dim=-1, keepdim=True) / known.sum(dim=-1, keepdim=True).clamp_min(1)
              for t in (bias.masked_fill(~known, 0.0), far)]  # fmt: skip
    steps, far = (level[known] for level in levels)
    slope = float((steps * far).sum() / (far * far).sum().clamp_min(1e-12))
    straight = (steps - slope * far).abs() <= 0.03 + 0.02 * abs(slope) * far.abs()
    return (slope if abs(slope) > 1e-4 else 0.0) if bool(straight.all()) else None
