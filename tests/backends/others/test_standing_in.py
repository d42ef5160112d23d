"""Who stands in for a kernel: FlashAttention with what it knows, in its own layout, else exact operations."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from support.exact_attention import near, padded, ragged, starts

from flashcore import backends
from flashcore.backends.others import flash
from flashcore.backends.others.standing_in import StandIn
from flashcore.numerics.masking import MaskTensors
from flashcore.problem import Problem

STAND_IN = StandIn()
PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=5, seqlen_k=7, head_dim=16, dtype="float32")


def qkv(dtype=torch.float32):
    return [torch.randn(2, heads, size, 16).to(dtype) for heads, size in ((4, 5), (2, 7), (2, 7))]


def test_exact_operations_on_the_cpu_for_every_kind_of_mask():
    q, k, v = qkv()
    sink, lengths = torch.randn(4), torch.tensor([3, 7], dtype=torch.int32)
    problem = PROBLEM.with_(window_left=2, softcap=2.0, sink=True, lengths="left", causal=True)
    assert STAND_IN.why_not(problem) is None and "auto" not in [one.id for one in backends.all_backends()]
    out, lse = STAND_IN.run_with_lse(q, k, v, problem, MaskTensors(sink=sink, seqlens_k=lengths))
    options = {"window_left": 2, "softcap": 2.0, "sink": sink, "causal": True}
    expected, expected_lse = padded(q, k, v, seqlens_k=lengths, padding="left", **options)
    near(out, expected, torch.float32)
    near(lse, expected_lse, torch.float32)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors that say they lie on a GPU, and a package of FlashAttention that is a loop in float64."""
    seen = []

    class Gpu(torch.Tensor):
        is_cuda = True

    def dense(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, return_attn_probs=False):
        seen.append(("dense", tuple(q.shape), causal, window_size, softcap))
        left, right = window_size
        options = {"window_left": left, "window_right": right, "softcap": softcap or None, "causal": causal}
        out, lse = padded(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=softmax_scale, **options)
        out = out.transpose(1, 2).to(q.dtype)
        return (out, lse.float(), None) if return_attn_probs else out

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, return_attn_probs=False):
        seen.append(("varlen", tuple(q.shape), causal, max_seqlen_q, max_seqlen_k))
        rows, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        out, lse = ragged(q[: sum(rows)], k[: sum(keys)], v[: sum(keys)], rows, keys, causal=causal)
        rest = q.shape[0] - sum(rows)
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, rest), value=math.nan).to(q.dtype)
        return (
            (out, torch.nn.functional.pad(lse.float(), (0, rest), value=math.inf), None) if return_attn_probs else out
        )

    def functions(name, index):
        function = {"flash_attn_func": dense, "flash_attn_varlen_func": varlen}[name]
        return ((function, flash.HALVES, frozenset(inspect.signature(function).parameters)),)

    monkeypatch.setattr(flash, "functions", functions)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    return seen, lambda tensor: tensor.as_subclass(Gpu)


def test_a_package_computes_what_it_knows(on_a_gpu):
    seen, gpu = on_a_gpu
    q, k, v = (gpu(tensor) for tensor in qkv(torch.float16))
    problem = PROBLEM.with_(dtype="float16", window_left=2, softcap=3.0, causal=True)
    out, lse = STAND_IN.run_with_lse(q, k, v, problem)
    expected, expected_lse = padded(q, k, v, window_left=2, softcap=3.0, causal=True)
    near(out, expected, torch.float16)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    assert seen == [("dense", (2, 5, 4, 16), True, (2, -1), 3.0)]
    STAND_IN.run(q, k, v, problem.with_(sink=True), MaskTensors(sink=torch.zeros(4)))
    assert len(seen) == 1, "it knows no sinks"


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_package_computes_a_padded_batch_as_a_ragged_one(on_a_gpu, side):
    seen, gpu = on_a_gpu
    q, k, v = (gpu(tensor) for tensor in qkv(torch.float16))
    problem = PROBLEM.with_(dtype="float16", causal=True, lengths=side)
    for of_q in (None, torch.tensor([2, 5], dtype=torch.int32)):
        masks = MaskTensors(seqlens_q=of_q, seqlens_k=torch.tensor([3, 7], dtype=torch.int32))
        for tensor in (k, v):  # what lies in padding may be anything
            tensor[0, :, slice(3, None) if side == "right" else slice(0, 4)] = math.nan
        out, lse = STAND_IN.run_with_lse(q, k, v, problem, masks)
        expected, expected_lse = padded(
            q, k, v, seqlens_q=of_q, seqlens_k=masks.seqlens_k, padding=side, causal=True
        )  # fmt: skip
        near(out, expected, torch.float16)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    assert [name for name, *_ in seen] == ["varlen"] * 2 and seen[0][1] == (10, 4, 16)


def test_a_package_computes_a_ragged_batch_and_rows_past_its_end_are_cleared(on_a_gpu):
    seen, gpu = on_a_gpu
    q, k, v = (gpu(torch.randn(1, heads, 12, 16).half()) for heads in (4, 2, 2))
    problem = PROBLEM.with_(dtype="float16", lengths="ragged", causal=True)
    places = starts([4, 5])
    out, lse = STAND_IN.run_with_lse(q, k, v, problem, MaskTensors(cu_seqlens_q=places, cu_seqlens_k=places))
    expected, _ = ragged(*(t[0].transpose(0, 1)[:9] for t in (q, k, v)), [4, 5], [4, 5], causal=True)
    near(out[0].transpose(0, 1)[:9], expected, torch.float16)
    assert not out[:, :, 9:].any() and (lse[:, :, 9:] == -math.inf).all() and lse.shape == (1, 4, 12)
    assert seen == [("varlen", (12, 4, 16), True, 5, 7)]
    assert STAND_IN.run(q, k, v, problem, MaskTensors(cu_seqlens_q=places, cu_seqlens_k=places))[1] is None
