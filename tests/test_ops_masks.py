"""attention() with windows, caps, sinks and lengths: float64 for the shapes that users of such masks rely on."""

from __future__ import annotations

import math

import pytest
import torch
from support.exact_attention import near, padded
from torch.autograd import forward_ad

import flashcore
from flashcore import ops
from flashcore.errors import InvalidProblem, Unsupported
from flashcore.numerics import reference
from flashcore.numerics.masking import MaskTensors
from flashcore.problem import Problem


def inputs(rows=12, keys=12, heads=(4, 2), dtype=torch.float32, head_dim=16, grad=False, device="cpu", batch=2):
    generator = torch.Generator().manual_seed(rows * 31 + keys)
    shapes = ((heads[0], rows), (heads[1], keys), (heads[1], keys))
    made = [torch.randn(batch, *shape, head_dim, generator=generator).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_(grad) for tensor in made]


def ints(*numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


SINK = torch.tensor([0.5, -1.0, 2.0, -math.inf])
MASKS = {
    "window": {"window_left": 3, "window_right": 2},
    "causal window": {"causal": True, "window_left": 4},
    "window of one": {"causal": True, "window_left": 0},
    "left side only": {"window_left": 2},
    "right side only": {"window_right": 3},
    "cap": {"softcap": 2.0, "causal": True},
    "sink": {"sink": SINK, "causal": True},
    "sink and a window": {"sink": SINK, "causal": True, "window_left": 2, "softmax_scale": -0.2},
    "right lengths": {"seqlens_q": ints(7, 12), "seqlens_k": ints(9, 4), "causal": True},
    "left lengths": {"seqlens_q": ints(7, 0), "seqlens_k": ints(7, 5), "padding": "left"},
    "lengths of keys": {"seqlens_k": ints(9, 0), "sink": SINK},
    "all, left": {"seqlens_q": ints(7, 11), "seqlens_k": ints(9, 12), "padding": "left", "sink": SINK, "softcap": 3.0,
                  "causal": True, "window_left": 4, "softmax_scale": 0.4},
    "all, right": {"seqlens_q": ints(12, 1), "seqlens_k": ints(3, 12), "sink": SINK, "softcap": 3.0, "window_left": 2,
                   "window_right": 1},
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference", "stand-in"])
@pytest.mark.parametrize("name", MASKS)
def test_out_and_lse(name, backend, monkeypatch):
    asked = {} if backend == "stand-in" else {"backend": backend}
    if backend == "stand-in":
        monkeypatch.setattr(ops, "choose", lambda *asked: ops.STAND_IN)
        monkeypatch.setattr(ops, "_calls", {})
    for lengths, heads, dtype in (((12, 12), (4, 2), torch.float32), ((12, 16), (4, 1), torch.bfloat16)):
        q, k, v = inputs(*lengths, heads, dtype)
        out, lse = flashcore.attention(q, k, v, return_lse=True, **MASKS[name], **asked)
        expected, expected_lse = padded(q, k, v, **MASKS[name])
        near(out, expected, dtype)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=1e-3)
        assert out.dtype == dtype and lse.dtype == torch.float32 and out.stride() == torch.empty_like(q).stride()
        near(flashcore.attention(q, k, v, **MASKS[name], **asked), expected, dtype)


@pytest.mark.parametrize("lengths", [(1, 13), (5, 12), (12, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["window", "causal window", "window of one", "left side only", "right side only"])
def test_windows_over_unequal_lengths(name, lengths):
    """Also where a window hides every key: those rows are 0."""
    q, k, v = inputs(*lengths)
    out, lse = flashcore.attention(q, k, v, return_lse=True, **MASKS[name])
    expected, expected_lse = padded(q, k, v, **MASKS[name])
    near(out, expected, torch.float32)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    if lengths == (12, 5) and name == "window of one":
        assert not out[:, :, :7].any() and (lse[:, :, :7] == -math.inf).all()


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("lengths", [(113, 203), (128, 217), (113, 211), (1, 147), (203, 113), (3, 239)], ids=str)
def test_odd_lengths_and_groups_of_heads_as_the_reference_has_them(lengths, kv_heads):
    """Lengths and groups that are no multiples of a tile, as FlashAttention's users have them; windows drawn anew."""
    rows, keys = lengths
    generator = torch.Generator().manual_seed(rows + kv_heads)
    left, right = torch.randint(0, keys, (2,), generator=generator).tolist()
    real = torch.randint(0, keys + 1, (2,), generator=generator, dtype=torch.int32)
    q, k, v = inputs(rows, keys, (6, kv_heads), head_dim=40)
    sink = torch.randn(6, generator=generator)
    for options in ({"window_left": left, "window_right": right, "softcap": 5.0}, {"causal": True, "window_left": left},
                    {"causal": True, "sink": sink, "seqlens_k": real}):  # fmt: skip
        problem = Problem(
            batch=2, num_heads_q=6, num_heads_kv=kv_heads, seqlen_q=rows, seqlen_k=keys, head_dim=40, dtype="float32",
            lengths="right" if "seqlens_k" in options else "", sink="sink" in options,
            **{name: one for name, one in options.items() if name not in ("sink", "seqlens_k")},
        )  # fmt: skip
        masks = MaskTensors(sink=sink, seqlens_k=real) if "sink" in options else None
        expected, expected_lse = reference.attention(q, k, v, problem, masks)
        out, lse = flashcore.attention(q, k, v, return_lse=True, **options)
        near(out, expected, torch.float32)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_what_lies_in_padding_never_matters(padding):
    q, k, v = inputs()
    options = {"seqlens_q": ints(7, 12), "seqlens_k": ints(9, 4), "padding": padding, "causal": True, "sink": SINK}
    expected = flashcore.attention(q, k, v, return_lse=True, **options)
    for tensor, lengths in ((q, (7, 12)), (k, (9, 4)), (v, (9, 4))):
        for nth, length in enumerate(lengths):
            tensor[nth, :, slice(length, None) if padding == "right" else slice(0, 12 - length)] = math.nan
    grads = [tensor.requires_grad_() for tensor in (q, k, v)]
    got = flashcore.attention(q, k, v, return_lse=True, **options)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    for grad, tensor in zip(torch.autograd.grad(got[0].sum(), grads), grads, strict=True):
        assert grad.isfinite().all() and not grad[tensor.isnan()].any()


@pytest.mark.parametrize("name", MASKS)
def test_gradients(name):
    options = dict(MASKS[name])
    if "sink" in options:
        options["sink"] = options["sink"].clone().requires_grad_()
    given = inputs(grad=True)
    wanted = [*given, *([options["sink"]] if "sink" in options else [])]
    for with_lse in (False, True):
        out, lse = flashcore.attention(*given, return_lse=True, **options)
        true, true_lse = padded(*given, **options)
        weights, of_lse = torch.randn(out.shape), torch.randn(lse.shape)
        found = (out * weights).sum()
        expected = (true * weights).sum()
        if with_lse:
            found = found + (lse * of_lse)[lse > -math.inf].sum()
            expected = expected + (true_lse * of_lse)[true_lse > -math.inf].sum()
        expected = torch.autograd.grad(expected, wanted)
        for one, other in zip(torch.autograd.grad(found, wanted), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_window_that_hides_nothing_is_none_and_one_that_ends_here_is_a_causal_mask():
    base = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=8, seqlen_k=12, head_dim=16)

    def problem(left, right, lengths=""):
        return ops.masked_problem(base, left, right, None, False, lengths)

    assert problem(11, 7) == base and problem(-1, 0) == base.with_(causal=True)
    assert problem(10, -1).window_left == 10 and problem(-1, 6).window_right == 6
    assert problem(3, 0) == base.with_(causal=True, window_left=3)
    q, k, v = inputs(8, 12)
    plain = flashcore.attention(q, k, v)
    assert torch.equal(flashcore.attention(q, k, v, window_left=11, window_right=7), plain)


def test_a_window_of_any_size_is_taken_by_whoever_computes_it():
    q, k, v = (tensor.requires_grad_() for tensor in inputs(8, 12))
    plain = flashcore.attention(q, k, v)
    for size in (2**31, 2**63, 2**70):  # the op has 64 bits for it, and kernels 32
        assert torch.equal(flashcore.attention(q, k, v, window_left=size, window_right=size), plain)
        with torch.no_grad():
            out = flashcore.attention(q, k, v, window_left=size, batch_invariant=True)
            assert torch.equal(out, flashcore.attention(q, k, v, window_left=12, batch_invariant=True))


def test_the_plain_call_asks_nothing_of_masks(monkeypatch):
    monkeypatch.setattr(ops, "_with_masks", lambda *asked: pytest.fail("a plain call went the way of masks"))
    q, k, v = inputs()
    flashcore.attention(q, k, v, causal=True, softmax_scale=0.3, return_lse=True)
    flashcore.attention(q, k, v, window_left=-1, window_right=-1, softcap=None, sink=None, padding="right")


def test_auto_takes_a_kernel_that_takes_the_masks_and_else_whoever_can(monkeypatch):
    problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=8, seqlen_k=8, head_dim=64, softcap=2.0)
    gpu = torch.device("cuda", 0)
    hopper, reference = (type(ops.backends.get(name)) for name in ("hopper", "reference"))
    for one in (hopper, reference):
        monkeypatch.setattr(one, "availability", lambda self: ops.backends.AVAILABLE)
    ops.choose.cache_clear()
    try:
        monkeypatch.setattr(hopper, "masks", ("softcap",))
        assert ops.choose(problem, gpu, "auto", False).id == "hopper"
        ops.choose.cache_clear()
        monkeypatch.setattr(hopper, "masks", ())
        assert ops.choose(problem, gpu, "auto", True) is ops.STAND_IN, "sooner than float64"
        with pytest.raises(Unsupported, match="it does not take a softcap"):
            ops.choose(problem, gpu, "hopper", False)
        assert not ops.kernel_takes("cuda", 0, torch.float16, 64, ("softcap",))
        assert ops.kernel_takes("cuda", 0, torch.float16, 64)
        assert not ops.kernel_takes("cuda", 0, torch.float64, 64) and not ops.kernel_takes("meta", 0, torch.half, 64)
    finally:
        ops.choose.cache_clear()


Q, K, V = inputs()


@pytest.mark.parametrize(("options", "words"), [
    ({"window_left": -2}, r"^window_left is -2; it has to be at least 0, or -1 for no limit"),
    ({"window_right": 1.5}, r"^window_right is 1.5; it has to be a whole number"),
    ({"causal": True, "window_right": 3}, r"^window_right is 3, and causal=True hides all keys after a query"),
    ({"softcap": 0}, r"^softcap is 0.0; it has to be above 0 and finite in float32, or None"),
    ({"softcap": -5.0}, r"^softcap is -5.0; it has to be above 0"),
    ({"softcap": math.nan}, r"^softcap is nan; it has to be above 0"),
    ({"softcap": 1e39}, r"^softcap is 1e\+39; it has to be above 0 and finite in float32"),
    ({"window_left": False}, r"^window_left is False; it has to be a whole number"),
    ({"softcap": "big"}, r"^softcap must be a number, or None; got 'big'"),
    ({"sink": torch.zeros(3)}, r"^sink is a torch.float32 tensor \[3\] on cpu; it has to be a float tensor \[4\]"),
    ({"sink": torch.zeros(4).long()}, r"^sink is a torch.int64 tensor .* it has to be a float tensor \[4\]"),
    ({"sink": [0.0] * 4}, r"^sink is \[0.0, 0.0, 0.0, 0.0\]; it has to be a float tensor"),
    ({"sink": torch.zeros(4, device="meta")}, r"^sink lies on meta and q on cpu; move it there"),
    ({"sink": torch.tensor([0.0, math.nan, 0.0, 0.0])}, r"^sink\[1\] is nan"),
    ({"seqlens_q": torch.tensor([3, 4])}, r"^seqlens_q is a torch.int64 tensor \[2\] .* an int32 tensor \[2\]"),
    ({"seqlens_k": ints(3)}, r"^seqlens_k is a torch.int32 tensor \[1\] .* an int32 tensor \[2\], a length for each"),
    ({"seqlens_k": [3, 4]}, r"^seqlens_k is \[3, 4\]; it has to be an int32 tensor \[2\]"),
    ({"seqlens_k": ints(3, 13)}, r"^seqlens_k\[1\] is 13; it has to be from 0 to the 12 rows of k"),
    ({"seqlens_q": ints(-1, 3)}, r"^seqlens_q\[0\] is -1; it has to be from 0 to the 12 rows of q"),
    ({"seqlens_k": ints(1, 2, 3, 4)[::2]}, r"^seqlens_k has gaps between its numbers \(stride 2\); pass it contiguous"),
    ({"seqlens_k": ints(3, 4).to("meta")}, r"^seqlens_k lies on meta and q on cpu; move it there"),
    ({"padding": "left"}, r"^padding is 'left' without lengths; pass seqlens_k, seqlens_q or both"),
    ({"padding": "both", "seqlens_k": ints(3, 4)}, r"^padding is 'both'; it has to be 'right' or 'left', the same"),
    ({"padding": None, "seqlens_k": ints(3, 4)}, r"^padding is None; it has to be 'right' or 'left'"),
    ({"window_left": 2, "causal": "yes"}, r"^causal has to be True or False"),
    ({"window_left": 2, "softmax_scale": math.inf}, r"^softmax_scale must be finite"),
    ({"window_left": 2, "softmax_scale": 1e39}, r"^softmax_scale must be finite in float32"),
])  # fmt: skip
def test_bad_input_is_one_sentence(options, words):
    with pytest.raises(InvalidProblem, match=words) as caught:
        flashcore.attention(Q, K, V, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_backend_that_cannot_says_so_and_second_derivatives_are_refused():
    with pytest.raises(Unsupported, match="it does not take a softcap"):
        flashcore.attention(Q, K, V, softcap=2.0, backend="sdpa-math")
    with pytest.raises(Unsupported, match="gradients are asked for, and start from lse"):
        flashcore.attention(Q.clone().requires_grad_(), K, V, window_left=2, backend="sdpa-math")
    q = Q.clone().requires_grad_()
    (first,) = torch.autograd.grad(flashcore.attention(q, K, V, window_left=2).square().sum(), q, create_graph=True)
    with pytest.raises(InvalidProblem, match="Second derivatives of attention"):
        first.sum().backward()


@pytest.mark.parametrize("which", ["q", "sink"])
def test_derivatives_that_there_are_none_of_are_refused(which):
    given = {"q": Q, "sink": torch.zeros(4)}
    starts = ints(0, 5, 12)

    def dense(tensor):
        named = {**given, which: tensor}
        return flashcore.attention(named["q"], K, V, sink=named["sink"], seqlens_k=ints(3, 4))

    def ragged(tensor):
        named = {**given, which: tensor}
        packed = (one[0].transpose(0, 1) for one in (named["q"], K, V))
        return flashcore.varlen_attention(*packed, starts, starts, 7, 7, sink=named["sink"])

    for call in (dense, ragged):
        with (
            forward_ad.dual_level(),
            pytest.raises(InvalidProblem, match="^q, k, v or a tensor of a mask carries a tan"),
        ):
            call(forward_ad.make_dual(given[which], torch.ones_like(given[which])))
        with pytest.raises(InvalidProblem, match="a tensor of a mask is transformed by torch.func"):
            torch.func.grad(lambda tensor, call=call: call(tensor).sum())(given[which])


def test_lengths_are_checked_where_a_gpu_is_asked_to_and_asserted_in_a_graph(monkeypatch):
    """As a captured graph does it: nothing is read back, and the device asserts."""
    seen = []
    monkeypatch.setattr(ops, "can_read_back", lambda device: False)
    monkeypatch.setattr(torch, "_assert_async", lambda good, words: seen.append((bool(good), words)))
    problem = Problem(
        batch=2, num_heads_q=1, num_heads_kv=1, seqlen_q=4, seqlen_k=6, head_dim=8, lengths="right", sink=True
    )
    for lengths in (ints(4, 0), ints(5, 1)):
        ops.check_numbers(MaskTensors(sink=torch.zeros(1), seqlens_q=lengths), problem, 4, 6)
    words = "FlashCore requires that seqlens_q holds lengths from 0 to 4."
    assert seen == [(True, words), (False, words)]
    seen.clear()
    ragged = problem.with_(lengths="ragged", sink=False)
    for starts in (ints(0, 4, 7), ints(0, 5, 7), ints(0, 4, 6), ints(1, 4, 7), ints(0, 4, 3)):
        masks = MaskTensors(cu_seqlens_q=starts, cu_seqlens_k=ints(0, 6, 9))
        ops.check_numbers(masks, ragged, 7, 9, whole=True)
    assert [good for good, _ in seen[::2]] == [True, False, False, False, False]
    assert all(good for good, _ in seen[1::2]) and "ends with 7, and has no sequence of more than 4" in seen[0][1]


def test_no_length_is_read_back_from_a_device(monkeypatch):
    """The numbers of lengths are behind a tensor that refuses to give them, as on a GPU it would have to wait."""
    q, k, v = inputs()
    expected = flashcore.attention(q, k, v, seqlens_k=ints(9, 4), causal=True)
    ragged = flashcore.varlen_attention(q[0].transpose(0, 1), *(t[0].transpose(0, 1) for t in (k, v)),
                                        ints(0, 5, 12), ints(0, 5, 12), 7, 7, causal=True)  # fmt: skip
    monkeypatch.setattr(ops, "check_numbers", lambda *asked, **more: None)  # as for tensors on a GPU
    monkeypatch.setattr(ops, "choose", lambda *asked: ops.STAND_IN)
    monkeypatch.setattr(ops, "_calls", {})
    monkeypatch.setattr("flashcore.backends.others.masked.alike", lambda *starts: [])  # which only a CPU is asked for
    for name in ("item", "tolist", "__int__", "__bool__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *asked: pytest.fail("a tensor was read on the host"))
    out = flashcore.attention(q, k, v, seqlens_k=ints(9, 4), causal=True)
    starts = ints(0, 5, 12)
    monkeypatch.setattr("flashcore.varlen_ops._calls", {})
    again = flashcore.varlen_attention(
        *(t[0].transpose(0, 1) for t in (q, k, v)), starts, starts, 7, 7, causal=True
    )  # fmt: skip
    monkeypatch.undo()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, ragged, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "auto"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_on_the_gpu(name, head_dim, backend):
    options = {key: one.cuda() if isinstance(one, torch.Tensor) else one for key, one in MASKS[name].items()}
    for lengths, dtype in (((12, 12), torch.float16), ((300, 500), torch.bfloat16)):
        if lengths[0] > 12:  # lengths in proportion
            options = {key: one * 25 if key.startswith("seqlens") else one for key, one in options.items()}
        on_cpu = {key: one.cpu() if isinstance(one, torch.Tensor) else one for key, one in options.items()}
        q, k, v = inputs(*lengths, (4, 2), dtype, head_dim)
        out, lse = flashcore.attention(q.cuda(), k.cuda(), v.cuda(), return_lse=True, backend=backend, **options)
        expected, expected_lse = padded(q, k, v, **on_cpu)
        near(out, expected, dtype)
        torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_on_the_gpu(name, head_dim):
    options = {key: one.cuda() if isinstance(one, torch.Tensor) else one for key, one in MASKS[name].items()}
    if "sink" in options:
        options["sink"] = SINK.cuda().requires_grad_()
    on_cpu = {key: one.detach().cpu() if isinstance(one, torch.Tensor) else one for key, one in options.items()}
    if "sink" in on_cpu:
        on_cpu["sink"].requires_grad_()
    given = [tensor.cuda().requires_grad_() for tensor in inputs(12, 12, (4, 2), torch.bfloat16, head_dim)]
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in given]
    weights = torch.randn(2, 4, 12, head_dim)
    wanted = [*given, *([options["sink"]] if "sink" in options else [])]
    out = flashcore.attention(*given, **options)
    got = torch.autograd.grad((out * weights.cuda()).sum(), wanted)
    true = [*exact, *([on_cpu["sink"]] if "sink" in on_cpu else [])]
    expected = torch.autograd.grad((padded(*exact, **on_cpu)[0] * weights).sum(), true)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double().cpu(), other.double(), rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_lengths_in_a_captured_graph_are_those_of_each_replay():
    q, k, v = (tensor.cuda() for tensor in inputs(200, 200, (4, 2), torch.bfloat16, 64))
    lengths = ints(200, 150, device="cuda")
    flashcore.attention(q, k, v, causal=True, seqlens_q=lengths, seqlens_k=lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashcore.attention(q, k, v, causal=True, seqlens_q=lengths, seqlens_k=lengths)
    for numbers in ((200, 150), (3, 190)):
        lengths.copy_(ints(*numbers))
        graph.replay()
        expected, _ = padded(
            *(t.cpu() for t in (q, k, v)), causal=True, seqlens_q=ints(*numbers), seqlens_k=ints(*numbers)
        )
        near(out, expected, torch.bfloat16)
