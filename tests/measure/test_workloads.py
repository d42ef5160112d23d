"""Workloads with masks: each problem has one way to be timed, and those held against each other share their rounds."""

import subprocess
import sys

import pytest

from flashcore.measure import workloads
from flashcore.numerics.inputs import LENGTHS
from flashcore.problem import parse_problem, square


def test_every_workload_is_a_problem_that_its_label_gives_back_and_has_a_mask():
    for workload in workloads.WORKLOADS:
        problem = workload.problem
        assert parse_problem(problem.label()) == problem and problem.masks and problem.causal
        assert problem.dtype == "bfloat16", "which every build of FlashAttention-3 takes"
        assert workload.lengths in LENGTHS and (workload.lengths == "mixed" or problem.lengths == "ragged")
        assert (workload.aim is None) == (workload.against == "")
        assert (workload.beside is None) == (workload.beside_words == "")
    named = [w.problem for w in workloads.WORKLOADS]
    assert len(set(named)) == len(named) == len({w.words for w in workloads.WORKLOADS})
    assert {p for w in workloads.WORKLOADS for p in w.problem.masks} == {"window", "softcap", "sink", "ragged"}


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_a_profile_has_each_problem_once_and_quick_two(profile):
    problems = workloads.problems(profile)
    assert len(set(problems)) == len(problems)
    assert len(problems) == 2 or {w.problem for w in workloads.WORKLOADS} <= set(problems)
    assert set(workloads.problems("quick")) < set(workloads.problems("full"))


def test_what_is_held_against_each_other_is_timed_together_and_nothing_is_lost():
    groups = workloads.grouped(workloads.problems("full"))
    of = {problem: number for number, group in enumerate(groups) for problem in group}
    assert sum(map(len, groups)) == len(of) == len(workloads.problems("full"))
    for workload in workloads.WORKLOADS:
        assert workload.beside is None or of[workload.beside] == of[workload.problem]
    assert {len(group) for group in groups} == {1, 2, 4}, "rounds stay short"
    dense = square(4, 16, 8192, 128, dtype="bfloat16", causal=True)
    assert of[dense] == of[dense.with_(softcap=30.0)] == of[dense.with_(sink=True)]
    alone = [workloads.RAGGED.problem, square(1, 1, 8, 8), workloads.RAGGED.problem]
    assert workloads.grouped(alone) == [[alone[0]], [alone[1]]], "named twice, timed once"
    assert workloads.grouped([]) == []


def test_lengths_are_those_of_the_workload_and_mixed_elsewhere():
    kinds = {workloads.kind_of_lengths(w.problem) for w in workloads.WORKLOADS if w.problem.lengths}
    assert kinds == {"equal", "uniform"}
    assert workloads.kind_of_lengths(square(3, 2, 64, 64, lengths="ragged")) == "mixed"


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_the_cost_of_batch_invariant_is_asked_of_prefills_without_it_and_with_it_in_the_same_rounds(profile):
    costed = workloads.costed(profile)
    assert len(costed) == len(set(costed)) == (2 if profile == "quick" else 20)
    assert set(costed[::2]) <= set(workloads.COSTED)
    assert workloads.grouped(costed) == [list(pair) for pair in zip(costed[::2], costed[1::2], strict=True)]
    for plain, asked in zip(costed[::2], costed[1::2], strict=True):
        assert asked == plain.with_(batch_invariant=True) and workloads.ordinary(asked) == plain
        assert plain.dtype == "bfloat16" and not plain.masks, "which every build of FlashAttention-3 takes"
        assert 16_384 <= plain.batch * plain.seqlen_q <= 32_768 and parse_problem(asked.label()) == asked
    if profile == "full":
        assert {(p.seqlen_q, p.head_dim) for p in costed} == {
            (s, d) for s in (1024, 2048, 4096, 8192, 16_384) for d in (64, 128)
        }
        assert {p.causal for p in costed} == {True, False}


def test_a_workload_in_the_mode_has_its_lengths_and_shares_its_rounds():
    asked = workloads.RAGGED.problem.with_(batch_invariant=True)
    assert workloads.kind_of_lengths(asked) == workloads.kind_of_lengths(workloads.RAGGED.problem) == "uniform"
    dense = square(4, 16, 8192, 128, dtype="bfloat16", causal=True)
    sink = dense.with_(sink=True, batch_invariant=True)
    assert workloads.grouped([dense, asked, sink]) == [[dense, sink], [asked]]
    assert workloads.grouped([sink, asked, dense]) == [[sink, dense], [asked]]


def test_views_may_read_it_without_torch():
    said = "import flashcore.measure.workloads, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", said], check=True)
