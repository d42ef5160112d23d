"""Inputs are what their pattern says, the same for a seed, and finite."""

import numpy as np
import pytest
import torch

from flashcore.errors import InvalidProblem, UnknownName
from flashcore.numerics import masking
from flashcore.numerics.inputs import LAYOUTS, PATTERNS, UNUSED_ROWS, lengths_of, make_inputs, make_masks
from flashcore.problem import Problem, square

GROUPED = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=5, seqlen_k=300, head_dim=64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_shapes_dtype_and_finite(pattern, dtype):
    q, k, v = make_inputs(GROUPED.with_(dtype=dtype), pattern=pattern)
    assert q.shape == (2, 4, 5, 64) and k.shape == v.shape == (2, 2, 300, 64)
    assert {q.dtype, k.dtype, v.dtype} == {getattr(torch, dtype)}
    assert all(bool(t.isfinite().all()) for t in (q, k, v))


def test_a_seed_gives_the_same_numbers_and_another_gives_others():
    first, again, other = (make_inputs(GROUPED, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_seed_is_a_whole_number_that_a_generator_holds():
    assert torch.equal(*(make_inputs(GROUPED, seed=seed)[0] for seed in (3, np.int64(3))))
    for seed in (1.5, True, "3", 10**23, -(10**23)):
        with pytest.raises(InvalidProblem, match="^seed: "):
            make_inputs(GROUPED, seed=seed)


def test_bshd_is_a_strided_view_of_the_same_numbers():
    plain, views = make_inputs(GROUPED), make_inputs(GROUPED, layout="bshd")
    for a, b in zip(plain, views, strict=True):
        assert torch.equal(a, b) and b.stride(-1) == 1 and not b.is_contiguous()
        assert b.transpose(1, 2).is_contiguous()


def test_large_overflows_unscaled_float16_scores():
    problem = square(1, 2, 256, 64)
    q, k, _ = make_inputs(problem, pattern="large")
    assert float((q.float() @ k.float().transpose(-1, -2)).abs().max()) > 65504


def test_constant_scores_are_all_alike():
    q, k, _ = make_inputs(GROUPED, pattern="constant")
    scores = q.float() @ k.float().transpose(-1, -2).repeat_interleave(2, dim=1)
    assert float(scores.max() - scores.min()) == 0


@pytest.mark.parametrize(("pattern", "sign"), [("rising", 1), ("falling", -1)])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_ramps_move_the_scores_from_page_to_page(pattern, sign, scale):
    problem = square(1, 1, 512, 64, softmax_scale=scale)
    q, k, _ = make_inputs(problem, pattern=pattern)
    scores = problem.scale * (q.float() @ k.float().transpose(-1, -2))
    first, last = scores[..., :128].mean(), scores[..., -128:].mean()
    assert sign * float(last - first) > 5


def test_a_ramp_runs_from_0_and_a_steep_one_and_a_sunken_one_are_as_far_as_they_say():
    problem = square(1, 1, 512, 64, dtype="float32")

    def scores(pattern: str) -> torch.Tensor:
        q, k, _ = make_inputs(problem, pattern=pattern)
        return problem.scale * (q @ k.transpose(-1, -2))

    _, k, _ = make_inputs(problem, pattern="rising")
    ramp = k[0, 0, :, 0] * problem.scale
    assert ramp[0] == 0 and ramp[-1] == pytest.approx(4) and ramp[256] == pytest.approx(2, rel=0.01)
    steep, sunken = scores("steep"), scores("sunken")
    assert steep[..., -32:].mean() - steep[..., :32].mean() == pytest.approx(64, rel=0.1)
    assert sunken.mean() == pytest.approx(-200, rel=0.01) and sunken.max() < -150


def test_signs_alternate_from_key_to_key_and_other_numbers_are_as_large_as_they_say():
    q, k, _ = make_inputs(GROUPED, pattern="alternating")
    assert bool((q >= 0).all()) and bool((k[:, :, ::2] >= 0).all()) and bool((k[:, :, 1::2] <= 0).all())
    for one in make_inputs(GROUPED, pattern="uniform"):
        assert -1 <= float(one.min()) < -0.99 and 0.99 < float(one.max()) <= 1 and abs(float(one.float().mean())) < 0.1
    q, k, v = make_inputs(GROUPED, pattern="tiny")
    assert 1e-3 < float(q.abs().max()) < 1e-2 and 1e-3 < float(k.abs().max()) < 1e-2 < 1 < float(v.abs().max())


def test_outliers_are_rare_and_large():
    q, _, _ = make_inputs(square(1, 4, 256, 64, dtype="float32"), pattern="outlier")
    share = float((q.abs() > 10).float().mean())
    assert 1 / 2000 < share < 1 / 200


def test_unknown_pattern_and_layout_name_the_known_ones():
    with pytest.raises(UnknownName, match="pattern 'weird'.*outlier"):
        make_inputs(GROUPED, pattern="weird")
    with pytest.raises(UnknownName, match="layout 'sbhd'.*bshd"):
        make_inputs(GROUPED, layout="sbhd")


SIX = Problem(batch=6, num_heads_q=4, num_heads_kv=2, seqlen_q=20, seqlen_k=50, head_dim=8, sink=True)


def test_masks_have_sinks_of_both_signs_and_sequences_that_are_whole_empty_and_single():
    masks = make_masks(SIX.with_(lengths="left"))
    assert masks.sink.dtype == torch.float32 and (masks.sink > 0).tolist() == [True, False, True, False]
    assert bool((masks.sink.abs() >= 1).all()) and bool((masks.sink.abs() <= 5).all())
    lengths_q, lengths_k = masks.seqlens_q.tolist(), masks.seqlens_k.tolist()
    assert {0, 1, 20} <= set(lengths_q) and {0, 1, 50} <= set(lengths_k) and len(set(lengths_k)) > 3
    other = make_masks(SIX.with_(lengths="left"), seed=1)
    assert other.seqlens_k.tolist() != lengths_k and (other.sink > 0).tolist() == [False, True, False, True]
    assert make_masks(SIX.with_(sink=False, window_left=3, softcap=2.0)) is None
    ragged = make_masks(SIX.with_(lengths="ragged", sink=False))
    assert ragged.cu_seqlens_q.diff().tolist() == lengths_q and ragged.cu_seqlens_k.diff().tolist() == lengths_k
    assert ragged.sink is None and ragged.cu_seqlens_q.dtype == torch.int32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", ["right", "left", "ragged"])
def test_rows_that_are_not_real_hold_nan_and_all_others_are_finite(lengths, layout):
    problem = SIX.with_(lengths=lengths)
    masks = make_masks(problem, seed=2)
    tensors = make_inputs(problem, seed=2, layout=layout, pattern="rising")
    for tensor, name in zip(tensors, "qkk", strict=True):
        real = masking.real_rows(tensor, problem, masks, name)
        assert torch.equal(tensor.isfinite(), real[:, None, :, None].expand_as(tensor))
        assert tensor.stride(-1) == 1
    if lengths == "ragged":
        assert tensors[0].shape == (1, 4, int(masks.cu_seqlens_q[-1]) + UNUSED_ROWS, 8)
        assert tensors[1].shape == (1, 2, int(masks.cu_seqlens_k[-1]) + UNUSED_ROWS, 8)
        first, last = masks.cu_seqlens_k[5:7].tolist()
        ramp = tensors[1][0, 0, first:last, 0] * problem.scale
        assert float(ramp[0]) == 0 and float(ramp[-1]) == pytest.approx(4, rel=1e-3), "each sequence has its own ramp"


def test_lengths_are_whole_or_drawn_evenly_and_known_without_a_tensor():
    problem = SIX.with_(batch=200, seqlen_q=300, seqlen_k=200, lengths="ragged", sink=False)
    assert lengths_of(problem, 0, "equal") == ([300] * 200, [200] * 200)
    drawn, keys = lengths_of(problem, 3, "uniform")
    assert drawn == keys and min(drawn) >= 64 and 190 < max(drawn) <= 200 and len(set(drawn)) > 80
    assert lengths_of(problem, 4, "uniform")[0] != drawn == lengths_of(problem, 3, "uniform")[0]
    short = lengths_of(problem.with_(seqlen_k=5), 0, "uniform")[0]
    assert set(short) == {5}
    masks = make_masks(problem, seed=3, lengths="uniform")
    assert masks.cu_seqlens_q.diff().tolist() == drawn
    q, k, _ = make_inputs(problem, masks=masks, spare=0)
    assert q.shape[2] == k.shape[2] == sum(drawn) and bool(q.isfinite().all())
    with pytest.raises(UnknownName, match="kind of lengths"):
        lengths_of(problem, 0, "odd")


def test_sinks_are_numbers_that_bfloat16_has():
    sink = make_masks(SIX.with_(lengths="", sink=True, num_heads_q=64)).sink
    assert torch.equal(sink, sink.bfloat16().float())
    assert 1 <= float(sink.abs().min()) < 1.5 and 4.5 < float(sink.abs().max()) <= 5, "of all sizes that there are"
