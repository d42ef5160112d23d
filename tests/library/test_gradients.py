"""Gradients of attention: against float64, through `out` and `lse`, by our products and by torch's kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashcore
from flashcore.errors import InvalidProblem, Unsupported
from flashcore.library import gradients

CASES = {
    "plain": {},
    "causal": {"causal": True},
    "fewer rows": {"seqlen_q": 5, "seqlen_k": 17, "causal": True},
    "rows without a key": {"seqlen_q": 17, "seqlen_k": 5, "causal": True},
    "one row": {"seqlen_q": 1, "seqlen_k": 9, "causal": True},
    "groups": {"heads": (6, 2), "causal": True},
    "one head for all": {"heads": (4, 1)},
    "scale below 0": {"scale": -0.7, "causal": True},
    "scale 0": {"scale": 0.0},
}


def made(dtype, device="cpu", *, seqlen_q=12, seqlen_k=12, heads=(2, 2), head_dim=16, bshd=False, **options):
    def one(num_heads, rows):
        tensor = torch.randn(2, rows, num_heads, head_dim, dtype=dtype, device=device).transpose(1, 2)
        return (tensor if bshd else tensor.contiguous()).requires_grad_()

    return (one(heads[0], seqlen_q), one(heads[1], seqlen_k), one(heads[1], seqlen_k)), options


def exact(inputs, weights, lse_weights, *, causal=False, scale=None):
    """Gradients by autograd in float64, from the definition; rows without a key have none."""
    q, k, v = (t.detach().double().requires_grad_() for t in inputs)
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    row = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    hidden = torch.arange(k.shape[2], device=q.device) > row if causal else torch.zeros_like(row == row.T)[:1, :1]
    some = ~hidden.all(-1).expand(scores.shape[-2])
    scores = scores.masked_fill(hidden, -math.inf)[:, :, some]
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    loss = (out * weights.double()[:, :, some]).sum()
    if lse_weights is not None:
        loss = loss + (scores.logsumexp(-1) * lse_weights.double()[:, :, some]).sum()
    return torch.autograd.grad(loss, (q, k, v))


def close(got, expected, dtype):
    """Within a few roundings of the largest gradient: each is a sum over rows or keys of numbers of that size."""
    bound = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]
    for one, true in zip(got, expected, strict=True):
        assert one.dtype == dtype and one.isfinite().all()
        assert float((one.double() - true).abs().max()) <= bound * float(true.abs().max()) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_float64(case, dtype):
    inputs, options = made(dtype, bshd=case == "groups", **CASES[case])
    causal, scale = options.get("causal", False), options.get("scale")
    out = flashcore.attention(*inputs, causal=causal, softmax_scale=scale)
    weights = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, weights)
    close(got, exact(inputs, weights, None, **options), dtype)
    assert [g.stride() for g in got] == [torch.empty_like(t).stride() for t in inputs]


@pytest.mark.parametrize("through", ["lse alone", "both"])
@pytest.mark.parametrize("case", ["plain", "rows without a key", "groups"])
def test_gradients_flow_through_lse(case, through):
    inputs, options = made(torch.float32, **CASES[case])
    out, lse = flashcore.attention(*inputs, causal=options.get("causal", False), return_lse=True)
    weights, lse_weights = torch.randn_like(out) * (through == "both"), torch.randn_like(lse)
    outputs, given = ([out, lse], [weights, lse_weights]) if through == "both" else ([lse], [lse_weights])
    close(torch.autograd.grad(outputs, inputs, given), exact(inputs, weights, lse_weights, **options), torch.float32)


def test_only_those_that_ask_get_gradients_and_the_op_without_lse_has_them_too():
    (q, k, v), _ = made(torch.float32)
    frozen = q.detach()
    out = flashcore.attention(frozen, k, v)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (k, v))] == [k.shape, v.shape]
    expected = torch.autograd.grad(flashcore.attention(q, k, v).square().sum(), (q, k, v))
    out, lse = torch.ops.flashcore.attention(q, k, v)
    assert not lse.requires_grad
    for got, want in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_chunk_of_heads_at_a_time_is_the_same(monkeypatch):
    inputs, _ = made(torch.float32, heads=(6, 3))
    weights = torch.randn(2, 6, 12, 16)
    whole = torch.autograd.grad(flashcore.attention(*inputs), inputs, weights)
    monkeypatch.setitem(gradients.CHUNK_SCORES, "cpu", 1)
    for got, want in zip(torch.autograd.grad(flashcore.attention(*inputs), inputs, weights), whole, strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivatives_are_refused_in_a_sentence():
    inputs, _ = made(torch.float32)
    (first,) = torch.autograd.grad(flashcore.attention(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(InvalidProblem, match="^Second derivatives of attention were asked for, and"):
        first.sum().backward()


@pytest.mark.slow
def test_opcheck_of_the_backward_pass():
    (q, k, v), _ = made(torch.float32)
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = flashcore.attention(q, k, v, return_lse=True)
    torch.library.opcheck(
        gradients.attention_backward, (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, False, None)
    )


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("lengths", [(12, 12), (20, 12)])
def test_torchs_kernel_is_called_with_what_it_takes(monkeypatch, scale, lengths):
    """A stand-in with the kernel's own conventions: scales above 0, +inf in rows that see no key, rows at 16 bytes."""
    seen = []

    def kernel(grad, q, k, v, out, lse, starts_q, starts_k, rows, keys, dropout, causal, seed, offset, *, scale):
        seen.append((starts_q, starts_k, rows, keys, dropout, causal, scale > 0))
        assert all(t.stride(-1) == 1 and min(t.stride()) > 0 for t in (grad, q, k, v, out))
        assert not (lse == -math.inf).any()
        assert seed.dtype == offset.dtype == torch.uint64
        ours = lse.masked_fill(lse == math.inf, -math.inf)
        return gradients.by_products(grad, None, q, k, v, out, ours, causal, scale)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", kernel)
    inputs, _ = made(torch.float16, seqlen_q=lengths[0], seqlen_k=lengths[1])
    q, k, v = (t.detach() for t in inputs)
    out, lse = flashcore.attention(q, k, v, causal=True, softmax_scale=scale, return_lse=True)
    grad = torch.ones((), dtype=torch.float16).expand(out.shape)  # what a sum hands back: no strides at all
    got = gradients.by_flash(grad, None, q, k, v, out, lse, True, scale)
    close([g.half() for g in got], exact(inputs, grad, None, causal=True, scale=scale), torch.float16)
    assert seen == [(None, None, *lengths, 0.0, True, True)]


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_torchs_kernel_knows_the_arguments(monkeypatch, head_dim):
    """By its own description of what comes out, on tensors of a GPU that are not there."""
    monkeypatch.setattr(gradients, "readable", lambda tensor: tensor)  # it looks where a tensor lies
    with FakeTensorMode():
        q, out, grad = (torch.empty(2, 8, 100, head_dim, dtype=torch.float16, device="cuda") for _ in range(3))
        k, v = (torch.empty(2, 2, 300, head_dim, dtype=torch.float16, device="cuda") for _ in range(2))
        lse = torch.empty(2, 8, 100, device="cuda")
        found = gradients.by_flash(grad, None, q, k, v, out, lse, True, -0.1)
    assert [(g.shape, g.dtype, g.is_cuda) for g in found] == [(t.shape, t.dtype, True) for t in (q, k, v)]


