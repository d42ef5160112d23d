"""varlen_attention(): each sequence as if it came alone, and one sentence for each kind of bad input."""

from __future__ import annotations

import math

import pytest
import torch
from support.exact_attention import near, ragged, starts

import flashcore
from flashcore import ops, varlen_ops
from flashcore.backends.cpu import CpuBackend
from flashcore.errors import InvalidProblem, UnknownName, Unsupported
from flashcore.numerics import reference
from flashcore.numerics.masking import MaskTensors
from flashcore.problem import Problem

SINK = torch.tensor([0.5, -1.0, 2.0, 0.0])
RAGGED = [([3, 7, 1], [3, 7, 1]), ([1, 1, 1, 1], [5, 9, 2, 17]), ([0, 4, 0], [6, 4, 0]), ([4, 4], [8, 8]),
          ([9, 2], [4, 0]), ([5], [5])]  # fmt: skip
MASKS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_left": 3, "window_right": 1},
    "causal window": {"causal": True, "window_left": 2, "softmax_scale": -0.2},
    "cap": {"softcap": 2.0},
    "sink": {"sink": SINK, "causal": True},
    "all": {"sink": SINK, "causal": True, "window_left": 4, "softcap": 3.0, "softmax_scale": 0.4},
}


def batch(rows, keys, dtype=torch.float32, head_dim=16, heads=(4, 2)):
    q = torch.randn(sum(rows), heads[0], head_dim).to(dtype)
    k, v = torch.randn(2, sum(keys), heads[1], head_dim).to(dtype)
    return q, k, v, starts(rows), starts(keys), max(rows), max(keys)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lengths", RAGGED, ids=str)
