"""Options told in words and rows: what would change each, and which is recommended."""

from __future__ import annotations

import json
from dataclasses import replace

from support.decisions import GOOD, decide, hopper, option, result, without_paging

from flashcore import page
from flashcore.decision import advice
from flashcore.decision.judging import GateResult
from flashcore.decision.options import OptionResult


def test_the_option_further_ahead_is_recommended_and_the_other_says_from_where_on_it_would_be():
    decision = decide([*GOOD, *hopper(600)])
    assert [o.id for o in decision.options if o.result == "SHIP"] == ["C", "B"] and decision.recommended.id == "C"
    ahead = option(decision, "C").rank.measured
    said = advice.flip(option(decision, "B"), decision.options)
    assert f"above option C's {ahead:.2f} ×" in said
    assert "option B would take its place" in decision.flip


def test_an_unmeasured_condition_is_inconclusive_and_names_its_command():
    decision = decide(without_paging(GOOD))
    b = option(decision, "B")
    missing = next(c for c in b.conditions if c.id == "memory-saved")
    assert b.result == missing.state == "INCONCLUSIVE" and missing.fix == "flashcore paging"
    assert advice.flip(b, decision.options) == "'flashcore paging' would settle it."
    row = next(r for r in advice.condition_rows(decision.options) if "Paging" in r["Condition"])
    assert row["Result"] == "INCONCLUSIVE" and "'flashcore paging' measures it" in row["Confidence"]
    assert decision.verdict == "INCONCLUSIVE" and "no option is known to hold" in decision.reason


def test_rows_frame_json_and_page_hold_the_same():
    decision = decide([*without_paging(GOOD), *hopper(600)])
    frame = advice.frame(decision.options)
    assert list(frame["Option"]) == [f"{o.id}: {o.title}" for o in decision.options]
    conditions = advice.frame(decision.options, conditions=True)
    assert len(conditions) == sum(len(o.conditions) for o in decision.options)
    assert set(conditions["Result"]) <= {"HOLDS", "FAILS", "INCONCLUSIVE"}
    data = json.loads(json.dumps(decision.as_dict()))
    assert [o["flip"] for o in data["options"]] == list(frame["What would change it"])
    html = page.options_html(decision)
    assert "SHIP, recommended" in html and html.count("<table") == 3 and html.index("<details") > html.index("<table")


# --- words -----------------------------------------------------------------------------------------------------------


