"""The ops of attention with masks: what torch asks of an op, one graph for all lengths, and a rule for `torch.vmap`."""

from __future__ import annotations

import pytest
import torch
from support import compiling
from support.exact_attention import padded, starts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flashcore
from flashcore import varlen_ops  # noqa: F401 - it says what computes the ops
from flashcore.errors import InvalidProblem
from flashcore.library import masked

DENSE, VARLEN = masked.masked_attention, masked.varlen_attention


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def qkv(rows=9, keys=13, grad=False, device="cpu", dtype=torch.float32, head_dim=8):
    shapes = (2, 4, rows, head_dim), (2, 2, keys, head_dim), (2, 2, keys, head_dim)
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad) for shape in shapes]


def packed(lengths, grad=False):
    shapes = (sum(lengths), 4, 8), (sum(lengths), 2, 8), (sum(lengths), 2, 8)
    return [torch.randn(shape).requires_grad_(grad) for shape in shapes]


@pytest.fixture(autouse=True)
def _compiled_anew():
    compiling.forget()
    yield
    compiling.forget()


@pytest.mark.slow
@pytest.mark.parametrize(("with_lse", "grad"), [(False, False), (True, True)])
def test_opcheck(with_lse, grad):
    """Schema, fake tensors (strides too), autograd's registration, and tracing with symbolic sizes."""
    sink = torch.randn(4, requires_grad=grad)
    lengths = ints(5, 9), ints(13, 6)
    masks = (True, None, 4, -1, 3.0, "left", with_lse, "auto")
    torch.library.opcheck(DENSE, (*qkv(grad=grad), sink, *lengths, *masks))
    torch.library.opcheck(
        DENSE, (*qkv(grad=grad), None, None, None, False, 0.3, 4, 2, None, "right", with_lse, "auto", True)
    )
    bounds = (starts([4, 5]), starts([4, 5]), 5, 5)
    torch.library.opcheck(VARLEN, (*packed([4, 5], grad), *bounds, sink, True, None, 4, -1, 3.0, with_lse, "auto"))
    more = (None, False, None, -1, -1, None, with_lse, "auto", True)
    torch.library.opcheck(VARLEN, (*packed([4, 5], grad), *bounds, *more))


def dense_call(q, k, v, lengths):
    return flashcore.attention(q * 2, k, v, causal=True, window_left=4, seqlens_q=lengths, seqlens_k=lengths) + 1


def varlen_call(q, k, v, places, longest):
    return flashcore.varlen_attention(q * 2, k, v, places, places, longest, longest, causal=True, window_left=4) + 1


@pytest.mark.slow
def test_models_compile_whole_and_not_again_for_each_length():
    counters = compiling.counter(), compiling.counter()
    calls = [
        torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
        for call, counter in zip((dense_call, varlen_call), counters, strict=True)
    ]
    for length in (6, 9, 17, 33):  # no total that is the head_dim: what is equal at first is taken to stay so
        given = (*qkv(length, length), ints(length, length - 3))
        torch.testing.assert_close(calls[0](*given), dense_call(*given))
        lengths = [length, 2, length - 4]
        given = (*packed(lengths), starts(lengths), length)
        torch.testing.assert_close(calls[1](*given), varlen_call(*given))
    assert [counter.frame_count for counter in counters] == [1, 1]


@pytest.mark.slow
def test_compiled_gradients_are_those_of_the_call():
    sink = torch.randn(4, requires_grad=True)

    def dense(q, k, v):
        return flashcore.attention(q, k, v, causal=True, sink=sink, softcap=2.0, return_lse=True)

    def ragged(q, k, v):
        bounds = starts([4, 5]), starts([4, 5]), 5, 5
        return flashcore.varlen_attention(q, k, v, *bounds, causal=True, sink=sink, return_lse=True)

    for call, given in ((dense, qkv(grad=True)), (ragged, packed([4, 5], True))):
        found = []
        for one in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            out, lse = one(*given)
            found.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), [*given, sink])))
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride()


