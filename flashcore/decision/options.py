"""Weigh the options of a gates file: which may ship, which of those is recommended, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flashcore.decision.flips import Change, change, farthest_first, nearest_first
from flashcore.decision.gates import Gates, Option
from flashcore.decision.judging import GateResult, State, clause

_INCOMPLETE = "The evidence is not complete, so nothing is decided."
Result = Literal["SHIP", "DO NOT SHIP", "INCONCLUSIVE"]
RESULTS: dict[State, Result] = {"PASS": "SHIP", "INCONCLUSIVE": "INCONCLUSIVE", "FAIL": "DO NOT SHIP"}
"""What an option is called whose conditions all hold, are not settled, or fail; also the order they are shown in."""
WORDS = {"PASS": "HOLDS", "FAIL": "FAILS", "INCONCLUSIVE": "INCONCLUSIVE"}
"""What a condition is called."""


@dataclass(frozen=True)
class OptionResult:
    """What the records say of one option."""

    id: str
    title: str
    means: str
    """What shipping it means, for a reader who never sees code."""
    effort: str
    risk: str
    backend: str | None
    result: Result
    conditions: tuple[GateResult, ...]
    """Each condition as it was judged, in the file's order."""
    gates: tuple[GateResult, ...]
    """The required gates that it needs besides them."""
    reason: str
    """One sentence: what decides."""
    complete: bool = True
    """Whether the evidence is; without that an option is settled neither way."""
    recommended: bool = False
    rank: GateResult | None = None
    """Its own result at the gate that options are ranked by."""
    judged_by: str = ""
    """Who judged effort and risk, and when."""

    @property
    def holding(self) -> int:
        """How many of its conditions hold."""
        return sum(c.state == "PASS" for c in self.conditions)

    @property
    def changes(self) -> tuple[Change, ...]:
        """What would turn the result over, as figures: any one of them, the nearest first, for an option that may ship;
        all of them, the farthest first, for one that may not."""
        everything = (*self.conditions, *self.gates)
        if self.result == "SHIP":
            return tuple(nearest_first(filter(None, map(change, everything))))
        return tuple(farthest_first(filter(None, (change(c) for c in everything if c.state == "FAIL"))))

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that measure what is not settled, each once."""
        unsettled = (c for c in (*self.conditions, *self.gates) if c.state == "INCONCLUSIVE" and c.fix)
        return tuple(dict.fromkeys(c.fix for c in unsettled))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and for the page."""
        conditions = [
            {
                **asdict(c),
                "state": WORDS[c.state],
                "interval": c.interval and list(c.interval),
                "confidence": c.confidence,
            }
            for c in self.conditions
        ]
        names = ("id", "title", "means", "effort", "risk", "judged_by", "backend", "result", "recommended", "reason")
        more = {"changes": [asdict(c) for c in self.changes], "measure": list(self.commands), "conditions": conditions}
        return {**{name: getattr(self, name) for name in names}, **more}


def all_of(states: Iterable[State]) -> State:
    """FAIL when one fails, whatever the others turn out to be; PASS when every one passes; else not settled."""
    states = list(states)
    return "FAIL" if "FAIL" in states else "PASS" if all(s == "PASS" for s in states) else "INCONCLUSIVE"


def weigh(
    gates: Gates, judged: Mapping[str, Sequence[GateResult]], required: Sequence[GateResult], *, complete: bool
) -> tuple[OptionResult, ...]:
    """Weigh every option of a file.

    Parameters
    ----------
    judged
        The results of `Option.asked` by the option's id.
    required
        The results of the required gates, which every option needs besides its own conditions.
    complete
        Whether the evidence is.

    Returns
    -------
    tuple of OptionResult
        The recommended one first, then those that may ship, those not settled and those that fail; within each by
        margin at the gate that the file ranks them by, else in its order.
    """
    found = [_weigh_one(option, gates, tuple(judged[option.id]), required, complete) for option in gates.options]
    order = list(RESULTS.values())
    ranked = sorted(found, key=lambda o: (order.index(o.result), -_margin(o)))  # stable, so it keeps the file's order
    shipping = [o for o in ranked if o.result == "SHIP"]
    if not shipping:
        return tuple(ranked)
    # Where the intervals overlap there is no difference: of those on a par with the first, the file's order decides.
    best = min((o for o in shipping if _on_a_par(o, shipping[0])), key=found.index)
    return (replace(best, recommended=True), *(o for o in ranked if o is not best))


def _weigh_one(option: Option, gates: Gates, conditions, required, complete: bool) -> OptionResult:
    # A required gate that the option asks of its own backend is answered by that: the best of ours may be another one.
    named = {c.id for c in conditions}
    others = tuple(g for g in required if g.id not in named)
    state = all_of(c.state for c in (*conditions, *others)) if complete else "INCONCLUSIVE"
    if state == "PASS" and (state := all_of(g.state for g in required)) != "PASS":
        others = tuple(required)  # and yet, whatever fails a required gate stops every option
    return OptionResult(
        option.id, option.title, option.means, option.effort, option.risk, option.backend, RESULTS[state],
        conditions=conditions, gates=others,
        reason=_reason(state, conditions, others) if complete else _INCOMPLETE, complete=complete,
        rank=next((c for c in conditions if c.id == gates.rank_options_by), None), judged_by=gates.options_judged_by,
    )  # fmt: skip


def _reason(state: State, conditions: Sequence[GateResult], others: Sequence[GateResult]) -> str:
    n = len(conditions)
    if state == "PASS":
        timed = [c for c in conditions if c.interval is not None and c.margin_percent is not None]
        tight = min(timed, key=lambda c: c.margin_percent, default=None)
        all_hold = f"All {n} conditions hold" if n > 1 else "Its only condition holds"
        return all_hold + (f"; the narrowest is '{tight.title}', by {tight.margin_percent:.1f} %." if tight else ".")
    one, many = ("fails", "fail") if state == "FAIL" else ("is not settled", "are not settled")
    bad = [c for c in conditions if c.state == state]
    if not bad:
        gate = next(g for g in others if g.state == state)
        return f"The required gate '{gate.title}' {one}: {clause(gate.reason)}."
    far = farthest_first(filter(None, map(change, bad)))
    first = next((c for c in bad if far and c.id == far[0].condition), bad[0])
    counted = f"{len(bad)} of {n} conditions {one if len(bad) == 1 else many}"
    return f"{counted}, foremost '{first.title}': {clause(first.reason)}."


def _margin(option: OptionResult) -> float:
    return -math.inf if option.rank is None or option.rank.margin is None else option.rank.margin


def _on_a_par(option: OptionResult, best: OptionResult) -> bool:
    """Whether the two do not differ at the gate that ranks them, by more than the intervals of their medians."""
    if _margin(option) == _margin(best):
        return True
    found = [o.rank.interval for o in (option, best) if o.rank is not None and o.rank.interval]
    return len(found) == 2 and max(low for low, _ in found) <= min(high for _, high in found)
