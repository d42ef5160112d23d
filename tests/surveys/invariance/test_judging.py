"""Bits are compared row by row, a break is found and made smaller, and the line that stands with it asks it again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.steady_attention import Steady, TileByBatch

from flashcore.errors import InvalidProblem
from flashcore.surveys.invariance import Setting, Way, compare, judging
from flashcore.surveys.invariance.computing import Answer
from flashcore.surveys.invariance.ways import implementation

FOUR = Setting(seed=9, heads_kv=2, causal=False, lengths=((6, 90),) * 4, patterns=("rows apart",) * 4)


def answer(first: int, rows: int, kept=None, lse: bool = True) -> Answer:
    out = torch.arange(6.0)[None, 6 - rows :, None].expand(2, rows, 3).half()
    return Answer(first, out.clone(), torch.zeros(2, rows) if lse else None, kept)


def test_rows_that_both_have_are_compared_to_the_bit():
    assert not judging.differing(answer(0, 6), answer(2, 4)).any()
    other = answer(2, 4)
    other.out[1, 0, 2] += 1 / 64
    assert judging.differing(answer(0, 6), other).tolist() == [[False] * 4, [True] + [False] * 3]
    other = answer(2, 4)
    other.lse[0, 3] = -0.0
    assert judging.differing(other, answer(0, 6)).nonzero().tolist() == [[0, 3]]
    assert not judging.differing(other, answer(0, 6, lse=False)).any()


def test_a_nan_is_no_number_though_it_has_the_same_bits():
    one = answer(0, 6)
    one.out[0, 5] = float("nan")
    assert judging.differing(one, one).nonzero().tolist() == [[0, 5]]


def test_rows_of_others_are_not_compared():
    kept = torch.ones(2, 6, dtype=torch.bool)
    kept[0, 1] = False
    other = answer(0, 6)
    other.out[0, 1] = 9
    assert not judging.differing(answer(0, 6, kept), other).any()
    assert judging.differing(answer(0, 6), other).any()


def test_each_way_of_a_subject_is_compared_with_two_others():
    ways = [Way(), Way(again=1), Way("batch", together=4), Way("paged", page_size=16, together=4, by="steady")]
    found = judging.cases_of(implementation(Steady()), FOUR, ways, [0, 3], invariant=True)
    assert len(found) == 8 and all(case.kept for case in found)
    for subject in (0, 3):
        used = [way for case in found if case.subject == subject for way in case.ways]
        assert all(used.count(way) == 2 for way in ways)
    assert {case.pair for case in found} <= {"alone, alone", "alone, batch", "alone, pages", "batch, pages"}
    two = judging.cases_of(implementation(Steady()), FOUR, ways[:2], [1], invariant=True)
    assert [case.pair for case in two] == ["alone, alone"]


def test_a_break_is_made_smaller_and_its_line_finds_it(capsys):
    bad = implementation(TileByBatch())
    ways = [Way(), Way("batch", together=4, layout="bshd")]
    (case,) = judging.cases_of(bad, FOUR, ways, [2], invariant=True)
    assert not case.kept and case.pair == "alone, batch"
    small = judging.shrunk(bad, case, invariant=True, seconds=600)
    assert len(small.setting) < 4 or small.setting.lengths[small.subject] < case.setting.lengths[case.subject]
    assert small.setting.heads_kv == 1 and not compare(
        bad.first, small.setting, small.subject, *small.ways, invariant=True
    )
    line = judging.line(implementation("cpu"), replace(small, kept=False), invariant=False)
    exec(line)  # the backend of that name is an honest one, in the mode that promises nothing
    assert capsys.readouterr().out.startswith(("kept: ", "broken: "))


def test_compare_says_what_differs():
    kept = compare(Steady(), FOUR, 0, Way(), Way("ragged", together=4), invariant=True)
    assert kept and str(kept) == "kept: 12 rows are the same to the bit"
    plain = replace(FOUR, patterns=("normal",) * 4)
    broken = compare(TileByBatch(), plain, 1, Way(), Way("batch", together=4), invariant=True)
    assert not broken and str(broken).startswith("broken: ") and "of 12 rows differ, the first at head" in str(broken)


def test_a_question_without_sense_is_refused():
    with pytest.raises(InvalidProblem, match="subject is 4; the setting has the sequences 0 to 3"):
        compare("cpu", FOUR, 4, Way(), Way(), invariant=False)
    with pytest.raises(InvalidProblem, match="does not apply to sequence 0"):
        compare("cpu", replace(FOUR, window_left=3), 0, Way(), Way(cuts=(500,)), invariant=False)
