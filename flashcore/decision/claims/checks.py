"""Hold a claim against arithmetic, against the other claims, and against what it leaves undefined."""

from __future__ import annotations

import math
from collections.abc import Set

from flashcore.decision.claims.file import Claim, Claims
from flashcore.decision.claims.findings import (
    Check,
    Finding,
    apart,
    divided,
    latency_us,
    spaced,
    time_words,
    work,
    work_words,
)
from flashcore.decision.compare import number
from flashcore.problem import Problem

NEAR = 0.1
"""How near a ratio of two figures has to be to a count of heads for a hint that one of them is for each head."""
FEWEST_HEADS = 4
"""A ratio near a smaller count says nothing."""
NEEDS = {
    "memory_share": "what is saved, and against what",
    "tokens_per_s": "which model, how many layers and sequences",
}
"""Quantities that need a definition in words, and what it has to say."""
CAPITALS = {"latency_us": "A latency", "tflops": "A throughput", "memory_share": "A saving",
            "tokens_per_s": "A token rate", "speedup": "A speed-up"}  # fmt: skip


# ------------------------------------------------------------------------------------------------ arithmetic


def arithmetic(claim: Claim) -> list[Finding]:
    """What the claim's own figures say about each other."""
    found = []
    if claim.factors:
        product = math.prod(claim.factors)
        words = " × ".join(f"{factor:,g}" if factor % 1 else f"{factor:.0f}" for factor in claim.factors)
        size = 1e9 if claim.quantity == "work_gflop" else 1.0
        shown = work_words(product, 4) if claim.quantity == "work_gflop" else f"{number(product, 4)} {claim.unit}"
        found.append(_equal(claim, product / size, f"{words} is {shown}"))
    if claim.quantity == "work_gflop" and claim.workload is not None:
        flop = work(claim.workload, claim.share)
        part = "" if claim.share == 1 else f"{number(100 * claim.share)} % of "
        words = f"{part}4·B·H·Sq·Sk·D for {spaced(claim.workload)} is {work_words(flop)}"
        found.append(_equal(claim, flop / 1e9, words))
    return found


def _equal(claim: Claim, truth: float, words: str) -> Finding:
    figures = {"claimed": claim.number, "against": truth, "unit": claim.own_unit}
    if not apart(claim.interval, (truth, truth)):
        same = math.isclose(claim.number, truth, rel_tol=1e-3)
        agrees = ", as claimed." if same else f"; {claim.figure} agrees within its digits."
        return Finding("arithmetic", "confirmed", words + agrees, **figures)
    return Finding("arithmetic", "contradicted", f"{words}; {claim.figure} is {_off(claim.number, truth)}.", **figures)


def _off(claimed: float, truth: float) -> str:
    return f"{number(claimed / truth)} times that" if 0 < truth < math.inf else "something else"


def links(claim: Claim, claims: Claims, *, fallen: Set[str] = frozenset()) -> list[Finding]:
    """A ratio against the quotient of its two claims, and a part against its whole unless that is in `fallen`."""
    found = []
    if claim.of is not None:
        found.append(_quotient(claim, claims.get(claim.of), claims.get(claim.over)))
    if claim.part_of is not None and claim.part_of not in fallen:
        found.append(_part(claim, claims.get(claim.part_of)))
    return [finding for finding in found if finding is not None]


def _quotient(claim: Claim, of: Claim, over: Claim) -> Finding:
    allowed = divided(of.interval, over.interval)
    figures = {"claimed": claim.number, "against": of.number / over.number, "unit": "×"}
    words = f"{of.figure} over {over.figure} is {number(of.number / over.number, 4)}"
    if apart(claim.interval, allowed):
        return Finding("arithmetic", "contradicted", f"{words}, not {claim.figure}.", **figures)
    return Finding("arithmetic", "confirmed", f"{words}; {claim.figure} agrees within the digits given.", **figures)


def _part(claim: Claim, whole: Claim) -> Finding | None:
    part, all_of_it = latency_us(claim, claim.workload), latency_us(whole, whole.workload)
    if part is None or all_of_it is None:
        return None
    figures = {"claimed": part[0], "against": all_of_it[1], "unit": "µs"}
    flop = work_words(work(claim.workload, claim.share))
    rate = f" at {claim.figure.removeprefix(claim.bound or '').strip()}" if claim.quantity == "tflops" else ""
    least = f"{flop}, its share of the work, takes at least {time_words(part[0])}{rate}"
    outcome, side = ("contradicted", "more") if part[0] > all_of_it[1] else ("possible", "no more")
    sentence = f"{least}, {side} than the {time_words(all_of_it[1])} of the whole ('{whole.id}')."
    return Finding("arithmetic", outcome, sentence, **figures)


# ------------------------------------------------------------------------------------------------ contradiction


