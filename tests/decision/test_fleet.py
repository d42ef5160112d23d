"""Which cards are off their fleet, and why: SYNTHETIC fleets with one card that is not as the others."""

from __future__ import annotations

import json
import random
import statistics

import pytest
from support import synthetic_fleet as synthetic

from flashcore.decision import fleet
from flashcore.records import Trial


def only(found: fleet.Fleet) -> fleet.Off:
    [off] = found.off
    assert off.card == "GPU-00000007" and not found.ok
    return off


def test_cards_that_are_alike_are_none_of_them_off():
    found = fleet.judge(synthetic.cards())
    assert found.ok and found.off == () and found.sentences() == ["0 of 8 cards are off (8 × NVIDIA H200)."]


@pytest.mark.parametrize(
    ("odd", "what", "why"),
    [
        ({"factors": {"attention": 0.9}, "load": {"sm_clock_mhz": 1500.0, "throttle_reasons": ["hardware slowdown"]}},
         "Attention, D=64 574 TFLOPS, 10.",
         ["it was held down by hardware slowdown", "its SM clock was 1,500 MHz beside 1,830"]),
        ({"factors": {"matmul_bf16": 0.9}, "load": {"temperature_c": 84.0}}, "bfloat16 product 646 TFLOPS",
         ["it was hotter, 84 °C beside 58"]),
        ({"factors": {"copy_bandwidth": 0.9}}, "Memory copy 3.68 TB/s", ["its memory is slower"]),
        ({"factors": {"copy_bandwidth": 0.9}, "load": {"memory_clock_mhz": 2600.0}}, "Memory copy",
         ["its Memory clock was 2,600 MHz beside 3,201"]),
        ({"factors": {"small_call": 1.2}, "counters": {"power_limit_w": 500}},
         "Small call 5.74 µs, 19.6 % above the median of 4.80",
         ["its power limit is 500 W beside 700"]),
        ({"counters": {"ecc_uncorrected": 2, "rows_remapped": 3}}, "2 memory errors that ECC could not correct",
         ["3 rows of its memory were remapped after errors"]),
        ({"counters": {"pcie_width": 8, "pcie_gen": 3}, "factors": {"host_copy": 0.3}}, "PCIe width ×8 instead of ×16",
         ["its PCIe link is of generation 3 beside 5"]),
        ({"factors": {"graph_node": 1.5}, "counters": {"others": 4}}, "Smallest kernel",
         ["4 other processes use it"]),
        ({"counters": {"remap_failed": True}}, "a row of its memory could not be remapped", []),
        ({"bits": {"hopper": ["ffff"]}}, "hopper gives other bits than on 7 other cards", []),
        ({"bits": {"wmma": ["bb22", "cc33"]}}, "wmma gives other bits each time", []),
        ({"wrong": ["hopper: out differs"]}, "wrong results (hopper: out differs)", []),
        ({"factors": {"attention": 0.85}}, "Attention, D=64", []),
    ],
)  # fmt: skip
def test_a_card_that_is_not_as_the_others_is_named_with_the_reason(odd, what, why):
    off = only(fleet.judge(synthetic.cards(**odd)))
    assert any(said.startswith(what) for said in off.what), off.what
    assert list(off.why) == why
    assert off.sentence.endswith(f", since {'; '.join(why)}." if why else ", and its counters do not say why.")


def test_a_reason_is_what_half_of_the_others_share_at_the_most():
    def why(sharing: int) -> tuple[str, ...]:
        slow = {"load": {"throttle_reasons": ["hardware slowdown"]}}
        others = [synthetic.card(i, **(slow if i < sharing else {})) for i in range(6)]
        return only(fleet.judge([*others, synthetic.card(7, factors={"attention": 0.8}, **slow)])).why

    assert why(3) == ("it was held down by hardware slowdown",) and why(4) == ()


def test_other_processes_are_counted_from_none_where_no_other_card_tells_of_any():
    silent = [synthetic.card(i, counters={"others": None}) for i in range(7)]
    for others, why in ((1, ()), (2, ("2 other processes use it",))):
        odd = synthetic.card(7, factors={"attention": 0.8}, counters={"others": others})
        assert only(fleet.judge([*silent, odd])).why == why


def test_what_all_cards_share_is_no_reason():
    everywhere = [synthetic.card(i, load={"throttle_reasons": ["hardware slowdown"]}, counters={"pcie_width": 8})
                  for i in range(7)]  # fmt: skip
    odd = synthetic.card(7, factors={"attention": 0.8}, load={"throttle_reasons": ["hardware slowdown"]},
                         counters={"pcie_width": 8})  # fmt: skip
    assert only(fleet.judge([*everywhere, odd])).why == ()


def test_a_card_that_is_better_than_the_others_is_not_off():
    assert fleet.judge(synthetic.cards(factors={"attention": 1.3, "small_call": 0.5})).ok


