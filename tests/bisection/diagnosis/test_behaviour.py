"""What a behaviour predicts: the right one is the reference, and each wrong one is the function that behaves so."""

from __future__ import annotations

import math

import pytest
import torch
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis.behaviour import RIGHT, Behaviour, mask_of, simulate
from flashcore.bisection.diagnosis.pages import Loop
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=60, seqlen_k=150, head_dim=16, dtype="float32")
PAGE_0_TWICE = torch.cat([torch.arange(64), torch.arange(64), torch.arange(128, 150)])


@pytest.mark.parametrize("causal", [False, True])
def test_the_right_behaviour_is_the_reference_to_the_bit_of_float64(causal):
    problem = PROBLEM.with_(causal=causal, seqlen_q=150, seqlen_k=60)
    q, k, v = make_inputs(problem)
    for got, wanted in zip(simulate(q, k, v, problem), reference.attention(q, k, v, problem), strict=True):
        assert torch.allclose(got, wanted, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    ("function", "behaviour"),
    [
        (zoo.no_scale, Behaviour(scale_factor=4.0)),
        (zoo.not_divided, Behaviour(normalised=False)),
        (zoo.four_lanes, Behaviour(lanes=("mod", 4))),
        (zoo.accum_not_rescaled, Behaviour(loop=Loop("accum not rescaled", 64))),
        (zoo.row_sum_not_rescaled, Behaviour(loop=Loop("row_sum not rescaled", 64))),
        (zoo.nothing_rescaled, Behaviour(loop=Loop("neither rescaled", 64))),
        (zoo.one_page_not_rescaled, Behaviour(loop=Loop("accum not rescaled", 64, page=2))),
        (zoo.page_loop, Behaviour(loop=Loop("accum not rescaled", 64, page=9))),
        (zoo.tail_padded, Behaviour(extra=torch.full((60,), 42.0).double())),
        (zoo.heads_by_remainder, Behaviour(k_heads=torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]),
                                           v_heads=torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]))),
        (zoo.stale_v, Behaviour(v_of=PAGE_0_TWICE)),
        (zoo.k_page_read_twice, Behaviour(k_of=PAGE_0_TWICE)),
        (zoo.swizzled, Behaviour(metric=torch.eye(16).double().roll(8, 0) / 4.0)),
        (zoo.heads_written_backwards, Behaviour(q_heads=torch.tensor([3, 2, 1, 0, 7, 6, 5, 4]),
                                                k_heads=torch.tensor([1, 1, 0, 0, 3, 3, 2, 2]),
                                                v_heads=torch.tensor([1, 1, 0, 0, 3, 3, 2, 2]))),
        (zoo.k_reshaped, Behaviour(scrambled=(("k", "reshaped"),))),
        (zoo.tiles_of_v_transposed, Behaviour(scrambled=(("v", "tile transposed"),))),
        (zoo.written_as_bshd, Behaviour(scrambled=(("out", "rows and heads confused"),))),
        (zoo.factors_squared, Behaviour(loop=Loop("factor twice", 64))),
        (zoo.accum_factor_squared, Behaviour(loop=Loop("accum factor twice", 64))),
        (zoo.parts_added_as_they_are, Behaviour(loop=Loop("parts not weighed", 50))),
        (zoo.parts_without_their_sums, Behaviour(loop=Loop("parts weighed by their maximum", 50))),
        (zoo.halves_of_v_swapped, Behaviour(columns=torch.arange(16).roll(8))),
        (zoo.last_columns_left, Behaviour(columns=torch.arange(16).masked_fill(torch.arange(16) >= 8, -1))),
        (zoo.last_row_left, Behaviour(zeroed=(torch.arange(60) == 59).expand(8, 60))),
        (zoo.a_tenth_too_much, Behaviour(out_factor=1.1)),
        (zoo.a_large_epsilon, Behaviour(epsilon=0.5)),
        (zoo.scaled_on_the_first_page, Behaviour(factors=torch.where(torch.arange(150) < 64, 1.0, 4.0).double())),
        (zoo.biased_by_distance, Behaviour(bias=-0.02 * (torch.arange(60)[:, None] + 90 - torch.arange(150)).abs())),
    ],
)  # fmt: skip
def test_a_behaviour_is_the_function_that_behaves_so(function, behaviour):
    q, k, v = make_inputs(PROBLEM)
    predicted = simulate(q, k, v, PROBLEM, behaviour)[0]
    assert torch.allclose(function(q, k, v).double(), predicted, atol=2e-4, rtol=2e-3)
    right = simulate(q, k, v, PROBLEM)[0]
    assert function is zoo.page_loop or not torch.allclose(predicted, right, atol=2e-3, rtol=2e-2)