def same_thing(claims: Claims) -> dict[str, list[Claim]]:
    """For each claim the others about the same thing: linked by `same_as`, directly or not, or alike in every field."""
    group = {claim.id: claim.id for claim in claims}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    seen: dict[tuple, str] = {}
    for claim in claims:
        for other in claim.same_as:
            group[root(claim.id)] = root(other)
        if (about := _about(claim)) is not None:
            group[root(claim.id)] = root(seen.setdefault(about, claim.id))
    return {c.id: [o for o in claims if o is not c and root(o.id) == root(c.id)] for c in claims}


def _about(claim: Claim) -> tuple | None:
    """What makes two claims speak of one thing without a link; None when too little is said to tell."""
    if claim.family == "speed" and claim.workload is not None and claim.backend:
        return "speed", claim.workload, claim.share, claim.backend, claim.gpu
    if claim.quantity in ("clock_ghz", "sm_count", "peak_tflops") and claim.gpu:
        return claim.quantity, claim.gpu, claim.dtype
    return None


def against(claim: Claim, other: Claim, *, fallen: bool) -> Finding | None:
    """Compare two claims about one thing.

    Parameters
    ----------
    fallen
        Whether the other claim is already refuted on its own; then it counts neither for nor against this one.
    """
    problem = claim.workload or other.workload
    direct = claim.quantity == other.quantity
    mine, theirs = (c.interval if direct else latency_us(c, problem) for c in (claim, other))
    if mine is None or theirs is None or claim.family != other.family or claim.share != other.share:
        return None
    check: Check = "contradiction" if direct else "arithmetic"
    a, b = (claim.number, other.number) if direct else (_middle_us(claim, problem), _middle_us(other, problem))
    figures = {"claimed": a, "against": b, "unit": claim.own_unit if direct else "µs"}
    words = _pair_words(claim, other, problem, direct)
    if not apart(mine, theirs):
        outcome = "beside" if fallen else "possible" if direct else "confirmed"
        return Finding(check, outcome, f"{words}, the same within the digits given.", **figures)
    ratio = max(a, b) / min(a, b) if min(a, b) else math.inf
    gap = f"{words}, {number(ratio)} times apart" if ratio >= 1.005 else f"{words}, apart by more than their digits"
    if fallen:
        sentence = f"{gap}; but '{other.id}' falls by another check, so it does not count."
        return Finding(check, "beside", sentence, **figures)
    hint = _per_head(ratio, problem) if claim.family == "speed" else ""
    return Finding(check, "contradicted", f"{gap}.{hint}", **figures)


def _middle_us(claim: Claim, problem: Problem | None) -> float:
    if claim.quantity == "latency_us":
        return claim.number
    return work(problem, claim.share) / claim.number / 1e6


def _pair_words(claim: Claim, other: Claim, problem: Problem | None, direct: bool) -> str:
    if direct:
        return f"The same thing is said to be {other.figure} ('{other.id}') and {claim.figure}"
    rate, time = (claim, other) if claim.quantity == "tflops" else (other, claim)
    flop = work(problem, claim.share)
    named = {other.id: f" ('{other.id}')"}
    return (
        f"{work_words(flop)} at {rate.figure}{named.get(rate.id, '')} takes {time_words(_middle_us(rate, problem))}, "
        f"and the time given is {time.figure}{named.get(time.id, '')}"
    )


def _per_head(ratio: float, problem: Problem | None) -> str:
    """A hint when two times differ by about as much as the workload has heads or sequences."""
    if problem is None:
        return ""
    batch, heads = problem.batch, problem.num_heads_q
    counts = {"heads (batch times heads)": batch * heads, "heads": heads, "sequences": batch}
    for what, count in counts.items():
        off = abs(ratio / count - 1) if count >= FEWEST_HEADS else math.inf
        if off <= NEAR:
            near = max(1, math.ceil(100 * off))
            return (
                f" The workload has {count} {what}, within {near} % of that ratio: "
                "perhaps the shorter time is for one alone (a guess)."
            )
    return ""


# ------------------------------------------------------------------------------------------------ definition


def definition(claim: Claim) -> list[Finding]:
    """What the claim would have to say before anybody could check or repeat it."""
    needs_workload = claim.family == "speed" or claim.quantity in NEEDS
    lacking = ["no workload"] if needs_workload and claim.workload is None else []
    if claim.quantity in NEEDS and not claim.definition:
        lacking.append(f"no definition ({NEEDS[claim.quantity]})")
    if claim.quantity == "speedup" and claim.of is None:
        lacking.append("not the two figures it is the ratio of")
    if not lacking:
        return []
    sentence = f"{CAPITALS[claim.quantity]} of {claim.figure} that names {' and '.join(lacking)} cannot be checked."
    return [Finding("definition", "undefined", sentence, claimed=claim.number, unit=claim.own_unit)]
