"""Tell the weighed options in words and rows: what would change each, which is recommended, and the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashcore.decision.compare import number
from flashcore.decision.flips import apart
from flashcore.decision.judging import GateResult, clause
from flashcore.decision.options import WORDS, OptionResult

if TYPE_CHECKING:
    from pandas import DataFrame

MOST_CHANGES = 3
"""So many changes are told in one sentence; the others are counted."""


def flip(option: OptionResult, options: Sequence[OptionResult]) -> str:
    """What would have to change for this option's result, or its being recommended, to be another; one sentence."""
    best = next((o for o in options if o.recommended), None)
    if option.recommended:
        return _fall(option, options)
    if option.result == "SHIP":
        return f"It may ship as well, and would be recommended {_ahead(option, best) or f'if {best.id} were not'}."
    needs = [c.words for c in option.changes[:MOST_CHANGES]]
    if more := len(option.changes) - len(needs):
        needs.append(f"{more} more condition{'s' if more > 1 else ''} held")
    if not option.complete:
        needs.append("the run were complete")
    commands = listed([f"'{command}'" for command in option.commands])
    if not needs and commands and option.result == "INCONCLUSIVE":
        return f"{commands} would settle it."
    if commands:
        needs.append(f"what {commands} measures held")
    ahead = _ahead(option, best)
    return f"It would ship if {listed(needs)}{f'; {ahead} it would be recommended' if ahead else ''}."


def _fall(option: OptionResult, options: Sequence[OptionResult]) -> str:
    """What would end the recommendation: the nearest of what it rests on."""
    near = option.changes[0]
    others = [o for o in options if o.result == "SHIP" and o is not option]
    if others and near.condition in {c.id for c in option.conditions}:  # without a required gate none of them ships
        return f"If {near.words}, option {others[0].id} would take its place."
    return f"If {near.words}, no option would be left that is known to ship."


def _ahead(option: OptionResult, best: OptionResult | None) -> str:
    """From which figure on an option would be recommended instead of the one that is, as a clause."""
    if best is None or best.rank is None or option.rank is None or best.rank.measured is None:
        return ""
    side = "above" if best.rank.comparison == "at least" else "below"
    return f"{side} option {best.id}'s {apart(best.rank.measured, math.nan)} {unit_of(best.rank)}".rstrip()


def nearest(option: OptionResult) -> str:
    """What decides, short enough for a table: the figure nearest to stopping it, or farthest from letting it."""
    if option.result == "INCONCLUSIVE":
        return flip(option, (option,))
    if not option.changes:
        return option.reason
    first, *more = option.changes
    title = next(c.title for c in (*option.conditions, *option.gates) if c.id == first.condition)
    title = title.removesuffix(f" ({option.backend})")
    if option.result == "SHIP":
        return f"Nearest to failing: {title}, from {first.figures}."
    others = f"; {len(more)} more fail{'s' if len(more) == 1 else ''}" if more else ""
    if unsettled := sum(c.state == "INCONCLUSIVE" for c in option.conditions):
        others += f"; {unsettled} {'is' if unsettled == 1 else 'are'} not settled"
    return f"Farthest from holding: {title}, from {first.figures}{others}."


def recommendation(options: Sequence[OptionResult]) -> str:
    """Which option is recommended and why, in one sentence; empty for a file without options."""
    if not options:
        return ""
    first, *others = options
    if not first.recommended:
        return f"No option is recommended; the nearest is {first.id} ({first.title}): {_clause(first.reason)}."
    rest = []
    for result, one, many in (
        ("SHIP", "may ship too", "may ship too"),
        ("INCONCLUSIVE", "is not settled", "are not settled"),
        ("DO NOT SHIP", "does not hold", "do not hold"),
    ):
        ids = [o.id for o in others if o.result == result]
        if ids:
            rest.append(f"{listed(ids)} {one if len(ids) == 1 else many}")
    return "; ".join([f"Option {first.id} ({first.title}) is recommended: {_clause(first.reason)}", *rest]) + "."


def matrix_rows(options: Sequence[OptionResult]) -> list[dict[str, str]]:
    """One row an option, as text: what the page, the terminal and a data frame show alike."""
    return [
        {
            "Option": f"{o.id}: {o.title}",
            "Result": f"{o.result}{', recommended' if o.recommended else ''}",
            "Conditions": holding(o),
            "What decides": o.reason,
            "What would change it": flip(o, options),
            "What shipping it means": o.means,
            **({"Effort": o.effort, "Risk": o.risk, "Judged by": o.judged_by} if o.judged_by else {}),
        }
        for o in options
    ]


def holding(option: OptionResult) -> str:
    """How many of an option's conditions hold."""
    return f"{option.holding} of {len(option.conditions)} {'holds' if option.holding == 1 else 'hold'}"


def condition_rows(options: Sequence[OptionResult]) -> list[dict[str, str]]:
    """One row a condition of each option: its word, figure, threshold, margin, and how sure that is."""
    rows = []
    for option in options:
        for c in option.conditions:
            unit, percent = unit_of(c), ""
            if c.margin_percent:
                percent = f" ({_signed(c.margin_percent)} %)" if unit != "%" else ""
            rows.append(
                {
                    "Option": option.id,
                    "Condition": c.title,
                    "Result": WORDS[c.state],
                    "Measured": "nothing" if c.measured is None else f"{number(c.measured)} {unit}".strip(),
                    "Threshold": f"{c.comparison} {c.threshold:g} {unit}".strip(),
                    "Margin": "–" if c.margin is None else f"{_signed(c.margin)} {unit}{percent}",
                    "Confidence": c.confidence + (f"; '{c.fix}' measures it" if c.state == "INCONCLUSIVE" else ""),
                }
            )
    return rows


def frame(options: Sequence[OptionResult], *, conditions: bool = False) -> DataFrame:
    """The matrix, or every condition, as a data frame."""
    from pandas import DataFrame

    return DataFrame(condition_rows(options) if conditions else matrix_rows(options))


def _clause(reason: str) -> str:
    """A reason, to stand behind a colon."""
    return clause(reason[:1].lower() + reason[1:])


def unit_of(result: GateResult) -> str:
    """The unit as it stands behind a figure: a share of whatever is a percentage."""
    return "%" if result.unit.startswith("%") else result.unit


def listed(items: Sequence[str]) -> str:
    """One, one and two, or one, two and three."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{number(abs(value))}" if value else "0"
