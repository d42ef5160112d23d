"""Records of cases as tables and sentences: who keeps how many, in which mode, and how a break is asked again."""

from __future__ import annotations

from flashcore.records import Trial
from flashcore.surveys.invariance import facts, ways

PAIRS = {"alone, batch": [900, 900], "alone, pages": [99, 100]}


def record(backend: str, mode: str, broken: int = 0, status: str = "ok", **more) -> Trial:
    data = {"mode": mode, "cases": 1000, "kept": 1000 - broken, "broken": broken, "subjects": 80, "pairs": PAIRS,
            "stopped": "all were asked", "role": "ours", "breaks": [], **more}  # fmt: skip
    reason = f"{broken} of 1,000 cases are broken." if status == "failed" else None
    return Trial(kind="invariance", backend=backend, variant=mode, status=status, data=data, reason=reason)


BREAK = {"pair": "alone, pages", "said": "broken: 1 of 2 rows differ", "line": "print(compare('<x>'))"}


def test_kinds_are_those_of_the_ways():
    assert facts.KINDS == ways.KINDS and len(facts.PAIRS) == 10


def test_each_implementation_and_mode_is_a_row_with_its_pairs():
    found = facts.table([record("fa3", "ordinary", 7, role="peer"), record("hopper", "ordinary", 3),
                         record("hopper", "invariant")])  # fmt: skip
    assert list(found.columns) == ["backend", "mode", "kept", "sequences", "alone, batch", "alone, pages", "result"]
    assert found.values.tolist() == [
        ["hopper", "invariant", "1,000 of 1,000", 80, "900 of 900", "99 of 100", "all kept"],
        ["hopper", "ordinary", "997 of 1,000", 80, "900 of 900", "99 of 100", "breaks some, and promises nothing"],
        ["fa3", "ordinary", "993 of 1,000", 80, "900 of 900", "99 of 100", "breaks some, and promises nothing"],
    ]
    assert facts.table([]).empty


def test_a_row_says_what_went_wrong():
    rows = [
        record("a", "invariant", 2, "failed"),
        record("b", "ordinary", stopped="the time ran out"),
        Trial(kind="invariance", backend="c", variant="invariant", status="unsupported", reason="it refuses"),
        Trial(kind="invariance", backend="d", variant="ordinary", status="error", reason="its process died"),
    ]
    assert facts.table(rows)["result"].tolist() == [
        "BROKEN: 2 of 1,000 cases are broken.", "unsupported: it refuses", "all kept; then the time ran out",
        "ERROR: its process died",
    ]  # fmt: skip


def test_of_what_was_asked_again_the_last_counts():
    found = facts.records_of([record("a", "invariant", 2, "failed"), record("a", "invariant"), Trial(kind="ceiling")])
    assert [t.status for t in found] == ["ok"]


def test_breaks_come_with_the_line_that_asks_them_again():
    found = facts.breaks_table([record("a", "ordinary", 1, breaks=[BREAK]), record("b", "invariant")])
    assert found.values.tolist() == [["a", "ordinary", "alone, pages", BREAK["said"], BREAK["line"]]]
    assert facts.breaks_table([]).empty


def test_the_sentence_counts_what_is_promised_first():
    trials = [
        record("sdpa-math", "ordinary", 10, role="peer"),
        record("hopper", "invariant"),
        record("hopper", "ordinary"),
    ]
    assert facts.sentence(trials) == (
        "hopper keeps 1,000 of 1,000 cases in the batch-invariant mode; in the ordinary mode, which promises nothing: "
        "hopper 1,000 of 1,000, sdpa-math 990 of 1,000"
    )
    assert facts.sentence(trials[:1]).startswith("nothing here promises the same bits; in the ordinary mode")
    assert facts.sentence([]) == "no case was asked"
    refused = record("cpu", "invariant", status="unsupported", cases=0, kept=0)
    assert facts.sentence([refused, *trials[:1]]) == facts.sentence(trials[:1]), "it keeps none of none"
