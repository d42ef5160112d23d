"""Backend `cpu`: its page loop against the reference, and its trace against what it computed."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore import backends
from flashcore.backends import with_methods
from flashcore.backends.cpu import CpuBackend
from flashcore.errors import InvalidProblem
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.reference import STAGES
from flashcore.problem import Problem, square

UNEQUAL = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=50, head_dim=24, causal=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [1, 7, 64, 4096])
def test_the_cpu_page_loop_agrees_with_the_reference(dtype, page_size):
    problem = UNEQUAL.with_(dtype=dtype, page_size=page_size)
    inputs = make_inputs(problem, layout="bshd")
    out, lse = backends.get("cpu").run(*inputs, problem)
    expected, expected_lse = reference.attention(*inputs, problem)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[dtype]
    assert out.dtype == getattr(torch, dtype) and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_the_cpu_trace_is_what_it_computed():
    problem = UNEQUAL.with_(page_size=16)
    inputs = make_inputs(problem)
    backend = backends.get("cpu")
    trace, (out, lse) = backend.trace(*inputs, problem), backend.run(*inputs, problem)
    assert torch.equal(trace.out, out) and torch.equal(trace.lse, lse)
    expected = reference.trace(*inputs, problem)
    for stage in STAGES:
        assert getattr(trace, stage).shape == getattr(expected, stage).shape
        torch.testing.assert_close(getattr(trace, stage).double(), getattr(expected, stage), rtol=2e-3, atol=2e-3)


def test_two_keys_in_two_pages_by_hand():
    """Scores 1 and 3: the second page moves the maximum, and weighs the first with e^-2."""
    problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=1, seqlen_k=2, head_dim=1, dtype="float32",
                      softmax_scale=2.0, page_size=1)  # fmt: skip
    q, k, v = (torch.tensor(rows).view(1, 1, -1, 1) for rows in ([1.0], [0.5, 1.5], [10.0, 20.0]))
    trace = backends.get("cpu").trace(q, k, v, problem)
    weight = math.exp(-2)
    for stage, expected in {
        "scores": [1, 3], "row_max": [1, 3], "rescale": [0, weight], "probs": [1, 1], "row_sum": [1, 1 + weight],
        "accum": [10, 20 + 10 * weight], "out": [(20 + 10 * weight) / (1 + weight)], "lse": [3 + math.log1p(weight)],
    }.items():  # fmt: skip
        assert getattr(trace, stage).flatten().tolist() == pytest.approx(expected, rel=1e-6), stage


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_probs_are_rounded_before_they_meet_v_and_sums_are_not(dtype):
    problem = square(1, 2, 40, 16, dtype=dtype, page_size=64)
    q, k, v = make_inputs(problem)
    trace = backends.get("cpu").trace(q, k, v, problem)
    exact = (trace.scores - trace.row_max[:, :, 0, :, None]).exp()
    assert trace.probs.dtype == getattr(torch, dtype) and torch.equal(trace.probs, exact.to(trace.probs.dtype))
    assert trace.accum.dtype == trace.row_sum.dtype == torch.float32
    torch.testing.assert_close(trace.row_sum[:, :, 0], exact.sum(-1))
    torch.testing.assert_close(trace.accum[:, :, 0], trace.probs.float() @ v.float())
    assert not torch.equal(trace.probs.float(), exact), "else nothing was rounded"


def test_a_row_without_a_key_is_zero_and_minus_infinity_and_no_nan_on_the_way():
    problem = UNEQUAL.with_(page_size=16)
    trace = backends.get("cpu").trace(*make_inputs(problem), problem)
    empty = problem.seqlen_q - problem.seqlen_k
    assert bool((trace.out[:, :, :empty] == 0).all()) and bool((trace.lse[:, :, :empty] == -math.inf).all())
    assert not any(bool(getattr(trace, stage).isnan().any()) for stage in STAGES)
    assert bool(trace.lse[:, :, empty:].isfinite().all())


def test_query_heads_share_k_and_v_in_consecutive_groups():
    tensor = torch.arange(3.0).view(1, 3, 1, 1)
    problem = Problem(batch=1, num_heads_q=6, num_heads_kv=3, seqlen_q=1, seqlen_k=1, head_dim=1)
    assert backends.get("cpu").kv_of_head(tensor.half(), problem).flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_one_wrong_stage_is_one_overridden_method():
    """What planted bugs rely on: `run` and `trace` go through the same methods."""

    class Doubled(CpuBackend):
        def accum(self, accum, rescale, probs, v):
            return super().accum(accum, rescale, 2 * probs, v)

    problem = square(1, 1, 16, 8, page_size=16)
    inputs = make_inputs(problem)
    right, wrong = CpuBackend().run(*inputs, problem), Doubled().run(*inputs, problem)
    torch.testing.assert_close(wrong[0], 2 * right[0])
    assert torch.equal(wrong[1], right[1]) and torch.equal(Doubled().trace(*inputs, problem).out, wrong[0])


MASKED = UNEQUAL.with_(batch=6, page_size=16, window_left=30, softcap=4.0, sink=True)


@pytest.mark.parametrize("lengths", ["", "right", "left", "ragged"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masks_agree_with_the_reference_and_rows_that_are_not_real_hold_nothing(backend, lengths):
    problem = MASKED.with_(lengths=lengths)
    inputs, masks = make_inputs(problem, layout="bshd"), make_masks(problem)
    chosen = backends.get(backend)
    out, lse = chosen.run(*inputs, problem, masks)
    expected, expected_lse = reference.attention(*inputs, problem, masks)
    assert out.shape == inputs[0].shape and out.dtype == inputs[0].dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    trace, truth = chosen.trace(*inputs, problem, masks), reference.trace(*inputs, problem, masks=masks)
    for stage in STAGES:
        assert getattr(trace, stage).shape == getattr(truth, stage).shape
        torch.testing.assert_close(getattr(trace, stage).double(), getattr(truth, stage), rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_mask_tensors_that_are_missing_or_make_no_sense_are_refused(backend):
    problem = UNEQUAL.with_(lengths="right")
    inputs, chosen = make_inputs(problem), backends.get(backend)
    for ask in (chosen.run, chosen.trace):
        with pytest.raises(InvalidProblem, match="needs seqlens_q, seqlens_k or both"):
            ask(*inputs, problem)
        with pytest.raises(InvalidProblem, match=r"seqlens_k\[0\] is 51; it has to be from 0 to the 50 rows of k"):
            ask(*inputs, problem, MaskTensors(seqlens_k=torch.tensor([51], dtype=torch.int32)))
        with pytest.raises(InvalidProblem, match="sink is given, and .* has no use for it"):
            ask(*make_inputs(UNEQUAL), UNEQUAL, MaskTensors(sink=torch.zeros(4)))


# ------------------------------------------------------------------------------------ bits that are the same anywhere

KEPT = Problem(
    batch=3, num_heads_q=4, num_heads_kv=2, seqlen_q=40, seqlen_k=150, head_dim=24, causal=True, batch_invariant=True
)  # fmt: skip


def rows_alone(backend, q, k, v, problem):
    """Rows of a causal problem whose bits are others than those of the row alone, with the keys that it sees."""
    out, lse = backend.run(q, k, v, problem)
    offset, differ = problem.seqlen_k - problem.seqlen_q, []
    for b, i in ((0, 0), (1, 17), (2, 25), (2, 39)):
        row, keys = (
            (slice(b, b + 1), slice(None), slice(i, i + 1)),
            (slice(b, b + 1), slice(None), slice(i + offset + 1)),
        )
        one = problem.with_(batch=1, seqlen_q=1, seqlen_k=i + offset + 1, page_size=16)
        alone, alone_lse = backend.run(q[row], k[keys], v[keys], one)
        if not (torch.equal(alone, out[row]) and torch.equal(alone_lse, lse[row])):
            differ.append((b, i))
    return differ


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("masks", [{}, {"softcap": 2.0, "window_left": 70}])
def test_a_row_has_the_bits_that_it_has_alone_whatever_the_pages_are(dtype, masks):
    backend, problem = backends.get("cpu"), KEPT.with_(dtype=dtype, **masks)
    inputs = make_inputs(problem)
    out, lse = backend.run(*inputs, problem)
    expected, expected_lse = reference.attention(*inputs, problem)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    for page_size in (16, 100):
        again = backend.run(*inputs, problem.with_(page_size=page_size))
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    assert rows_alone(backend, *inputs, problem) == []


def test_its_trace_is_of_tiles_of_64_keys_and_of_the_same_bits():
    backend, inputs = backends.get("cpu"), make_inputs(KEPT)
    trace, (out, lse) = backend.trace(*inputs, KEPT), backend.run(*inputs, KEPT)
    assert trace.page_size == 64 and torch.equal(trace.out, out) and torch.equal(trace.lse, lse)
    expected = reference.trace(*inputs, KEPT.with_(page_size=64))
    for stage in STAGES:
        torch.testing.assert_close(getattr(trace, stage).double(), getattr(expected, stage), rtol=2e-3, atol=2e-3)
    assert not backend.in_order, "who computes the next problem is as before"


@pytest.mark.parametrize(
    "planted",
    [
        {"row_max": lambda self, scores, row_max: CpuBackend.row_max(self, scores, row_max).amax(0, keepdim=True)},
        {"for_problem": lambda self, problem: (CpuBackend.for_problem(self, problem)[0], problem)},
        {"total": lambda self, x: x[..., : x.shape[-2]].sum(-1) + x[..., x.shape[-2] :].sum(-1)},
    ],
    ids=["a vote of neighbours", "tiles of the problem's pages", "sums by the number of rows"],
)
def test_what_breaks_the_promise_shows(planted):
    problem = KEPT.with_(dtype="float32", head_dim=96)
    assert rows_alone(with_methods(backends.get("cpu"), planted), *make_inputs(problem), problem) != []