def test_no_maximum_overflows_where_float32_does():
    problem = PROBLEM.with_(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=2)
    q, k, v = make_inputs(problem)
    q[0, 0, 1] *= 1000
    out = simulate(q, k, v, problem, Behaviour(no_max="float32"))[0]
    assert torch.equal(out.isfinite().all(-1), zoo.no_maximum(q, k, v).isfinite().all(-1))
    assert out[0, 0, 0].isfinite().all() and not out[0, 0, 1].isfinite().all()


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("log2", lambda lse, shared: lse / math.log(2)),
        ("row_max alone", lambda lse, shared: shared),
        ("without row_max", lambda lse, shared: lse - shared),
        ("row_sum alone", lambda lse, shared: (lse - shared).exp()),
        ("negative", lambda lse, shared: -lse),
        ("scaled", lambda lse, shared: lse / 4),
        ("log2 of the sum", lambda lse, shared: shared + (lse - shared) / math.log(2)),
    ],
)
def test_kinds_of_lse(kind, other):
    q, k, v = make_inputs(PROBLEM)
    lse = simulate(q, k, v, PROBLEM)[1]
    heads = reference.kv_head_index(PROBLEM, "cpu")
    scores = q.flatten(0, 1).double() @ k.flatten(0, 1)[heads].double().mT / 4
    shared = scores.amax(-1).view(lse.shape)
    assert torch.allclose(simulate(q, k, v, PROBLEM, Behaviour(lse=kind))[1], other(lse, shared))


def test_what_depends_on_one_shape_is_not_carried_to_another():
    told = Behaviour(
        scale_factor=2.0, k_of=torch.arange(3), counts=torch.ones(1, 1), unwritten=torch.ones(1, 1, 1).bool()
    )
    assert told.is_of_one_shape and told.tells_heads_apart
    assert told.without_tables() == RIGHT.with_(scale_factor=2.0) and not told.without_tables().is_of_one_shape
    assert RIGHT.with_(factors=torch.ones(8, 1, 1)).tells_heads_apart
    assert not RIGHT.with_(factors=torch.ones(9), counts=torch.ones(4, 9)).tells_heads_apart


def test_what_is_not_written_is_nan_in_the_prediction_and_in_weights_where_whole_rows_are():
    q, k, v = make_inputs(PROBLEM)
    mask = torch.zeros(8, 60, 16, dtype=torch.bool)
    mask[3, 5], mask[2, 7, 4] = True, True
    out = simulate(q, k, v, PROBLEM, Behaviour(unwritten=mask))[0]
    assert torch.equal(out.flatten(0, 1).isnan(), mask)
    wide = simulate(q, k, v.repeat(1, 1, 1, 2), PROBLEM, Behaviour(unwritten=mask))[0].flatten(0, 1).isnan()
    assert bool(wide[3, 5].all()) and not bool(wide[2, 7].any())


def test_mask_of_counts_each_visible_key_once():
    problem = PROBLEM.with_(causal=True, seqlen_q=2, seqlen_k=3)
    assert mask_of(problem, "cpu").tolist() == [[1, 1, 0], [1, 1, 1]]


def test_states_that_are_carried_and_parts_of_rows_of_others():
    problem = PROBLEM.with_(seqlen_q=150)
    q, k, v = make_inputs(problem)
    predicted = simulate(q, k, v, problem, Behaviour(carried=("row_sum", 64)))[0]
    assert torch.allclose(zoo.sums_carried_over(q, k, v).double(), predicted, atol=2e-4, rtol=2e-3)
    whole = simulate(q, k, v, problem, Behaviour(carried=("all", 64)))[0]
    assert torch.allclose(whole[:, :, :64], predicted[:, :, :64]) and not torch.allclose(whole, predicted)
    right, lse = simulate(q, k, v, problem)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * problem.scale
    row_sum = (scores - scores.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
    other = simulate(q, k, v, problem, Behaviour(sum_of=1))[0]
    assert torch.allclose(other, right * row_sum / row_sum.roll(1, 2))
    assert torch.allclose(simulate(q, k, v, problem, Behaviour(divided_twice=True))[0], right / row_sum)
    top = scores.amax(-1, keepdim=True)
    other = simulate(q, k, v, problem, Behaviour(max_of=1))[0]
    assert torch.allclose(other, right * (top - top.roll(1, 2)).exp())


def test_scores_that_are_bent_or_hidden():
    q, k, v = make_inputs(PROBLEM, pattern="outlier")
    for function, behaviour in (
        (zoo.capped, Behaviour(bend=("tanh", 30.0))), (zoo.cut_off, Behaviour(bend=("clip", 8.0))),
        (zoo.overflow_hidden, Behaviour(overflow=0.0, scores_rounded=True)),
    ):  # fmt: skip
        predicted = simulate(q, k, v, PROBLEM, behaviour)[0]
        assert torch.allclose(function(q, k, v).double(), predicted, atol=2e-2, rtol=2e-2)
    causal = PROBLEM.with_(causal=True)
    q, k, v = make_inputs(causal)
    predicted = simulate(q, k, v, causal, Behaviour(hidden_in_sum=True))[0]
    assert torch.allclose(zoo.masked_after_the_softmax(q, k, v, causal=True).double(), predicted, atol=1e-5)


def test_a_group_that_is_packed_the_other_way_and_back_is_as_it_was():
    q, k, v = make_inputs(PROBLEM)
    out = simulate(q, k, v, PROBLEM)[0]
    packed = simulate(q, k, v, PROBLEM, Behaviour(scrambled=(("out", "group packed"),)))[0]
    assert torch.equal(packed[:, 0, 1], out[:, 1, 0]) and torch.equal(packed[:, 0, 2], out[:, 0, 1])
    both = Behaviour(scrambled=(("out", "group packed"), ("out", "group unpacked")))
    assert torch.equal(simulate(q, k, v, PROBLEM, both)[0], out) and not torch.equal(packed, out)
