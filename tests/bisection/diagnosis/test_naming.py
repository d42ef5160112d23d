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
