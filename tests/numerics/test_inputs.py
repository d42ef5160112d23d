"""Inputs are what their pattern says, the same for a seed, and finite."""

import pytest
import torch

from flashcore.errors import UnknownName
from flashcore.numerics.inputs import PATTERNS, make_inputs
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


def test_outliers_are_rare_and_large():
    q, _, _ = make_inputs(square(1, 4, 256, 64, dtype="float32"), pattern="outlier")
    share = float((q.abs() > 10).float().mean())
    assert 1 / 2000 < share < 1 / 200


def test_unknown_pattern_and_layout_name_the_known_ones():
    with pytest.raises(UnknownName, match="pattern 'weird'.*outlier"):
        make_inputs(GROUPED, pattern="weird")
    with pytest.raises(UnknownName, match="layout 'sbhd'.*bshd"):
        make_inputs(GROUPED, layout="sbhd")
