"""Ours inside of torch's attention: what torch's dispatcher calls while it is active, and what it stays out of."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import attention as registry

from flashcore import ops
from flashcore.errors import ToolMissing, UnknownName, Unsupported
from flashcore.integrations import torch_flash

OP = torch.ops.aten._scaled_dot_product_flash_attention
has_registry = pytest.mark.skipif(
    not hasattr(registry, "register_flash_attention_impl"), reason="this torch has no registry of implementations"
)


@pytest.fixture
def qkv():
    q = torch.randn(2, 5, 4, 16).transpose(1, 2)  # as a model has it: [B, S, H, D] seen as [B, H, S, D]
    return q, *(torch.randn(2, 2, 5, 16) for _ in range(2))


@pytest.fixture
def torchs(monkeypatch):
    """Calls that were left to torch; a CPU has no FlashAttention-2 to compute them."""
    calls = []

    def called(*given, **options):
        calls.append((given, options))
        q, k = given[:2]
        lse, state = q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), torch.zeros(2, dtype=torch.uint64)
        return torch.full_like(q, 7.0), lse, state, state, q.new_empty(0)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", called)
    return calls


@has_registry
def test_torch_calls_ours_while_it_is_active(qkv, monkeypatch):
    q, k, v = qkv
    monkeypatch.setattr(torch_flash, "DISPATCH_KEY", "CPU")
    assert torch_flash.register(backend="cpu") == "FlashCore" in registry.list_flash_attention_impls()
    with pytest.raises(NotImplementedError):
        OP(q, k, v)
    registry.activate_flash_attention_impl("FlashCore")
    try:
        assert registry.current_flash_attention_impl() == "FlashCore"
        out, lse, *_, max_q, max_k, state, _, _ = OP(q, k, v, 0.0, True, scale=0.3)
    finally:
        registry.restore_flash_attention_impl()
    with pytest.raises(NotImplementedError):
        OP(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    assert out.stride() == torch.empty_like(q).stride()
    scores = (q.double() @ k.repeat_interleave(2, 1).double().mT * 0.3).masked_fill(
        ~torch.ones(5, 5).tril().bool(), -math.inf
    )
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())
    assert (max_q, max_k, state.dtype, tuple(state.shape)) == (5, 5, torch.uint64, (2,))


def test_bits_of_every_batch_are_ours_or_the_call_is_refused(qkv, torchs, monkeypatch):
    monkeypatch.setenv("FLASHCORE_BATCH_INVARIANT", "1")
    out, lse, *_ = torch_flash.forward(*qkv, is_causal=True)
    expected = ops.attention(*qkv, causal=True, return_lse=True, batch_invariant=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    with pytest.raises(
        Unsupported, match="torch would compute this call without that promise, since no kernel of ours"
    ):
        torch_flash.forward(*qkv, dropout_p=0.5)
    assert not torchs


@has_registry
def test_on_a_gpu_it_takes_the_place_of_one_op(monkeypatch):
    there = torch._C._dispatch_has_kernel_for_dispatch_key
    name = "aten::_scaled_dot_product_flash_attention"
    if torch.version.cuda is not None:
        pytest.skip("this torch has a kernel of its own there, before and after")
    registry.activate_flash_attention_impl(torch_flash.register("FlashCore, for this test"))
    try:
        assert there(name, "CUDA") and not there("aten::_flash_attention_forward", "CUDA")
    finally:
        registry.restore_flash_attention_impl()
    assert not there(name, "CUDA")


def test_rows_that_see_no_key_have_what_torchs_backward_pass_expects(qkv):
    q, k, v = qkv
    out, lse, *_ = torch_flash.forward(q, k[:, :, :3], v[:, :, :3], is_causal=True, backend="cpu")
    assert (lse[:, :, :2] == math.inf).all() and lse[:, :, 2:].isfinite().all()
    assert (out[:, :, :2] == 0).all() and torch.equal(out[:, :, 2], v[:, :, 0].repeat_interleave(2, 1))


@pytest.mark.parametrize(
    "options, backend",
    [({"dropout_p": 0.1}, "cpu"), ({"return_debug_mask": True}, "cpu"), ({"scale": -0.5}, "cpu"),
     ({"scale": 0.0}, "cpu"), ({}, "hopper"), ({}, "auto")],
)  # fmt: skip
def test_what_is_not_ours_stays_with_torch(qkv, torchs, options, backend):
    """float32 on a CPU is nothing for `hopper`, nor for what `auto` would pick of ours."""
    out, lse, none, _, max_q, *_ = torch_flash.forward(*qkv, **options, backend=backend)
    ((given, named),) = torchs
    assert out.shape == qkv[0].shape and (out == 7).all() and lse.shape == (2, 4, 5) and none is None and max_q == 5
    assert given[2:7] == (given[2], None, None, 5, 5) and given[0].shape == (2, 5, 4, 16)
    assert (given[7], given[9], named["scale"]) == (
        options.get("dropout_p", 0.0), options.get("return_debug_mask", False), options.get("scale"),
    )  # fmt: skip


def test_what_cannot_be_registered(monkeypatch):
    if hasattr(registry, "register_flash_attention_impl"):
        with pytest.raises(UnknownName, match="no-such"):
            torch_flash.register(backend="no-such")
    monkeypatch.delattr(registry, "register_flash_attention_impl", raising=False)
    with pytest.raises(ToolMissing, match="has no registry of FlashAttention implementations.*replace_sdpa"):
        torch_flash.register()


@pytest.mark.gpu
@has_registry
@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_backward_on_a_gpu(causal):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, grad = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))

    def found():
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=causal)
        out.backward(grad)
        return out.detach(), *(t.grad for t in given)

    expected = found()
    registry.activate_flash_attention_impl(torch_flash.register())
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            got = found()
            torch.cuda.synchronize()
    finally:
        registry.restore_flash_attention_impl()
    assert any("hopper" in event.key for event in seen.key_averages()), "a kernel of ours ran"
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
