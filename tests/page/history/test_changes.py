"""What else changed between two runs, in words, and which of it is a regression."""

from __future__ import annotations

from support import synthetic_records as synthetic
from support.synthetic_history import KEPT, REPORT, snapshot

from flashcore.page.history import changes, timings
from flashcore.page.history.runs import Snapshot
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


def on(name="x", trials=(), **environment) -> Snapshot:
    return Snapshot(name, tuple(trials), synthetic.environment(**environment))


def said(before: Snapshot, now: Snapshot, topic: str) -> list[str]:
    return [d.sentence for d in changes.differences(timings.Pair(before, now)) if d.topic == topic]


def test_gates_that_are_new_or_gone():
    def verdict(*gates):
        return Trial(kind="verdict", data={"verdict": "GO", "gates": list(gates)})

    old, new = {"id": "a", "title": "Old", "state": "PASS"}, {"id": "b", "state": "FAIL"}
    assert said(on(trials=[verdict(old)]), on(trials=[verdict(new)]), "gate") == [
        "Gate 'b' is new: FAIL.", "Gate 'Old' was PASS and is gone.",
    ]  # fmt: skip
    assert said(on(trials=[verdict(old), verdict(new)]), on(trials=[verdict(new)]), "gate") == [], "the last counts"


def test_kernels_that_are_new_gone_or_of_other_source():
    before, now = on(kernels={"a": "1", "b": "2", "c": "3" * 40}), on(kernels={"b": "9", "c": "3" * 16, "d": "4"})
    assert said(before, now, "kernel") == [
        "Kernel a is gone (1).", "Kernel b has other source (2 → 9): this compares two kernels.",
        "Kernel d is new (4).",
    ]  # fmt: skip
    forms = [on(kernels={"a": "1", "a with options": digest}) for digest in "23"]
    assert said(forms[0], forms[1], "kernel") == [
        "The masked and batch-invariant forms of a have other source (2 → 3): this compares two kernels."
    ]
    assert said(on(kernels={"a": "1"}), forms[0], "kernel") == [
        "The masked and batch-invariant forms of a are new (2)."
    ]
    assert said(on(kernels={}), now, "kernel") == [], "a run that does not say which kernels it had is no news of them"


def test_software_and_parameters_that_changed_on_both_sides():
    before = synthetic.environment()
    facts = {**before["before"], "torch": "3.0", "driver": None}
    asked = {**before["parameters"], "seed": 7, "problems": "tiny"}
    now = on(before=facts, flashcore="9.9", parameters=asked)
    assert said(on(), now, "setting") == [
        "torch was 2.13.0 and is 3.0.", "flashcore was 0.0.0 and is 9.9.", "problems was default and is tiny.",
        "seed was 0 and is 7.",
    ]  # fmt: skip
    assert said(on(parameters="damaged"), on(), "setting") == []


def test_the_gravest_changes_come_first():
    good, bad = synthetic.correctness("wmma", REPORT), synthetic.correctness("wmma", REPORT, status="failed")
    mended, gained = synthetic.correctness("scalar", REPORT), synthetic.correctness("cpu", KEPT[0])
    worse = synthetic.correctness("scalar", REPORT, status="failed")
    found = changes.differences(timings.Pair(on(trials=[good, worse]), on(trials=[bad, mended, gained], flashcore="9")))
    assert [d.topic for d in found] == ["newly failing", "setting", "mended", "coverage gained"]
    assert [d.regression for d in found] == [True, False, False, False]


def test_what_passes_neither_then_nor_now_is_no_news():
    ceiling = Trial(kind="ceiling", data={"name": "copy", "value": 1.0})
    broken = synthetic.correctness("wmma", REPORT, status="error", reason="x")
    assert differences([ceiling, broken], [broken.model_copy(update={"status": "failed"})]) == []