@pytest.mark.slow
def test_export_keeps_the_ops_and_free_lengths():
    class Block(torch.nn.Module):
        def forward(self, q, k, v, lengths, places):
            dense = dense_call(q, k, v, lengths)
            flat = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
            return dense, varlen_call(*flat, places, q.shape[2])

    rows = torch.export.Dim("rows", min=4, max=512)
    free = {2: rows}
    given = (*qkv(9, 9), ints(9, 4), starts([9, 9]))
    exported = torch.export.export(Block(), given, dynamic_shapes=(free, free, free, None, None))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert {"flashcore.masked_attention.default", "flashcore.varlen_attention.default"} <= set(targets)
    given = (*qkv(20, 20), ints(3, 20), starts([20, 20]))
    for got, expected in zip(exported.module()(*given), Block()(*given), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_fake_tensors_look_as_real_results_do():
    real = [*qkv(), ints(5, 9)]
    ragged = [*packed([4, 5]), starts([4, 5])]
    with FakeTensorMode() as mode:
        q, k, v, lengths = (mode.from_tensor(tensor) for tensor in real)
        fake = flashcore.attention(q, k, v, seqlens_q=lengths, return_lse=True)
        fake_q, fake_k, fake_v, places = (mode.from_tensor(tensor) for tensor in ragged)
        fake += flashcore.varlen_attention(fake_q, fake_k, fake_v, places, places, 5, 5, return_lse=True)
        with pytest.raises(InvalidProblem, match=r"^seqlens_k is a torch.int32 tensor \[3\]"):
            flashcore.attention(q, k, v, seqlens_k=places)
        with pytest.raises(InvalidProblem, match=r"^cu_seqlens_k is a torch.int32 tensor \[2\]"):
            flashcore.varlen_attention(fake_q, fake_k, fake_v, places, lengths, 5, 5)
    expected = flashcore.attention(*real[:3], seqlens_q=real[3], return_lse=True)
    expected += flashcore.varlen_attention(*ragged, ragged[3], 5, 5, return_lse=True)
    for one, other in zip(fake, expected, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("with_lse", [False, True])
def test_vmap_folds_the_mapped_axis_and_its_lengths_into_the_batch(with_lse):
    q, k, v = qkv()
    many_q, lengths = torch.stack([q, -q, q * 0.5]), torch.tensor([[5, 9], [13, 1], [2, 2]], dtype=torch.int32)
    sink = torch.randn(4)

    def one(q, lengths):
        return flashcore.attention(
            q, k, v, seqlens_k=lengths, padding="left", sink=sink, window_left=6, return_lse=with_lse
        )

    got = torch.vmap(one)(many_q, lengths)
    alone = [one(*each) for each in zip(many_q, lengths, strict=True)]
    expected = [torch.stack(each) for each in zip(*alone, strict=True)] if with_lse else [torch.stack(alone)]
    for found, true in zip(got if with_lse else [got], expected, strict=True):
        torch.testing.assert_close(found, true)
    with pytest.raises(InvalidProblem, match="^sink is mapped by torch.vmap"):
        torch.vmap(lambda sink: flashcore.attention(q, k, v, sink=sink))(torch.randn(3, 4))


def test_the_op_says_what_the_call_says():
    q, k, v = qkv()
    out, lse = DENSE(q, k, v, window_left=3)
    assert lse.shape == (0,) and torch.equal(out, flashcore.attention(q, k, v, window_left=3))
    for options, words in (({"softcap": -1.0}, "^softcap is -1.0"), ({"padding": "left"}, "without lengths"),
                           ({"causal": True, "window_right": 2}, "^window_right is 2")):  # fmt: skip
        with pytest.raises(InvalidProblem, match=words):
            DENSE(q, k, v, **options)
    with pytest.raises(InvalidProblem, match="^max_seqlen_q is -1"):
        VARLEN(*packed([4, 5]), starts([4, 5]), starts([4, 5]), -1, 5)


@pytest.mark.parametrize("promised", [False, True])
def test_gradients_of_the_op_itself_without_lse(promised):
    given = qkv(grad=True)
    out, _ = DENSE(*given, causal=True, window_left=3, batch_invariant=promised)
    true, _ = padded(*given, causal=True, window_left=3)
    weights = torch.randn(out.shape)
    for one, other in zip(*(torch.autograd.grad((t * weights).sum(), given) for t in (out, true)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    ragged, sink = packed([4, 5], True), torch.linspace(-1, 1, 4, requires_grad=True)
    given = *ragged, sink
    out, _ = VARLEN(*ragged, starts([4, 5]), starts([4, 5]), 5, 5, sink, batch_invariant=promised)
    again = flashcore.varlen_attention(*ragged, starts([4, 5]), starts([4, 5]), 5, 5, sink=sink)
    for one, other in zip(*(torch.autograd.grad(t.square().sum(), given) for t in (out, again)), strict=True):
        torch.testing.assert_close(one, other)


def test_operations_are_counted_as_of_a_plain_call_and_of_the_longest_sequences():
    q, k, v = qkv(grad=True)
    with FlopCounterMode(display=False) as counter:
        out = flashcore.attention(q, k, v, window_left=3)
        assert counter.get_total_flops() == 4 * 2 * 4 * 9 * 13 * 8
        out.sum().backward()
        assert counter.get_total_flops() == 4 * 2 * 4 * 9 * 13 * 8 * 7 // 2
    with FlopCounterMode(display=False) as counter:
        out = flashcore.varlen_attention(*packed([4, 5], True), starts([4, 5]), starts([4, 5]), 5, 5)
        assert counter.get_total_flops() == 4 * 9 * 4 * 5 * 8
        out.sum().backward()
        assert counter.get_total_flops() == 4 * 9 * 4 * 5 * 8 * 7 // 2


@pytest.mark.gpu
def test_opcheck_on_the_gpu():
    given = qkv(100, 300, device="cuda", dtype=torch.bfloat16, head_dim=64)
    lengths = ints(50, 100).cuda(), ints(300, 60).cuda()
    torch.library.opcheck(
        DENSE, (*given, torch.zeros(4, device="cuda"), *lengths, True, None, 64, -1, None, "right", True, "auto")
    )
    flat = [tensor[0].transpose(0, 1) for tensor in qkv(100, 100, device="cuda", dtype=torch.bfloat16, head_dim=64)]
    bounds = starts([40, 60], "cuda"), starts([40, 60], "cuda"), 60, 60
    torch.library.opcheck(VARLEN, (*flat, *bounds, None, True, None, -1, -1, None, True, "auto"))


@pytest.mark.gpu
def test_a_compiled_call_with_masks_on_the_gpu():
    compiled = torch.compile(dense_call, fullgraph=True, dynamic=True)
    for length in (64, 100, 200):
        q, k, v = qkv(length, length, device="cuda", dtype=torch.bfloat16, head_dim=64)
        lengths = ints(length, length - 30).cuda()
        torch.testing.assert_close(
            compiled(q, k, v, lengths), dense_call(q, k, v, lengths), rtol=2e-2, atol=2e-2
        )  # fmt: skip
