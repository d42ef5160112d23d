"""What else changed between two runs, in words, and which of it is a regression."""

from __future__ import annotations

from support import synthetic_records as synthetic
from support.synthetic_history import KEPT, REPORT, snapshot

from flashcore.history import changes, timings
from flashcore.records import Trial


def differences(before, now):
    return changes.differences(timings.Pair(snapshot("before", trials=before), snapshot("now", trials=now)))


def test_a_check_that_fails_anew_is_a_regression_and_a_mended_one_is_not():
    good, bad = synthetic.correctness("wmma", REPORT), synthetic.correctness("wmma", REPORT, status="failed")
    broken = synthetic.correctness("wmma", REPORT, status="error", correctness=None, reason="it crashed")
    (found,) = differences([good], [bad])
    assert found.regression and found.topic == "newly failing" and "passed and now fails: 17 elements" in found.sentence
    (found,) = differences([good], [broken])
    assert found.regression and "does not finish: it crashed" in found.sentence
    (found,) = differences([bad], [good])
    assert not found.regression and found.sentence.endswith("failed and now passes.")
    assert differences([good, bad], [bad]) == []  # asked twice, the worse outcome counts


def test_lost_and_gained_coverage_is_counted_in_words():
    checks = [synthetic.correctness("wmma", p) for p in KEPT]
    (found,) = differences(checks, checks[:3])
    assert found.topic == "coverage lost" and "made 3 of the 12 checks of wmma" in found.sentence
    (found,) = differences(checks[:3], checks)
    assert (found.topic, found.sentence) == ("coverage gained", "New checks: wmma 9.")
    (found,) = differences(checks, [t.model_copy(update={"status": "unavailable"}) for t in checks])
    assert "made none of the 12 checks of wmma" in found.sentence


def test_a_planted_bug_that_is_no_longer_found_is_a_regression():
    found = Trial(kind="fault", backend="wmma", variant="F8", problem=REPORT, data={"fault": "F8", "outcome": "found"})
    (change,) = differences([found], [found.model_copy(update={"status": "failed", "reason": "found elsewhere"})])
    assert change.regression and "Planted bug F8 of wmma" in change.sentence


def test_gates_and_verdicts_that_changed():
    def verdict(word, state, threshold=1):
        gate = {"id": "a", "title": "A", "state": state, "threshold": threshold, "unit": "µs"}
        return Trial(kind="verdict", data={"verdict": word, "gates": [gate, "junk"]})

    said = [d.sentence for d in differences([verdict("GO", "PASS")], [verdict("NO-GO", "FAIL", 2)])]
    assert said == [
        "The verdict was GO and is NO-GO.", "Gate 'A' was PASS and is FAIL.",
        "The threshold of gate 'A' moved from 1 to 2 µs.",
    ]  # fmt: skip
    assert differences([verdict("GO", "PASS")], []) == []