def test_each_sequence_is_as_if_it_came_alone(name, lengths, monkeypatch):
    for dtype in (torch.float32, torch.float16):
        given = batch(*lengths, dtype)
        expected, expected_lse = ragged(*given[:3], *lengths, **MASKS[name])
        for backend in ("auto", "reference", "stand-in"):
            asked = {} if backend == "stand-in" else {"backend": backend}
            if backend == "stand-in":
                monkeypatch.setattr(ops, "choose", lambda *asked: ops.STAND_IN)
                monkeypatch.setattr(varlen_ops, "_calls", {})
            out, lse = flashcore.varlen_attention(*given, return_lse=True, **MASKS[name], **asked)
            near(out, expected, dtype)
            torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=1e-3)
            assert out.shape == given[0].shape and out.is_contiguous() and out.dtype == dtype
            near(flashcore.varlen_attention(*given, **MASKS[name], **asked), expected, dtype)
        monkeypatch.undo()


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("kind", ["random", "third", "full", "empty"])
def test_many_sequences_as_the_reference_has_them(kind, kv_heads):
    """Lengths as FlashAttention's own tests draw them: near the longest, from a third of it, all of it; some empty."""
    generator = torch.Generator().manual_seed(kv_heads)

    def lengths(longest):
        least = {"random": longest - 20, "third": longest // 3, "full": longest, "empty": 0}[kind]
        drawn = torch.randint(max(least, 0), longest + 1, (4,), generator=generator)
        return (drawn * (torch.tensor([1, 0, 1, 0]) if kind == "empty" else 1)).tolist()

    rows, keys = lengths(37), lengths(53)
    q, k, v, starts_q, starts_k, *_ = batch(rows, keys, heads=(6, kv_heads), head_dim=40)
    for options in ({"causal": True}, {"window_left": 11, "window_right": 4}, {"softcap": 4.0, "causal": True}):
        problem = Problem(
            batch=4, num_heads_q=6, num_heads_kv=kv_heads, seqlen_q=37, seqlen_k=53, head_dim=40, dtype="float32",
            lengths="ragged", **options,
        )  # fmt: skip
        masks = MaskTensors(cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
        views = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        expected, expected_lse = reference.attention(*views, problem, masks)
        out, lse = flashcore.varlen_attention(q, k, v, starts_q, starts_k, 37, 53, return_lse=True, **options)
        near(out, expected[0].transpose(0, 1), torch.float32)
        torch.testing.assert_close(lse.double(), expected_lse[0], rtol=1e-4, atol=1e-4)


UNLIKE = [[1, 0, 2, 40, 3, 1, 2], [2, 3, 0, 37, 1, 1, 2]]
"""One long sequence among short ones, and empty ones on either side."""


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("name", MASKS)
def test_one_long_sequence_among_short_ones_is_as_if_each_came_alone(name, backend):
    q, k, v, *bounds = batch(*UNLIKE)
    options = dict(MASKS[name])
    wanted = [tensor.requires_grad_() for tensor in (q, k, v)]
    found = flashcore.varlen_attention(q, k, v, *bounds, return_lse=True, backend=backend, **options)
    true = ragged(q, k, v, *UNLIKE, **options)
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    seen = true[1] > -math.inf
    grads, expected = (
        torch.autograd.grad((out * out).sum() + lse[seen].sum(), wanted) for out, lse in (found, true)
    )  # fmt: skip
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_on_a_cpu_short_sequences_are_not_padded_to_the_longest(monkeypatch):
    """32 sequences of which one is long would otherwise take as many times as much work and memory."""
    loop, scores = CpuBackend._loop, []

    def counted(self, q, k, v, problem, *more):
        scores.append(q.shape[0] * q.shape[2] * k.shape[2])
        return loop(self, q, k, v, problem, *more)

    monkeypatch.setattr(CpuBackend, "_loop", counted)
    lengths = [2] * 31 + [100]
    q, k, v, *bounds = batch(lengths, lengths)
    flashcore.varlen_attention(q, k, v, *bounds, causal=True, backend="cpu")
    assert scores == [31 * 2 * 2, 100 * 100]


def test_longest_lengths_may_be_longer_and_nothing_may_be_there():
    q, k, v, *bounds, _, _ = batch([3, 5], [4, 2])
    out = flashcore.varlen_attention(q, k, v, *bounds, 5, 4, causal=True)
    torch.testing.assert_close(flashcore.varlen_attention(q, k, v, *bounds, 64, 77, causal=True), out)
    # What a server passes is the most that its model takes, or no limit at all; room is made for what is there.
    longest = 2**31 - 1, 2**40
    wanted = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    again = flashcore.varlen_attention(*wanted, *bounds, *longest, causal=True)
    torch.testing.assert_close(again, out)
    for backend in ("cpu", "reference"):
        again = flashcore.varlen_attention(*wanted, *bounds, *longest, causal=True, backend=backend)
        torch.testing.assert_close(again, out)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(again.sum(), wanted))
    none = torch.zeros(3, dtype=torch.int32)
    out, lse = flashcore.varlen_attention(q, k[:0], v[:0], bounds[0], none, 5, 0, sink=SINK, return_lse=True)
    assert not out.any() and torch.equal(lse, SINK[:, None].expand(4, 8))
    out, lse = flashcore.varlen_attention(q[:0], k, v, none, bounds[1], 0, 4, return_lse=True)
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)


def test_views_of_packed_tensors_are_taken_as_they_are():
    packed = torch.randn(9, 3, 4, 16)
    q, k, v = packed.unbind(1)
    out = flashcore.varlen_attention(q, k, v, starts([4, 5]), starts([4, 5]), 5, 5)
    assert out.stride() == torch.empty_like(q).stride()
    near(out, ragged(q, k, v, [4, 5], [4, 5])[0], torch.float32)
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    again = flashcore.varlen_attention(heads_first, k, v, starts([4, 5]), starts([4, 5]), 5, 5)
    assert again.stride() == torch.empty_like(heads_first).stride()
    torch.testing.assert_close(again, out)


