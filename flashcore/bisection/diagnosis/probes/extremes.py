"""Probe scores that run far: lifted ones, and products that float16 does not hold."""

from __future__ import annotations

from collections.abc import Callable

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import mask_of, simulate
from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.measure import check

LIFTS = (8.0, 12.0, 16.0, 40.0, 80.0, 100.0, 150.0, -40.0, -80.0, -110.0, -150.0, -200.0)
"""What is added to all scores of a row, which may change nothing."""

UNDERFLOWS = (-103.3, -87.3)
"""Where exp ends in float32, with numbers below its normal ones and without."""
HELD, NOT_HELD = 30_000.0, 80_000.0
"""Products of Q and K that float16 holds, and does not hold."""

FLOAT16_MAX = 65_504


def lifted(inquiry: Inquiry) -> str | None:
    problem, device = inquiry.problem, inquiry.candidate.device
    if problem.scale == 0 or abs(150 / problem.scale) > 3e4 or inquiry.candidate.rounds_scores:
        return None
    q, k = reading.anchored(problem, device, 0.125)
    v = check.make_case(problem, 1, "normal", "bhsd", device).v
    k = k.clone()
    base = k[..., 0].clone()

    def showed(lift: float) -> str | None:
        """What is wrong of rows whose scores are all so much higher."""
        k[..., 0] = (base.float() + lift / problem.scale).to(k.dtype)
        got = inquiry.candidate(q, k, v, problem).out.double()
        wanted = simulate(q, k, v, problem, inquiry.state)[0]
        bad = ~((got - wanted).abs() <= 0.05 + 0.05 * wanted.abs()) & wanted.isfinite()
        if not bool(bad.any()):
            return None
        gone = bad & (got.abs() < 1e-3 * wanted.abs())
        if bool(got.isnan().any()):
            return "NaN"
        return "Inf" if bool(got.isinf().any()) else "vanished" if bool(gone.sum() > 0.5 * bad.sum()) else "wrong"

    if showed(0.0):
        return None  # it is wrong without a lift too, which other probes look into
    failed = {lift: what for lift in LIFTS if (what := showed(lift))}
    if not failed:
        return None
    up = min((x for x in failed if x > 0), default=None)
    if up is not None and failed[up] in ("NaN", "Inf"):
        dtype = "float16" if up <= 16 else "float32"
        words = (f"no maximum is subtracted before exp: rows whose scores are near {up:g} give {failed[up]} "
                 f"(exp in {dtype} overflows)")  # fmt: skip
        return inquiry.add(Hypothesis("no maximum subtracted", words, ("row_max", "probs"), {"no_max": dtype}))
    down = max((x for x in failed if x < 0), default=None)
    if up is None and failed[down] == "vanished":
        words = (f"rows whose scores are near {down:g} vanish: the reference that is subtracted, or that of a part "
                 "without keys, is {} or higher")  # fmt: skip
        for least in _where_it_starts(showed, down):
            held = Hypothesis("maximum starts too high", f"{words.format(f'about {least:.0f}' if least else '0')}, as "
                              "where a maximum starts there, and not at -inf", ("row_max", "out"),
                              {"least_max": least})  # fmt: skip
            if inquiry.explains_most(held):
                return inquiry.add(held)
        return inquiry.suspect(("row_max", "out"), words.format("0"))
    if up is None or failed[up] == "wrong":
        return None  # scores of that size may be rounded too much, which the probe of precision looks into
    words = f"adding {up:g} to all scores of a row makes its result vanish, which it may not"
    return inquiry.suspect(("row_max", "scores"), words)


def _where_it_starts(showed: Callable[[float], str | None], down: float) -> list[float]:
    """Where a maximum may start, from the lift at which rows vanish; `down` is one at which they do."""
    low, high = down, min((lift for lift in (*LIFTS, 0.0) if down < lift <= 0), default=0.0)
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (middle, high) if showed(middle) else (low, middle)
    starts = [high - end for end in UNDERFLOWS]
    return [0.0] if starts[1] < 4 and starts[0] > -4 else [start for start in starts if start < 0]


def far(inquiry: Inquiry) -> str | None:
    """Products of Q and K that float16 does not hold, beside some that it holds."""
    problem = inquiry.problem
    if problem.head_dim < 2 or problem.seqlen_k < 2 or inquiry.state.no_max is not None:
        return None
    near, found = (reading.read_far(inquiry.candidate, problem, product) for product in (HELD, NOT_HELD))
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
        if problem.scale < 0 and bool((~near[:, rows].isfinite()).any()) and inquiry.explains_most(smallest):
            return inquiry.add(smallest)
        return None  # it is wrong without an overflow too, which other probes look into
    even, odd = found[:, rows, 0], found[:, rows, 1]
    if bool(((even - 1).abs() <= 0.01).all()):
        return None
    place = {"row": int(rows.nonzero()[0])}
    if bool((~even.isfinite()).any()):
        return inquiry.add(Hypothesis(
            "scores in 16 bits", f"products of Q and K past {FLOAT16_MAX} become infinite: scores are kept in "
            "float16 before they are scaled", ("scores",), {"scores_rounded": True}, place))  # fmt: skip
    if bool(((even == 0) & (odd == 0)).any()):
        words = (f"rows with products of Q and K past {FLOAT16_MAX} become 0: scores are kept in float16 before "
                 "they are scaled, and the NaN of an overflow is hidden")  # fmt: skip
        return inquiry.add(Hypothesis("scores in 16 bits", words, ("scores",), {"scores_rounded": True}, place))
    if bool((odd > 0.01).any()):
        words = (f"scores that float16 does not hold (products of Q and K past {FLOAT16_MAX}) are set to 0, so "
                 "that the largest keys of a row count like any other")  # fmt: skip
        return inquiry.add(Hypothesis("overflow set to 0", words, ("scores",), {"overflow": 0.0}, place))
    words = f"keys whose products with Q are past {FLOAT16_MAX} lose their weight"
    return inquiry.suspect(("scores", "probs"), words, place)
