"""Gradients of attention: against float64, through `out` and `lse`, by our products and by torch's kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashcore
from flashcore import ops
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


@pytest.mark.slow
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


def flash_backward(grad, q, k, v, out, lse, starts_q, starts_k, rows, keys, dropout, causal, state, unused, *, scale,
                   window_size_left=None, window_size_right=None):  # fmt: skip
    """A stand-in with the conventions of torch's kernel, from the formula: rows before heads, +inf without a key."""
    assert scale > 0 and dropout == 0.0 and state.dtype == unused.dtype == torch.uint64
    assert all(t.stride(-1) == 1 and min(t.stride()) > 0 for t in (grad, q, k, v, out))
    assert not (lse == -math.inf).any(), "it would take exp(inf)"
    left = -1 if window_size_left is None else window_size_left
    right = -1 if window_size_right is None else window_size_right
    assert not (left >= 0 > right and not causal), "it means something else by that window"
    if starts_q is None:
        places = [((nth, slice(None)), (nth, slice(None)), (nth,)) for nth in range(q.shape[0])]
    else:
        both = zip(starts_q.tolist(), starts_q[1:].tolist(), starts_k.tolist(), starts_k[1:].tolist(), strict=False)
        places = [((slice(a, b),), (slice(c, d),), (slice(None), slice(a, b))) for a, b, c, d in both]
        assert all(place[0][0].stop - place[0][0].start <= rows for place in places)
    found = [torch.full_like(tensor, math.nan) for tensor in (q, k, v)]  # what no sequence owns stays as it was
    for of_q, of_k, of_lse in places:
        if 0 in q[of_q].shape or 0 in k[of_k].shape:
            for one, of in zip(found, (of_q, of_k, of_k), strict=True):
                one[of] = 0.0
            continue
        sequence = [t[None].transpose(1, 2) for t in (grad[of_q], q[of_q], k[of_k], v[of_k], out[of_q])]
        gave = gradients.by_products(
            sequence[0], None, *sequence[1:], lse[of_lse][None].masked_fill(lse[of_lse][None] == math.inf, -math.inf),
            causal, scale, window=(left, right),
        )  # fmt: skip
        for one, of, this in zip(found, (of_q, of_k, of_k), gave, strict=True):
            one[of] = this[0].transpose(0, 1).to(one.dtype)
    return found


WINDOWS = {
    "left and right": {"window_left": 4, "window_right": 2},
    "causal": {"causal": True, "window_left": 3},
    "right alone": {"window_right": 2},
    "rows without a key": {"causal": True, "window_left": 0, "softmax_scale": -0.4},
    "sink": {"causal": True, "window_left": 5, "sink": torch.tensor([0.3, -1.0])},
    "scores of 0": {"window_left": 4, "window_right": 2, "softmax_scale": 0.0},
}


@pytest.mark.parametrize("batch", ["dense", "ragged", "right", "left", "keys"])
@pytest.mark.parametrize("name", WINDOWS)
def test_torchs_kernel_takes_windows_sinks_ragged_and_padded_batches(monkeypatch, name, batch):
    """Against our products, from the same `out` and `lse`: what it is given, and what is made of what it gives."""
    options = dict(WINDOWS[name])
    sink = options.pop("sink", None)
    sinks = [] if sink is None else [sink.clone().requires_grad_()]
    asked = {**options, "sink": sinks[0]} if sinks else options
    inputs, _ = made(torch.float16, seqlen_q=14, seqlen_k=9)
    if batch == "ragged":
        places = [torch.tensor(starts, dtype=torch.int32) for starts in ([0, 14, 14, 25], [0, 9, 16, 16])]
        inputs = [t.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for t in inputs]
        monkeypatch.setattr(ops, "check_numbers", lambda *asked, **more: None)  # rows past the end, as on a GPU
        out = flashcore.varlen_attention(*inputs, *places, 14, 9, **asked)
    else:
        if batch != "dense":
            asked = {**asked, "seqlens_k": torch.tensor([4, 9], dtype=torch.int32)}
        if batch in ("right", "left"):
            asked |= {"seqlens_q": torch.tensor([14, 0], dtype=torch.int32), "padding": batch}
        out = flashcore.attention(*inputs, **asked)
    weights = torch.randn_like(out)
    expected = torch.autograd.grad(out, [*inputs, *sinks], weights, retain_graph=True)
    called = []
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_backward", lambda *a, **b: called.append(a[6]) or flash_backward(*a, **b)
    )
    monkeypatch.setattr(gradients, "takes_flash", lambda q, grad_out, grad_lse: grad_lse is None)
    monkeypatch.setattr(gradients, "LSE_IS_RAGGED", True)
    got = torch.autograd.grad(out, [*inputs, *sinks], weights)
    for one, other in zip(got, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=5e-3, atol=2e-3)
    assert len(called) == 1 and (called[0] is None) == (batch == "dense")


def test_which_masks_torchs_kernel_takes(monkeypatch):
    asked = []
    monkeypatch.setattr(gradients, "takes_flash", lambda *given: asked.append(given[0].shape) or True)
    q = torch.empty(7, 2, 16)
    for window, causal, cap, takes in (((4, 2), False, None, True), ((4, -1), True, None, True),
                                       ((4, -1), False, None, False), ((-1, -1), True, 2.0, False)):  # fmt: skip
        assert gradients._takes_flash_masked(q, None, None, causal, window, cap) is takes
    assert asked == [(1, 7, 2, 16)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True])
def test_torchs_kernel_knows_the_arguments_of_masks(monkeypatch, ragged):
    """As above, by its own description of what comes out."""
    monkeypatch.setattr(gradients, "readable", lambda tensor: tensor)
    with FakeTensorMode():
        rows, lead = ((2, 100), (2, 8, 100)) if not ragged else ((100,), (8, 100))
        q, out, grad = (torch.empty(*rows, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        k, v = (torch.empty(*rows, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        starts = (torch.empty(3, dtype=torch.int32, device="cuda"),) * 2 if ragged else (None, None)
        lse = torch.empty(lead, device="cuda")
        found = gradients._by_flash_masked(grad, q, k, v, out, lse, starts, (100, 100), True, (16, -1), 0.1)
    assert [(g.shape, g.dtype, g.is_cuda) for g in found] == [(t.shape, t.dtype, True) for t in (q, k, v)]


@pytest.mark.slow
def test_opcheck_of_the_backward_passes_with_masks():
    (q, k, v), _ = made(torch.float32)
    q, k, v = q.detach(), k.detach(), v.detach()
    sink, lengths = torch.randn(2), torch.tensor([5, 12], dtype=torch.int32)
    out, lse = flashcore.attention(q, k, v, sink=sink, seqlens_q=lengths, softcap=2.0, return_lse=True)
    grads = torch.randn_like(out), torch.randn_like(lse)
    tensors = (*grads, q, k, v, out, lse, sink, lengths, None)
    torch.library.opcheck(gradients.masked_attention_backward, (*tensors, False, None, -1, -1, 2.0, "right"))
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    places = torch.tensor([0, 10, 24], dtype=torch.int32)
    out, lse = flashcore.varlen_attention(*flat, places, places, 14, 14, causal=True, return_lse=True)
    tensors = (torch.randn_like(out), None, *flat, out, lse, places, places, 14, 14, None)
    torch.library.opcheck(gradients.varlen_attention_backward, (*tensors, True, None, -1, -1, None))


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