@pytest.mark.parametrize("lengths", [RAGGED[0], RAGGED[2], RAGGED[4]], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_gradients(name, lengths):
    options = dict(MASKS[name])
    if "sink" in options:
        options["sink"] = SINK.clone().requires_grad_()
    q, k, v, *bounds = batch(*lengths)
    wanted = [tensor.requires_grad_() for tensor in (q, k, v)]
    wanted += [options["sink"]] if "sink" in options else []
    out, lse = flashcore.varlen_attention(q, k, v, *bounds, return_lse=True, **options)
    true, true_lse = ragged(q, k, v, *lengths, **options)
    weights, of_lse = torch.randn(out.shape), torch.randn(lse.shape)
    found = (out * weights).sum() + (lse * of_lse)[lse > -math.inf].sum()
    expected = (true * weights).sum() + (true_lse * of_lse)[lse > -math.inf].sum()
    for one, other in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_rows_past_the_last_sequence_give_nothing_where_nobody_checks(monkeypatch):
    """As in a captured graph with room to spare; and what lies there matters to nobody."""
    monkeypatch.setattr(ops, "check_numbers", lambda *asked, **more: None)  # as for tensors on a GPU
    q, k, v, *bounds = batch([3, 5], [4, 6])
    expected = flashcore.varlen_attention(q, k, v, *bounds, causal=True, return_lse=True)
    q, k, v = (torch.cat([t, torch.full((4, *t.shape[1:]), math.nan)]).requires_grad_() for t in (q, k, v))
    out, lse = flashcore.varlen_attention(q, k, v, *bounds, causal=True, return_lse=True)
    assert torch.equal(out[:8], expected[0]) and torch.equal(lse[:, :8], expected[1])
    assert not out[8:].any() and (lse[:, 8:] == -math.inf).all()
    for grad, real in zip(torch.autograd.grad(out.sum(), (q, k, v)), (8, 10, 10), strict=True):
        assert grad.isfinite().all() and grad[:real].any() and not grad[real:].any()


Q, K, V, STARTS_Q, STARTS_K, ROWS, KEYS = batch([3, 5], [4, 6])
GOOD = (STARTS_Q, STARTS_K, ROWS, KEYS)


def call(*, q=Q, k=K, v=V, starts_q=STARTS_Q, starts_k=STARTS_K, rows=ROWS, keys=KEYS, **options):
    return flashcore.varlen_attention(q, k, v, starts_q, starts_k, rows, keys, **options)


@pytest.mark.parametrize(("change", "words"), [
    ({"q": Q[None]}, r"^q has shape \[1, 8, 4, 16\]; it has to be \[tokens, num_heads, head_dim\]"),
    ({"q": "q"}, r"^q is 'q'; it has to be a dense torch tensor"),
    ({"k": K.half()}, "^q, k and v have dtypes .*; convert them to one"),
    ({"q": Q.double(), "k": K.double(), "v": V.double()}, "^dtype torch.float64 is not supported"),
    ({"v": V[:9]}, r"^k \[10, 2, 16\] and v \[9, 2, 16\] differ in shape"),
    ({"q": Q[..., :8]}, "^q has head_dim 8, and k and v have 16"),
    ({"q": Q[:, :3]}, r"^num_heads_q \(3\) must be a multiple of num_heads_kv \(2\)"),
    ({"k": K.to("meta")}, "^k lies on meta and q on cpu; move it there"),
    ({"v": V.mT.contiguous().mT}, r"^The last dimension of v is not contiguous .*; pass v.contiguous\(\)"),
    ({"starts_q": [0, 3, 8]}, r"^cu_seqlens_q is \[0, 3, 8\]; it has to be an int32 tensor \[batch \+ 1\]"),
    ({"starts_q": STARTS_Q[:1]}, r"^cu_seqlens_q is a torch.int32 tensor \[1\]"),
    ({"starts_q": STARTS_Q.long()}, r"^cu_seqlens_q is a torch.int64 tensor .* an int32 tensor \[3\]"),
    ({"starts_k": starts([4, 5, 1])}, r"^cu_seqlens_k is a torch.int32 tensor \[4\] .* an int32 tensor \[3\]"),
    ({"starts_k": STARTS_K.to("meta")}, "^cu_seqlens_k lies on meta and q on cpu"),
    ({"starts_q": starts([5, -1])}, "^cu_seqlens_q falls from 5 to 4 at sequence 1"),
    ({"starts_q": STARTS_Q + 1}, "^cu_seqlens_q begins with 1; the first sequence begins at row 0"),
    ({"starts_q": starts([3, 4])}, "^cu_seqlens_q ends with 7, and q has 8 rows; they have to be the same"),
    ({"starts_k": starts([5, 6])}, "^cu_seqlens_k ends at row 11, and k has 10 rows"),
    ({"rows": 4}, "^max_seqlen_q is 4, and cu_seqlens_q gives sequence 1 5 rows; pass the longest length, or more"),
    ({"rows": 0}, "^max_seqlen_q is 0, and cu_seqlens_q gives sequence 0 3 rows"),
    ({"keys": True}, "^max_seqlen_k is True; it has to be a whole number"),
    ({"keys": 6.5}, "^max_seqlen_k is 6.5; it has to be a whole number"),
    ({"rows": -1}, "^max_seqlen_q is -1; it has to be at least 0"),
    ({"sink": torch.zeros(2)}, r"^sink is a torch.float32 tensor \[2\] .* it has to be a float tensor \[4\]"),
    ({"softcap": 0}, "^softcap is 0.0"),
    ({"causal": True, "window_right": 1}, "^window_right is 1, and causal=True"),
    ({"window_left": -7}, "^window_left is -7"),
    ({"return_lse": 1}, "^return_lse has to be True or False"),
    ({"backend": None}, "^backend has to be a string"),
])  # fmt: skip
def test_bad_input_is_one_sentence(change, words):
    with pytest.raises(InvalidProblem, match=words) as caught:
        call(**change)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_backends_by_name():
    with pytest.raises(UnknownName, match="no backend 'fastest'"):
        call(backend="fastest")
    with pytest.raises(Unsupported, match="it does not take .*ragged batches"):
        call(backend="sdpa-math", window_left=2)


def test_the_mapped_axis_of_vmap_is_refused():
    many = torch.stack([Q, Q])
    with pytest.raises(InvalidProblem, match="mapped by torch.vmap, which it has no rule for"):
        torch.vmap(lambda q: call(q=q))(many)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "auto"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_on_the_gpu(name, head_dim, backend):
    rows, keys = [100, 1, 0, 300, 129], [100, 200, 50, 280, 0]
    options = {key: one.cuda() if isinstance(one, torch.Tensor) else one for key, one in MASKS[name].items()}
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v, *bounds = batch(rows, keys, dtype, head_dim)
        on_gpu = [one.cuda() if isinstance(one, torch.Tensor) else one for one in (q, k, v, *bounds)]
        out, lse = flashcore.varlen_attention(*on_gpu, return_lse=True, backend=backend, **options)
        expected, expected_lse = ragged(q, k, v, rows, keys, **MASKS[name])
        near(out, expected, dtype)
        torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_on_the_gpu(name, head_dim):
    rows, keys = [100, 1, 0, 90, 40], [100, 70, 50, 64, 0]
    q, k, v, *bounds = batch(rows, keys, torch.bfloat16, head_dim)
    options = {key: one.cuda() if isinstance(one, torch.Tensor) else one for key, one in MASKS[name].items()}
    given = [tensor.cuda().requires_grad_() for tensor in (q, k, v)]
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    wanted, true = list(given), list(exact)
    on_cpu = dict(MASKS[name])
    if "sink" in options:
        options["sink"], on_cpu["sink"] = SINK.cuda().requires_grad_(), SINK.clone().requires_grad_()
        wanted, true = [*wanted, options["sink"]], [*true, on_cpu["sink"]]
    bounds = [one.cuda() if isinstance(one, torch.Tensor) else one for one in bounds]
    weights = torch.randn(sum(rows), 4, head_dim)
    out = flashcore.varlen_attention(*given, *bounds, **options)
    got = torch.autograd.grad((out * weights.cuda()).sum(), wanted)
    expected = torch.autograd.grad((ragged(*exact, rows, keys, **on_cpu)[0] * weights).sum(), true)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double().cpu(), other.double(), rtol=5e-2, atol=8e-2)


@pytest.mark.gpu
def test_one_captured_graph_serves_other_lengths():
    q, k, v, *bounds = batch([100, 156], [100, 156], torch.bfloat16, 64)
    on_gpu = [one.cuda() for one in (q, k, v)]
    places = starts([100, 156], "cuda")
    flashcore.varlen_attention(*on_gpu, places, places, 256, 256, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashcore.varlen_attention(*on_gpu, places, places, 256, 256, causal=True)
    for lengths in ([100, 156], [256, 0], [3, 253]):
        places.copy_(starts(lengths))
        graph.replay()
        near(out, ragged(q, k, v, lengths, lengths, causal=True)[0], torch.bfloat16)
