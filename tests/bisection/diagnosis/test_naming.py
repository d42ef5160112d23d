"""Names for what was read: heads, counts, weight that went nowhere, factors and orders."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.bisection.diagnosis import naming
from flashcore.bisection.diagnosis.behaviour import mask_of
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=40, seqlen_k=100, head_dim=64)
CAUSAL = PROBLEM.with_(causal=True)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], None),
        ([0, 1, 0, 1, 2, 3, 2, 3], "by remainder"),
        ([0, 0, 0, 0, 2, 2, 2, 2], "head 0 is taken for all heads"),
        ([0, 0, 1, 1, 0, 0, 1, 1], "batch 0 is taken for all batches"),
        ([2, 2, 3, 3, 0, 0, 1, 1], "batches are counted backwards"),
        ([0, 0, 1, 1, 2, 2, 3, 2], "reads K of batch 1, head 0 where batch 1, head 1 is meant"),
    ],
)
def test_heads(table, words):
    found = naming.of_heads("K", torch.tensor(table), PROBLEM)
    assert (found is None) if words is None else (words in found.sentence and found.stages == ("scores",))


def test_heads_of_the_output_are_told_from_heads_of_the_inputs():
    back = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])
    own = torch.tensor(naming.right_heads("K", PROBLEM))
    marks = {"Q": back, "K": own[back], "V": own[back]}
    assert naming.of_output(marks, PROBLEM).stages == ("out",)
    assert naming.of_output({**marks, "V": own}, PROBLEM) is None
    assert naming.of_output({**marks, "V": None}, PROBLEM) is None


def names(counts, problem=CAUSAL):
    return [h.name for h in naming.of_counts(counts.expand(8, -1, -1), problem)]


def test_masks():
    right = mask_of(CAUSAL, "cpu")
    row, key = torch.arange(40)[:, None], torch.arange(100)[None]
    assert names(right) == []
    assert names(torch.ones(40, 100).double()) == ["no mask", "masked scores set to 0"]
    assert names((key <= row).double()) == ["top-left mask"]
    assert names((key <= row + 61).double()) == ["diagonal off by one"]
    assert names((key <= row + 50).double()) == ["diagonal shifted"]
    assert names((key >= row + 60).double()) == ["mask turned round"]
    assert names(right * (key > row + 60 - 9)) == ["window not asked for"]
    assert names((key <= row + 60).double(), PROBLEM) == ["causal mask not asked for"]


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"96:100": 0}, "last partial page dropped", "96 to 99 (after the last whole tile of 32)"),
        ({"99:100": 0}, "last key dropped", "key, 99,"),
        ({"10:20": 0}, "keys skipped", "10 to 19"),
        ({"16:32": 2}, "keys counted twice", "16 to 31 are counted 2 times"),
        ({"0:16": 2, "16:32": 0}, "a page read twice", "keys 16 to 31 never"),
    ],
)
def test_lists_of_keys(change, name, words):
    counts = torch.ones(40, 100).double()
    for part, value in change.items():
        counts[:, slice(*map(int, part.split(":")))] = value
    (found,) = naming.of_counts(counts.expand(8, -1, -1), PROBLEM)
    assert found.name == name and words in found.sentence


def test_one_odd_key_is_placed():
    counts = torch.ones(8, 40, 100).double()
    counts[5, 3, 7] = 0
    (found,) = naming.of_counts(counts, PROBLEM)
    assert found.name == "keys counted wrongly" and "in 1 of 8 heads" in found.sentence
    assert found.place == {"batch": 1, "head": 1, "row": 3, "column": 7}


def test_weight_that_went_nowhere():
    assert naming.of_extra(torch.zeros(40), PROBLEM) is None
    assert naming.of_extra(torch.full((40,), 28.02), PROBLEM).name == "last partial page taken as whole"
    assert naming.of_extra(torch.full((40,), 1.0), PROBLEM).name == "keys that do not exist"
    assert naming.of_extra(torch.full((40,), 0.5), PROBLEM) is None
    assert naming.of_extra(torch.full((40,), math.inf), PROBLEM) is None


@pytest.mark.parametrize(
    ("factor", "name"),
    [
        (1.001, None), (8.0, "scale missing"), (0.125, "scale twice"), (math.log(2), "base 2 for e"),
        (1 / math.log(2), "log2(e) twice"), (math.sqrt(64 / 96), "scale of another head_dim"),
        (1 / 8, "scale twice"), (-1.0, "scores negated"), (1.7, "scale wrong"), (4.0, "scale of another size"),
    ],
)  # fmt: skip
def test_factors(factor, name):
    found = naming.of_factor(factor, PROBLEM)
    assert (found and found.name) == name
    if found:
        assert abs(found.changes["scale_factor"] / factor - 1) < 0.004


def test_scores_that_count_for_nothing():
    assert naming.of_factor(1e-9, PROBLEM).name == "scores without influence"


def test_rows_of_q():
    place = torch.arange(40)
    assert naming.of_rows(place) is None
    assert naming.of_rows(place.roll(1)).sentence == "rows 0 to 39 are computed from the row of Q 1 before them"
    assert naming.of_rows(torch.zeros(40).long()).sentence == "every row has the result of row 0"
    assert "the first from row 39" in naming.of_rows(place.flip(0)).sentence


def test_matrices_of_scores():
    scale = PROBLEM.scale
    assert naming.of_metric(torch.eye(64).double() * scale * 3, PROBLEM) is None
    half = torch.eye(64).double() * scale
    half[32:] = 0
    assert naming.of_metric(half, PROBLEM).sentence == "columns 32 to 63 of head_dim are left out of the products"
    assert naming.of_metric(torch.eye(64).double().roll(8, 0) * scale, PROBLEM).name.endswith("in another order")
    assert naming.of_metric(torch.ones(64, 64).double() * scale, PROBLEM).name == "columns of head_dim mixed"


def test_orders_of_keys():
    place = torch.arange(100)
    swapped = torch.cat([place[16:32], place[:16], place[32:]])
    assert naming.of_order(swapped, PROBLEM, "K").name == "pages swapped"
    stale = torch.cat([place[:16], place[:16], place[32:]])
    assert naming.of_order(stale, PROBLEM, "V").name == "V of another page"
    assert naming.of_order(torch.where(place < 90, place, -1), PROBLEM, "V").name == "V of a page missing"
    assert naming.of_order(place.flip(0), PROBLEM, "K").name == "keys in another order"


def test_tiles_and_rows_whose_mask_is_another():
    problem = CAUSAL.with_(seqlen_q=200, seqlen_k=200)
    right = mask_of(problem, "cpu")
    row, key = torch.arange(200)[:, None], torch.arange(200)[None]

    def said(counts, asked=problem):
        found = naming.of_counts(counts.double().expand(8, -1, -1), asked)[0]
        return found.name, found.sentence

    skipped = right * ~((row // 64 == key // 64) & (row >= 64))
    words = (
        "3 tiles of 64 rows and 64 keys, the first rows 64 to 127 by keys 64 to 127, are not seen, though they should"
    )
    assert said(skipped) == ("tiles skipped", f"{words} be")
    name, words = said(torch.maximum(right, ((row // 64 == 1) & (key // 64 == 1)).double()))
    assert name == "mask missing in tiles" and "rows 64 to 127 by keys 64 to 127" in words
    local = (key % 64 <= row % 64) & (key // 64 <= row // 64)
    assert said(local)[0] == "mask within tiles"
    late = torch.where(row >= 190, key <= row - 1, key <= row)
    assert said(late)[1].startswith("in rows 190 to 199 alone the diagonal is off by one: each misses the last key")
    both = (key <= row + 1) & (key < 192)
    name, words = said(both)
    assert name == "diagonal off by one" and "the last, partial page is dropped: keys 192 to 199" in words
    sides = (key - row).abs() <= 30
    whole = PROBLEM.with_(seqlen_q=200, seqlen_k=200)
    assert "only keys from 30 before to 30 after each row are seen" in said(sides, whole)[1]
    odd = right.clone()
    odd[5, 3], odd[150, 170] = 0, 1
    assert said(odd)[1] == "row 5 misses key 3 that it should see and row 150 sees key 170 that it may not see"


ROW = torch.arange(1, 65).double()
SEEN = torch.ones(40, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda got: got * 1.1, "the output is 1.1 times what it should be"),
        (lambda got: got.roll(1, -1), "column 0 holds column 63"),
        (lambda got: got * (torch.arange(64) < 56), "columns 56 to 63 of the output are 0"),
        (lambda got: got * (torch.arange(40)[:, None] < 38), "rows 38 to 39 of the output are 0"),
        (lambda got: got * (torch.arange(8)[:, None, None] < 6), "the results of 2 of 8 heads are 0"),
    ],
)
def test_columns_of_the_output(change, words):
    got = ROW.expand(8, 40, 64)
    assert naming.of_columns(got, ROW, SEEN, PROBLEM) == []
    assert words in "; ".join(h.sentence for h in naming.of_columns(change(got), ROW, SEEN, PROBLEM))


def test_rows_that_add_up_to_another_number_are_no_matter_of_columns():
    got = ROW * torch.linspace(0.5, 1.0, 40)[:, None].double()
    assert naming.of_columns(got.expand(8, 40, 64), ROW, SEEN, PROBLEM) == []
    added = torch.zeros(8, 40, 64).double()
    assert naming.of_nothing(added, PROBLEM) is None
    added[5, 7, 9] = 0.5
    found = naming.of_nothing(added, PROBLEM)
    assert "0.5 stands at batch 1, head 1, row 7, column 9" in found.sentence


def test_slopes_that_differ():
    even = {"heads": torch.ones(8), "rows": torch.ones(40), "keys": torch.ones(7)}
    assert list(naming.of_slopes(even, PROBLEM)) == []
    keys = torch.ones(7)
    keys[4:] = 8.0
    found = next(naming.of_slopes({**even, "keys": keys}, PROBLEM))
    assert "the scores of keys 64 to 99 are 8 times the right ones: the scale is missing" in found.sentence
    assert found.changes["factors"].tolist() == [1.0] * 64 + [8.0] * 36
    found = next(naming.of_slopes({**even, "heads": keys.new_tensor([1, 1, 1, 2, 1, 1, 1, 2])}, PROBLEM))
    assert "of 2 of 8 heads (the first: batch 0, head 3) are 2 times" in found.sentence


def ladders(of):
    return [(at, of(at) - of(at[-1])) for low in (0.0, -10.0, 40.0, 70.0)
            for at in [torch.linspace(low, low + 10, 11, dtype=torch.float64)]]  # fmt: skip


@pytest.mark.parametrize(
    ("of", "bend"),
    [
        (lambda x: x, None),
        (lambda x: 50 * torch.tanh(x / 50), ("tanh", 50.0)),
        (lambda x: x.clamp(-5, 5), ("clip", 5.0)),
        (lambda x: x.clamp(max=47), ("clip above", 47.0)),
        (torch.abs, ("abs", 0.0)),
    ],
)
def test_bent_scores(of, bend):
    found = naming.of_ladder(ladders(of))
    assert (found is None) if bend is None else (found.changes["bend"] == bend)
    assert naming.of_ladder(ladders(lambda x: x.sign() * x.abs().sqrt())) is None


def test_what_is_added_to_scores():
    row, key = torch.arange(40)[:, None] + 60, torch.arange(100)[None]
    far = (row - key).abs().double()
    found = naming.of_bias((-0.1 * far).expand(8, -1, -1), PROBLEM)
    assert found.name == "bias by distance" and "-0.1 for each key" in found.sentence
    per_head = -far * torch.linspace(0.1, 0.8, 8)[:, None, None].double()
    assert "-0.1 in the first head, -0.8 in the last" in naming.of_bias(per_head, PROBLEM).sentence
    one = torch.zeros(8, 40, 100).double()
    one[7, 39, 99] = 0.25
    assert "0.25 is added to the score of key 99 in row 39 of batch 1, head 3" in naming.of_bias(one, PROBLEM).sentence


def test_constants_in_few_digits():
    assert "log2(e) is taken for 1.44" in naming.of_factor(1.44 * math.log(2), PROBLEM).sentence
    other = PROBLEM.with_(softmax_scale=0.3)
    rounded = float(torch.tensor(0.3, dtype=torch.bfloat16))
    assert "the scale is rounded to bfloat16" in naming.of_factor(rounded / 0.3, other).sentence
    assert naming.of_factor(1.0005, PROBLEM) is None
