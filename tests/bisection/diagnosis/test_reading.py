"""What is read out of a function by its outputs alone is what the function computed."""

from __future__ import annotations

import pytest
import torch
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import mask_of
from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=90, head_dim=32)


def of(function):
    return candidate_of(function, device="cpu")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_the_probabilities(causal, dtype):
    problem = PROBLEM.with_(causal=causal, dtype=dtype)
    q, k, _ = make_inputs(problem)
    got, wanted = reading.weights(of(zoo.two_pass), q, k, problem), reading.simulated_weights(q, k, problem)
    assert torch.allclose(got, wanted, rtol=reading.tolerance(problem), atol=1e-6)
    assert torch.allclose(wanted.sum(-1), torch.ones(8, 70).double())


def test_marks_name_the_heads():
    found = reading.read_marks(of(zoo.heads_by_remainder), PROBLEM)
    assert found.q.tolist() == list(range(8))
    assert found.k.tolist() == found.v.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert reading.read_marks(of(zoo.two_pass), PROBLEM).k.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_marks_that_no_head_shows_are_none():
    found = reading.read_marks(of(lambda q, k, v: torch.zeros_like(q)), PROBLEM)
    assert found.q is found.k is found.v is None


def test_counts_are_the_mask_and_what_is_beside_it():
    causal = PROBLEM.with_(causal=True)
    found = reading.read_counts(of(zoo.two_pass), causal)
    assert found.clear and torch.equal(found.counts, mask_of(causal, "cpu").expand(8, -1, -1))
    assert torch.allclose(found.total, torch.ones(8, 70).double(), atol=1e-3) and not found.extra.any()
    padded = reading.read_counts(of(zoo.tail_padded), PROBLEM)
    assert torch.allclose(padded.extra, torch.full((70,), 38.0).double(), atol=0.3)
    assert not reading.read_counts(of(zoo.one_score), PROBLEM).clear


def test_keys_that_do_not_exist_outweigh_those_that_do():
    assert not reading.read_phantoms(of(zoo.two_pass), PROBLEM).any()
    found = reading.read_phantoms(of(zoo.tail_padded), PROBLEM)
    assert torch.allclose(found, torch.full_like(found, 38.0), rtol=0.02)
    assert reading.read_phantoms(of(zoo.two_pass), PROBLEM.with_(softmax_scale=0.0)) is None


def test_anchors_are_above_all_other_scores():
    for problem in (PROBLEM, PROBLEM.with_(softmax_scale=-0.5), PROBLEM.with_(softmax_scale=3.0)):
        q, k = reading.anchored(problem, "cpu")
        scores = reading.right_scores(q, k, problem)
        anchors = torch.arange(90) % reading.ANCHOR_EVERY == 0
        assert torch.equal(scores[..., anchors], torch.zeros_like(scores[..., anchors]))
        assert scores[..., ~anchors].max() < -0.2


@pytest.mark.parametrize(("function", "factor"), [(zoo.two_pass, 1.0), (zoo.no_scale, 32**0.5), (zoo.base_two, 0.6931)])
def test_the_factor_of_the_scores_is_fitted(function, factor):
    found = reading.read_scores(of(function), PROBLEM)
    assert abs(found.factor / factor - 1) < 2e-3


def metric(function, problem=PROBLEM):
    return reading.metric_of(reading.read_small(of(function), problem), problem)


def test_the_matrix_of_the_scores_is_read_in_full():
    scale = PROBLEM.scale
    found = metric(zoo.two_pass)
    assert torch.allclose(found, torch.eye(32).double() * scale, atol=0.05 * scale)
    found = metric(zoo.swizzled)
    assert torch.allclose(found, torch.eye(32).double().roll(8, 0) * scale, atol=0.05 * scale)
    assert metric(zoo.two_pass, PROBLEM.with_(seqlen_q=20)) is None