def test_nearly_half_of_the_cards_may_be_off_and_are_found():
    trials = [synthetic.card(i, factors={"attention": 0.8 if i < 3 else 1.0}) for i in range(8)]
    assert [one.card for one in fleet.judge(trials).off] == [f"GPU-{i:08x}" for i in range(3)]


def test_of_two_cards_that_differ_none_is_named_and_the_page_says_so():
    found = fleet.judge(synthetic.cards(2, factors={"attention": 0.5}))
    assert found.off == () and "2 × NVIDIA H200 are too few to name one of them" in found.sentences()[1]
    assert found.kinds[0].spreads[0].percent > 60


def test_two_cards_that_give_other_bits_are_not_ok_though_neither_is_named():
    found = fleet.judge(synthetic.cards(2, bits={"hopper": ["ffff"]}))
    assert found.off == () and not found.ok
    assert any("The cards do not agree on the bits of hopper" in said for said in found.sentences())


def test_cards_of_different_kinds_are_each_compared_with_their_own():
    slow = [synthetic.card(i + 8, kind="NVIDIA H100", factors={"attention": 0.7}, bits={"hopper": ["cc"]})
            for i in range(4)]  # fmt: skip
    found = fleet.judge([*synthetic.cards(), *slow])
    assert found.ok and [kind.name for kind in found.kinds] == ["NVIDIA H100", "NVIDIA H200"]


def test_a_card_that_could_not_be_measured_is_off():
    data = {"what": "card", "kind": "NVIDIA H200"}
    lost = Trial(kind="fleet", status="error", reason="its worker is gone", data=data,
                 card=synthetic.card(7).card, node="box")  # fmt: skip
    off = only(fleet.judge([*synthetic.cards()[:7], lost]))
    assert "it could not be measured (its worker is gone)" in off.what
    silent = only(fleet.judge([*synthetic.cards()[:7], lost.model_copy(update={"reason": None})]))
    assert "it could not be measured (no reason recorded)" in silent.what
    assert fleet.judge([synthetic.card(0)]).kinds[0].remarks == (), "alone it is compared with nobody"


def test_the_last_record_of_a_card_counts_and_records_without_sense_break_nothing():
    again = [*synthetic.cards(factors={"attention": 0.5}), synthetic.card(7)]
    assert fleet.judge(again).ok and len(fleet.cards_of(again)) == 8
    ordered = [synthetic.card(1, node="a"), synthetic.card(2, node="a"), synthetic.card(0, node="b")]
    assert fleet.cards_of(ordered[::-1]) == ordered
    for data in ({"figures": 3}, {"figures": {"attention": None}}, {"load": []}, {"counters": "x"}, {"bits": {"a": 1}},
                 {"figures": {"attention": {"value": float("nan")}}}):  # fmt: skip
        trials = synthetic.cards()
        trials[3] = trials[3].model_copy(update={"data": trials[3].data | data})
        json.dumps(fleet.judge(trials).as_dict())
    assert fleet.judge([]).kinds == ()


def test_what_is_no_figure_is_not_measured_and_a_figure_of_ones_own_judges_nothing():
    assert only(fleet.judge(synthetic.cards(factors={"attention": 0.0}))).what == ("Attention, D=64: not measured",)
    trials = synthetic.cards()
    for number, trial in enumerate(trials):
        trial.data["figures"] |= {"my_own": {"value": 10.0**number, "unit": "x"}, "nobody_s": {"value": None}}
    found = fleet.judge(trials)
    assert found.ok and {s.title: (s.unit, s.n) for s in found.kinds[0].spreads}["my own"] == ("x", 8)
    assert "nobody s" not in {s.title for s in found.kinds[0].spreads}


def test_a_card_alone_is_off_by_its_own_counters():
    [off] = fleet.judge([synthetic.card(0, counters={"pcie_width": 8})]).off
    assert off.what == ("PCIe width ×8 instead of ×16",)


def test_the_json_holds_all_of_it():
    told = json.loads(json.dumps(fleet.judge(synthetic.cards(factors={"attention": 0.5})).as_dict()))
    assert told["ok"] is False and told["off"][0]["card"] == "GPU-00000007" and len(told["kinds"][0]["cards"]) == 8
    spread = told["kinds"][0]["spreads"][0]
    assert spread["name"] == "attention" and spread["limit"] < spread["median"] and spread["percent"] > 40


def test_the_limit_is_three_and_a_half_deviations_where_these_exceed_the_floor():
    source = random.Random(0)
    values = [source.gauss(100.0, 10.0) for _ in range(101)]
    trials = [synthetic.card(i) for i in range(101)]
    for trial, value in zip(trials, values, strict=True):
        trial.data["figures"]["attention"]["value"] = value
    [spread] = [one for one in fleet.judge(trials).kinds[0].spreads if one.name == "attention"]
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(v - median) for v in values)
    assert spread.limit == pytest.approx(median - 3.5 * deviation) and 7 < deviation < 13
