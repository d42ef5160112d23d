"""Counts of keys get the name of a mask, of a list of keys, or the place of one odd key."""

from __future__ import annotations

import pytest
import torch

from flashcore.bisection.diagnosis.behaviour import mask_of
from flashcore.bisection.diagnosis.probes import masks
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=40, seqlen_k=100, head_dim=64)
CAUSAL = PROBLEM.with_(causal=True)


def names(counts, problem=CAUSAL):
    return [h.name for h in masks.of_counts(counts.expand(8, -1, -1), problem)]


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
    (found,) = masks.of_counts(counts.expand(8, -1, -1), PROBLEM)
    assert found.name == name and words in found.sentence


def test_one_odd_key_is_placed():
    counts = torch.ones(8, 40, 100).double()
    counts[5, 3, 7] = 0
    (found,) = masks.of_counts(counts, PROBLEM)
    assert found.name == "keys counted wrongly" and "in 1 of 8 heads" in found.sentence
    assert found.place == {"batch": 1, "head": 1, "row": 3, "column": 7}


def test_tiles_and_rows_whose_mask_is_another():
    problem = CAUSAL.with_(seqlen_q=200, seqlen_k=200)
    right = mask_of(problem, "cpu")
    row, key = torch.arange(200)[:, None], torch.arange(200)[None]

    def said(counts, asked=problem):
        found = masks.of_counts(counts.double().expand(8, -1, -1), asked)[0]
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
