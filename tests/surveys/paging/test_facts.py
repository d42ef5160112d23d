"""Reading the records of a survey of paging again: the last of each thing counts, and wrong or foreign times do not."""

from __future__ import annotations

import pytest
from support import synthetic_paging as synthetic
from support import synthetic_records

from flashcore.records import Trial
from flashcore.surveys.paging import facts

EVERYTHING = synthetic.everything()


def test_records_of_paging_and_of_one_thing():
    others = [Trial(kind="correctness", backend="cpu"), Trial(kind="ceiling", data={"what": "memory"})]
    assert facts.paging_trials([*others, *EVERYTHING]) == EVERYTHING
    found = facts.paging_trials([*others, *EVERYTHING], "memory")
    assert [t.data for t in found] == [t.data for t in synthetic.memory()] and all(t in EVERYTHING for t in found)
    assert facts.paging_trials(others) == facts.paging_trials(EVERYTHING, "speed") == []


def test_of_what_was_measured_again_the_last_that_succeeded_counts():
    first = synthetic.memory()
    again = first[0].model_copy(update={"data": {**first[0].data, "saved_percent": 71.0}})
    failed = first[1].model_copy(update={"status": "error", "reason": "full"})
    found = facts.measured([*first, again, failed], "memory", "case")
    assert [t.data["case"] for t in found] == ["shared_prefix", "mixed_lengths", "no_sharing"], (
        "in the order first seen"
    )
    assert [t.data["saved_percent"] for t in found] == [71.0, 47.1, -0.8]
    assert len(facts.measured([*first, again], "memory")) == 4, "without keys every one counts"


@pytest.mark.parametrize("change", [
    {"status": "failed"}, {"status": "error"}, {"timing": None}, {"timing": synthetic.timing(0.0)},
    {"timing": synthetic.timing(9.0, method="host")}, {"timing": synthetic.timing(9.0, method="events")},
])  # fmt: skip
def test_a_time_counts_when_it_is_right_and_of_a_gpu(change):
    trials = synthetic.other_times()
    assert len(facts.timed(trials, "prefill")) == 4
    assert len(facts.timed([trials[0].model_copy(update=change), *trials[1:]], "prefill")) == 3
    later = trials[0].model_copy(update={"timing": synthetic.timing(1.0)})
    assert facts.timed([*trials, later], "prefill")[0].timing.latency_us == 1.0
    assert facts.timed([trials[0], later.model_copy(update=change)], "prefill") == [trials[0]]


def test_troubles_are_those_that_last():
    bad = synthetic.correctness()[0].model_copy(update={"status": "failed", "reason": "wrong"})
    assert facts.troubles(EVERYTHING) == []
    assert facts.troubles([*EVERYTHING, bad]) == [bad]
    assert facts.troubles([bad, *EVERYTHING]) == [], "it was measured again and is right"
    gone = bad.model_copy(update={"status": "unavailable"})
    assert facts.troubles([*EVERYTHING, gone]) == [gone]
    assert facts.troubles([*EVERYTHING, bad.model_copy(update={"status": "unsupported"})]) == []
    other_group = bad.model_copy(update={"data": {**bad.data, "group": "heads"}})
    assert facts.troubles([bad, *EVERYTHING, other_group]) == [other_group]


def test_a_shapes_decode_step_with_all_its_ways():
    first, *rest = facts.decodes(EVERYTHING)
    assert [d.problem for d in (first, *rest)] == list(synthetic.FULL.decode)
    assert first.every.variant == "all pages" and first.floor_us == first.every.data["floor_us"]
    assert first.peer.variant == "dense" and set(first.selected) == {"top_k", "sink_window"}
    assert [t.data["share"] for t in first.selected["top_k"]] == [0.1, 0.3, 0.5, 1.0]
    assert first.nearest("top_k", 0.3).variant == "top_k 30 %"
    assert first.nearest("top_k", 0.2) is None and first.nearest("oracle", 0.3) is None


def test_the_fastest_dense_step_is_the_peer_and_a_shape_may_lack_one():
    decode = synthetic.decode_of(synthetic.FULL.decode[0])
    dense = decode[-1]
    faster = dense.model_copy(update={"variant": "dense, group as rows", "timing": synthetic.timing(1.0)})
    assert facts.decodes([*decode, faster])[0].peer == faster
    wrong = faster.model_copy(update={"status": "failed"})
    assert facts.decodes([*decode, wrong])[0].peer == dense
    (alone,) = facts.decodes(decode[1:-1])
    assert alone.every is None and alone.peer is None and alone.floor_us is None
    assert facts.decodes([]) == []


def test_rates_of_tokens_by_shape_in_order_of_the_batch():
    tokens = synthetic.tokens()
    odd = tokens[0].model_copy(update={"variant": "odd", "data": {**tokens[0].data, "tokens_per_s": "NaN"}})
    found = facts.tokens_by_shape([odd, *reversed(tokens)])
    assert set(found) == {"model", "report"}
    assert [t.data["batch"] for t in found["model"]] == list(synthetic.FULL.batches)
    assert facts.tokens_by_shape([odd]) == {}


def test_checks_are_added_up_over_the_groups_of_a_backend():
    trials = synthetic.correctness()
    worse = trials[1].model_copy(update={"data": {**trials[1].data, "worst_share_of_bound": 0.9, "unsupported": 2}})
    nothing = {"right": 0, "wrong": 0, "unsupported": 4, "elements": 0, "worst_share_of_bound": None}
    empty = trials[2].model_copy(update={"data": {**trials[2].data, **nothing}})
    case = trials[0].model_copy(
        update={"variant": "case", "data": {"what": "correctness", "group": "heads", "right": 7}}
    )
    found = facts.checks_by_backend([*trials, worse, empty, case])
    assert set(found) == {"decode", "hopper-paged", "reference"}
    assert found["decode"] == {
        "right": 24, "wrong": 0, "unsupported": 6, "elements": 2 * 123_456, "worst": 0.9,
        "groups": ["page sizes", "policies"],
    }  # fmt: skip
    assert found["reference"]["worst"] == 0.4


@pytest.mark.parametrize(("lost", "words"), [(0, "FOUND"), (128, "LOST"), (40, "LOST by 40 of 128 queries")])
def test_a_needle_in_words(lost, words):
    trial = Trial(kind="paging", environment=synthetic_records.ENV_ID, data={"lost": lost, "queries": 128})
    assert facts.verdict_on_needle(trial) == words