def test_a_backend_that_gives_no_lse_says_what_that_has_to_do_with_gradients():
    inputs, _ = made(torch.float32)
    with pytest.raises(Unsupported, match="'sdpa-math' cannot .* gradients are asked for, and start from lse"):
        flashcore.attention(*inputs, backend="sdpa-math")


def test_what_torchs_kernel_takes(monkeypatch):
    class Like:
        def __init__(self, dtype=torch.float16, head_dim=64, is_cuda=True):
            self.dtype, self.shape, self.is_cuda = dtype, (1, 1, 8, head_dim), is_cuda

    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert gradients.takes_flash(Like(), Like(), None) and gradients.takes_flash(Like(head_dim=256), Like(), None)
    for wrong in (Like(torch.float32), Like(head_dim=264), Like(head_dim=20), Like(is_cuda=False)):
        assert not gradients.takes_flash(wrong, Like(), None)
    assert not gradients.takes_flash(Like(), Like(), Like()) and not gradients.takes_flash(Like(), None, Like())


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("case", [c for c in CASES if c != "one head for all"])
def test_gradients_on_the_gpu(case, head_dim):
    inputs, options = made(torch.bfloat16, "cuda", head_dim=head_dim, bshd=case == "groups", **CASES[case])
    out, lse = flashcore.attention(
        *inputs, causal=options.get("causal", False), softmax_scale=options.get("scale"), return_lse=True
    )
    weights, lse_weights = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad(out, inputs, weights, retain_graph=True)
    close(got, exact(inputs, weights, None, **options), torch.bfloat16)
    got = torch.autograd.grad([out, lse], inputs, [weights, lse_weights])
    close(got, exact(inputs, weights, lse_weights, **options), torch.bfloat16)