def test_keys_in_another_order_are_no_other_head():
    def neighbours_swapped(q, k, v):
        place = torch.arange(v.shape[2])
        return zoo.two_pass(q, k, v[:, :, torch.where(place ^ 1 < len(place), place ^ 1, place)])

    marks = reading.read_marks(of(neighbours_swapped), PROBLEM)
    assert marks.k is None and marks.q is None, "a mark by one key shows another head, and one by many keys its own"
    small = reading.read_small(of(neighbours_swapped), PROBLEM)
    assert reading.order_of(small).tolist() == [n ^ 1 if n ^ 1 < 90 else n for n in range(90)]
    assert reading.order_of(reading.read_small(of(zoo.two_pass), PROBLEM)).tolist() == list(range(90))


def test_one_v_for_all_keys_shows_columns_and_what_is_added():
    nothing, got, row = reading.read_columns(of(zoo.two_pass), PROBLEM)
    assert not nothing.any() and torch.allclose(got, row.expand_as(got), rtol=2e-3)
    nothing, got, _ = reading.read_columns(of(zoo.one_element), PROBLEM)
    assert nothing[-1, -1, -1] == 0.125 and int((nothing != 0).sum()) == 1
    moved = torch.arange(32).roll(16)
    q, k, _ = make_inputs(PROBLEM)
    read = reading.weights(of(zoo.halves_of_v_swapped), q, k, PROBLEM, moved)
    assert torch.allclose(read, reading.weights(of(zoo.two_pass), q, k, PROBLEM), atol=1e-6)


def test_a_ladder_shows_what_scores_become():
    levels = torch.linspace(-10.0, 0.0, 11, dtype=torch.float64)
    found = reading.read_ladder(of(zoo.two_pass), PROBLEM, levels).log()
    assert torch.allclose(found[:, 3:], (levels - levels[-1])[3:].expand_as(found[:, 3:]), atol=0.02)
    bent = reading.read_ladder(of(zoo.cut_off), PROBLEM, levels).log()
    assert torch.allclose(bent[:, 0], bent[:, 2], atol=0.02) and float(bent[0, 0]) == pytest.approx(-8.0, abs=0.1)
    assert reading.read_ladder(of(zoo.two_pass), PROBLEM.with_(seqlen_k=5), levels) is None


def test_slopes_show_where_scores_are_multiplied():
    def late_keys_doubled(q, k, v):
        a, b, c, scale = zoo.parts(q, k, v)
        scores = a @ b.mT * scale
        scores[..., 48:] *= 2.0
        return zoo.finish(scores, c, q.dtype)

    by = reading.slopes(reading.read_scores(of(late_keys_doubled), PROBLEM), PROBLEM)
    assert by["keys"].tolist() == pytest.approx([1.0] * 3 + [2.0] * 3, abs=0.01)
    even = reading.slopes(reading.read_scores(of(zoo.two_pass), PROBLEM), PROBLEM)
    assert all(float((values - 1).abs().max()) < 0.01 for values in even.values())


def test_hidden_keys_and_products_past_float16():
    causal = PROBLEM.with_(causal=True)
    assert reading.read_hidden(of(zoo.two_pass), causal, 500.0) == 0.0
    assert reading.read_hidden(of(zoo.masked_by_a_small_number), causal, 50.0) == 0.0
    assert reading.read_hidden(of(zoo.masked_by_a_small_number), causal, 500.0) == 1.0
    assert reading.read_hidden(of(zoo.two_pass), PROBLEM, 500.0) is None, "no key is hidden"
    assert bool((reading.read_far(of(zoo.overflow_hidden), PROBLEM, 30_000.0)[..., 0] == 1).all())
    assert bool((reading.read_far(of(zoo.overflow_hidden), PROBLEM, 80_000.0)[..., 0] < 0.6).all())
    assert bool((reading.read_far(of(zoo.two_pass), PROBLEM, 80_000.0)[..., 0] == 1).all())