def test_one_two_or_three_things_are_listed_as_one_speaks():
    assert [advice.listed(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip


def weighed(*conditions: GateResult, result_: str, name: str = "A", **changes) -> OptionResult:
    """A made-up option with these conditions."""
    fields = {
        "title": "Thing",
        "means": "m",
        "effort": "e",
        "risk": "r",
        "backend": "hopper",
        "gates": (),
        "reason": "R.",
    }
    return OptionResult(id=name, result=result_, conditions=conditions, **{**fields, **changes})


def condition(number: int, measured: float, **changes) -> GateResult:
    return replace(result(measured, 10, "at least"), id=f"c{number}", title=f"Condition {number}", **changes)


def test_the_farthest_conditions_are_told_and_the_others_counted():
    failing = weighed(*(condition(i, 10 / (i + 2)) for i in range(5)), result_="DO NOT SHIP")
    said = advice.flip(failing, [failing])
    assert said.startswith("It would ship if hopper's latency") and said.endswith("and 2 more conditions held.")
    assert said.index("6.0 times") < said.index("5.0 times") < said.index("4.0 times") and "3.0 times" not in said
    assert advice.nearest(failing).startswith("Farthest from holding: Condition 4, from 1.67 to 10 µs")
    assert advice.nearest(failing).endswith("; 4 more fail.")
    four = weighed(*(condition(i, 10 / (i + 2)) for i in range(4)), result_="DO NOT SHIP")
    assert "and 1 more condition held." in advice.flip(four, [four])


def test_what_fails_and_what_is_not_measured_both_stand_in_the_way():
    open_ = condition(1, 5.0, state="INCONCLUSIVE", fix="flashcore paging")
    again = condition(2, 5.0, state="INCONCLUSIVE", fix="flashcore paging")
    mixed = weighed(condition(0, 5.0), open_, again, result_="DO NOT SHIP")
    said = advice.flip(mixed, [mixed])
    assert "what 'flashcore paging' measures held." in said and said.count("flashcore paging") == 1
    assert "2 are not settled" in advice.nearest(mixed)
    unfinished = weighed(condition(0, 5.0), result_="INCONCLUSIVE", complete=False)
    assert advice.flip(unfinished, [unfinished]).endswith("and the run were complete.")


def test_the_recommendation_falls_with_the_nearest_of_what_it_rests_on():
    best = weighed(condition(0, 30.0), condition(1, 11.0), result_="SHIP", recommended=True)
    assert advice.flip(best, [best]).endswith("no option would be left that is known to ship.")
    assert "from 11.0 to below 10 µs" in advice.flip(best, [best])
    other = weighed(condition(0, 30.0), result_="SHIP", name="B")
    assert advice.flip(best, [best, other]).endswith("option B would take its place.")
    # What every option needs takes the others along.
    shared = replace(best, conditions=(), gates=(condition(9, 11.0),))
    assert "no option would be left" in advice.flip(shared, [shared, other])
    assert (
        advice.nearest(best) == "Nearest to failing: Condition 1, from 11.0 to below 10 µs (10.0 % of the threshold)."
    )


def test_an_option_that_ships_too_says_from_which_figure_on_it_would_be_recommended():
    rank = replace(result(1.25, 1, "at least", metric="ratio_to_best_peer"), unit="×")
    best = weighed(condition(0, 30.0), result_="SHIP", recommended=True, rank=rank)
    second = weighed(condition(0, 30.0), result_="SHIP", name="B", rank=replace(rank, measured=1.1))
    said = advice.flip(second, [best, second])
    assert said == "It may ship as well, and would be recommended above option A's 1.25 ×."
    unranked = replace(second, rank=None)
    assert advice.flip(unranked, [best, unranked]).endswith("would be recommended if A were not.")


def test_the_recommendation_counts_the_other_options_by_result():
    best = weighed(result_="SHIP", recommended=True, reason="All hold.")
    others = [weighed(result_=r, name=n) for n, r in zip("BCDE", ("SHIP", "SHIP", "INCONCLUSIVE", "DO NOT SHIP"),
                                                         strict=True)]  # fmt: skip
    assert advice.recommendation([best, *others]) == (
        "Option A (Thing) is recommended: all hold; B and C may ship too; D is not settled; E does not hold."
    )
    none = weighed(result_="INCONCLUSIVE", reason="Nothing was measured.")
    assert advice.recommendation([none]) == (
        "No option is recommended; the nearest is A (Thing): nothing was measured."
    )
    assert advice.recommendation([]) == ""


def test_a_margin_has_a_sign_a_unit_and_a_share_unless_it_is_a_share_itself():
    def row(one: GateResult) -> dict[str, str]:
        return advice.condition_rows([weighed(one, result_="SHIP")])[0]

    short, even = row(condition(0, 9.0)), row(condition(0, 10.0))
    assert (short["Result"], short["Margin"]) == ("FAILS", "−1.00 µs (−10.0 %)")
    assert (even["Result"], even["Margin"]) == ("HOLDS", "0 µs")
    share = row(condition(0, 12.0, unit="% saved"))
    assert (share["Measured"], share["Threshold"], share["Margin"]) == ("12.0 %", "at least 10 %", "+2.00 %")
    missing = row(replace(condition(0, 9.0), measured=None, margin=None, state="INCONCLUSIVE", fix="make it"))
    assert (missing["Measured"], missing["Margin"]) == ("nothing", "–")
    assert missing["Confidence"] == "nothing measured; 'make it' measures it"
