"""Probe with a maximum that moves from page to page: faults of the loop over pages of keys, tried by simulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import RIGHT, simulate
from flashcore.bisection.diagnosis.hypotheses import Hypothesis, first_of
from flashcore.bisection.diagnosis.pages import PART_FAULTS, Loop, LoopFault
from flashcore.bisection.diagnosis.predicting import EXPLAINED, given_to, is_blunt, share_of
from flashcore.bisection.diagnosis.probes import weights
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.bisection.diagnosis.screening import Inputs, Screened, screen_one
from flashcore.problem import Problem

LOOP_SIZES = (64, 128, 32, 16, 256, 96, 176, 80, 160)
PAGE_FAULTS: tuple[LoopFault, ...] = (
    "accum not rescaled", "row_sum not rescaled", "neither rescaled", "neighbour's factor", "inverse factor",
    "accum overwritten", "row_sum overwritten", "factor of base 2",
)  # fmt: skip
"""Faults that may happen on one page alone."""
ROW_TILES = (64, 128, 32, 16)
"""Numbers of rows after which a state may be carried over."""
MOVING = ("rising", "steep")
"""Inputs whose maximum moves a little, and much."""
MOST_PAGES = 80
"""Pages of a loop that is simulated."""


def loops_of(problem: Problem) -> Iterator[list[Loop]]:
    """Faults of the page loop that may explain a call: those that fit together, the plainest first."""
    keys = problem.seqlen_k
    sizes = list(dict.fromkeys(s for s in (problem.page_size, *LOOP_SIZES) if keys / MOST_PAGES <= s < keys))
    cut = [-(-keys // parts) for parts in range(2, 9)]
    whole = [kind for kind in get_args(LoopFault) if kind not in PART_FAULTS]
    yield [Loop(kind, size, None, backwards) for size in sizes for backwards in (False, True) for kind in whole]
    yield [Loop(kind, size) for size in dict.fromkeys([*sizes, *cut]) for kind in PART_FAULTS]
    for size in sizes:
        last = -(-keys // size) - 1
        yield [Loop(kind, size, page, backwards) for page in sorted({1, 2, 3, 4, last}) if 0 < page <= last
               for backwards in (False, True) for kind in PAGE_FAULTS]  # fmt: skip


def words_of(loop: Loop) -> tuple[str, tuple[str, ...]]:
    if loop.kind in PART_FAULTS:
        what = {
            "pages averaged": "each part is normalised by itself and the results are averaged",
            "parts not weighed": "sums of parts are added up, each taken against the maximum of its own part",
            "parts weighed in base 2": "parts are weighed by 2 to the power of their lse, where base e is meant",
            "parts weighed by log2": "parts are weighed by exp of an lse of base 2",
            "parts weighed by their maximum": "parts are weighed by their maxima alone, without their sums",
        }[loop.kind]
        return f"{what}, where a part is {loop.page_size} keys", ("rescale", "out")
    where = "on every page" if loop.page is None else f"on page {loop.page}"
    order = ", last page first" if loop.backwards else ""
    pages = f"{where} of {loop.page_size} keys{order}"
    both, accum, row_sum = ("rescale",), ("accum",), ("row_sum",)
    late = "{} left as they were where the maximum moves by less than a factor of {}, and it moves all the same"
    warps = "the accumulator is rescaled only where {} rows in a row all need it"
    words = {
        "accum not rescaled": ("the accumulator is not rescaled when the maximum moves", accum),
        "row_sum not rescaled": ("row_sum is not rescaled when the maximum moves", row_sum),
        "neither rescaled": ("neither the accumulator nor row_sum is rescaled when the maximum moves", both),
        "neighbour's factor": ("the accumulator is rescaled by the factor of the row before", accum),
        "inverse factor": ("the rescale factor is exp(new - old) where exp(old - new) is meant", both),
        "accum overwritten": ("the accumulator is overwritten instead of added to", accum),
        "row_sum overwritten": ("row_sum is overwritten instead of added to", row_sum),
        "factor of base 2": ("the rescale factor is of base 2 where base e is meant", both),
        "accum factor twice": ("the accumulator is multiplied by the rescale factor twice", accum),
        "factor twice": ("the rescale factor is applied twice", both),
        "factor without the scale": ("the rescale factor is made of maxima that lack the scale", both),
        "factor scaled twice": ("the scale is applied twice within the rescale factor", both),
        "accum rescaled late": ("the accumulator is rescaled after the page was added to it, and not before", accum),
        "rescaled late": ("accumulator and row_sum are rescaled after the page was added, and not before", both),
        "accum not rescaled below 2^8": (late.format("the accumulator's numbers are", "2^8"), accum),
        "accum not rescaled below e^8": (late.format("the accumulator's numbers are", "e^8"), accum),
        "neither rescaled below 2^8": (late.format("accumulator and row_sum are", "2^8"), both),
        "neither rescaled below e^8": (late.format("accumulator and row_sum are", "e^8"), both),
        "factor of a column": ("the accumulator's factors are laid along its columns, where each is a row's", accum),
        "rescaled by warps of 8": (warps.format(8), accum),
        "rescaled by warps of 16": (warps.format(16), accum),
        "rescaled by warps of 32": (warps.format(32), accum),
    }[loop.kind]
    return f"{words[0]}, {pages}", words[1]


def moving_maximum(inquiry: Inquiry) -> str | None:
    """Faults of the page loop, tried on a failing call that nothing explains so far."""
    if any(not s.stages or not s.place for s in inquiry.suspicions) or any(h.by_rounding for h in inquiry.found):
        return None  # nothing that pages could explain
    left = [s for s in inquiry.unexplained() if s.inputs.problem.seqlen_k > min(LOOP_SIZES)]
    if not left:
        return None
    sharp = [s for s in left if not is_blunt(s, inquiry.candidate)]
    if not sharp:
        return _unnamed_loop(inquiry, left[0])
    left = sharp
    one = min(left, key=lambda s: (s.inputs.pattern not in ("rising", "normal"), s.inputs.problem.seqlen_k))
    q, k, v = given_to(one, inquiry.candidate)
    problem = one.inputs.problem
    small = _first_group(inquiry, problem, q, k, v, one)
    best: tuple[float, Loop] | None = None
    for together in loops_of(problem):
        shares = [(share_of(*small(loop), one, inquiry.candidate)[0], loop) for loop in together]
        fit = [loop for share, loop in shares if share >= EXPLAINED]
        if fit:
            best = (1.0, fit[0] if len(fit) == 1 else _of_all_calls(inquiry, fit, left))
            break
        highest = max(shares, key=lambda tried: tried[0], default=(0.0, None))
        best = highest if highest[0] > (best[0] if best else 0.5) else best
    if best is None or best[0] < 0.9:
        return _carried(inquiry, one, q, k, v) or _unnamed_loop(inquiry, one)
    if best[0] >= EXPLAINED:
        inquiry.suspicions.clear()  # what was seen of it in the weights
    elif inquiry.suspicions:
        return None
    loop = best[1]
    words, stages = words_of(loop)
    return inquiry.add(Hypothesis(loop.kind, words, stages, {"loop": loop},
                               {"page": loop.page} if loop.page is not None else {}))  # fmt: skip


def _of_all_calls(inquiry: Inquiry, fit: list[Loop], wrong: list[Screened]) -> Loop:
    """Of loops that explain one call alike, the first of those that are most like the function in other calls too."""
    problem = wrong[0].inputs.problem
    others = [Inputs(problem, pattern) for pattern in MOVING if pattern not in {s.inputs.pattern for s in wrong}]
    right = [
        one for one in (screen_one(inquiry.candidate, inputs) for inputs in others) if one.answer and not one.wrong
    ]

    def alike(loop: Loop) -> float:
        state = inquiry.state.with_(loop=loop)
        return sum(share_of(one.answer.out, simulate(*given_to(one, inquiry.candidate), one.inputs.problem, state)[0],
                            one, inquiry.candidate)[0] for one in [*wrong, *right])  # fmt: skip

    return max(fit, key=alike)


def _carried(inquiry: Inquiry, one: Screened, q, k, v) -> str | None:
    """Rows that go on from the state in which the rows of the tile before ended."""
    problem = one.inputs.problem
    for what in ("row_sum", "all"):
        for tile in (s for s in ROW_TILES if s < problem.seqlen_q):
            told = {"carried": (what, tile)}
            predicted = simulate(q, k, v, problem, RIGHT.with_(**told))[0]
            if share_of(one.answer.out, predicted, one, inquiry.candidate)[0] >= EXPLAINED:
                inquiry.suspicions.clear()
                inquiry.found.clear()
                inquiry.state = RIGHT
                parts = "row_max and row_sum are" if what == "row_sum" else "row_max, row_sum and accum are"
                words = f"{parts} not reset between tiles of {tile} rows: each goes on where the one before it ended"
                stages = ("row_sum",) if what == "row_sum" else ("row_sum", "accum")
                return inquiry.add(Hypothesis("state carried over", words, stages, told, {"row": tile}))
    return None


def _first_group(inquiry: Inquiry, problem: Problem, q, k, v, one: Screened):
    """A function that gives ``got, predicted`` of one group of heads: enough to tell loops apart, and quick."""
    group = problem.num_heads_q // problem.num_heads_kv
    if inquiry.state.tells_heads_apart:
        return lambda loop: (one.answer.out, simulate(q, k, v, problem, inquiry.state.with_(loop=loop))[0])
    part = problem.with_(batch=1, num_heads_q=group, num_heads_kv=1)
    pieces = q[-1:, -group:], k[-1:, -1:], v[-1:, -1:]
    got = one.answer.out[-1:, -group:]
    return lambda loop: (got, simulate(*pieces, part, inquiry.state.with_(loop=loop))[0])


def _unnamed_loop(inquiry: Inquiry, one: Screened) -> str | None:
    """Weights of a failing call that no loop explains."""
    if inquiry.suspicions or one.inputs.problem.mathematics != inquiry.problem.mathematics:
        return None
    case = one.inputs.case(inquiry.candidate)
    lost = ~one.answer.out.isfinite() & case.out.isfinite()
    if bool(lost.any()):
        place = first_of(lost)
        stages = ("row_max", "probs", "accum" if inquiry.lse_tells() else "scores", "out")
        words = (f"{int(lost.sum()):,} elements are NaN or Inf with inputs '{one.inputs.pattern}', as where an "
                 "exponential outgrows its reference, in a page or where parts are added up")  # fmt: skip
        return inquiry.suspect(stages, words, place)
    if is_blunt(one, inquiry.candidate):
        words = (f"inputs '{one.inputs.pattern}' give a wrong result, and bounds as wide as the output there tell "
                 "no more")  # fmt: skip
        stages = ("scores", "row_max", "rescale", "probs", "row_sum", "accum", "out")
        return inquiry.suspect(stages, words, dict(one.out.first_bad or {}))
    found = reading.weights(inquiry.candidate, case.q, case.k, inquiry.problem, inquiry.state.columns)
    wanted = reading.simulated_weights(case.q, case.k, inquiry.problem, inquiry.state)
    if not bool(weights.bad_weights(inquiry, found, wanted).any()):
        return None
    return weights.suspect(inquiry, found, wanted, f"weights are wrong with inputs '{one.inputs.pattern}'")
