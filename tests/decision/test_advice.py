"""Options told in words and rows: what would change each, and which is recommended."""

from __future__ import annotations

import json

from support.decisions import GOOD, decide, hopper, option, without_paging

from flashcore import page
from flashcore.decision import advice


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
