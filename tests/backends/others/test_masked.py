"""Attention with masks of every kind in torch's operations: against a loop over rows and keys in float64."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.backends.others import masked
from flashcore.backends.others.masked import Masking
from flashcore.errors import InvalidProblem


def row_by_row(q, k, v, masking: Masking, scale=None):
    """From the definition, one query at a time, with Python's own numbers for what is hidden."""
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k, group = k.shape[2], heads // k.shape[1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out, lse = torch.zeros(*q.shape[:3], v.shape[3]).double(), torch.full(q.shape[:3], -math.inf).double()
    for b in range(batch):
        num_q = seqlen_q if masking.lengths_q is None else int(masking.lengths_q[b])
        num_k = seqlen_k if masking.lengths_k is None else int(masking.lengths_k[b])
        first = 0 if masking.first_k is None else int(masking.first_k[b])
        for h in range(heads):
            for i in range(num_q):
                at, scores, seen = i + num_k - num_q, [], []
                for j in range(first, num_k):
                    if masking.causal and j > at or 0 <= masking.window_right < j - at:
                        continue
                    if 0 <= masking.window_left < at - j:
                        continue
                    if (
                        masking.seen is not None
                        and not masking.seen.expand(batch, heads, seqlen_q, seqlen_k)[b, h, i, j]
                    ):
                        continue
                    score = scale * torch.dot(q[b, h, i].double(), k[b, h // group, j].double())
                    if masking.softcap:
                        score = masking.softcap * torch.tanh(score / masking.softcap)
                    if masking.slopes is not None:
                        score = score - masking.slopes.expand(batch, heads)[b, h].double() * abs(at - j)
                    if masking.bias is not None:
                        score = score + masking.bias.expand(batch, heads, seqlen_q, seqlen_k)[b, h, i, j].double()
                    scores.append(score)
                    seen.append(j)
                extra = [] if masking.sink is None else [masking.sink[h].double()]
                if scores or extra:
                    whole = torch.stack([*scores, *extra])
                    lse[b, h, i] = whole.logsumexp(0)
                    out[b, h, i] = whole.softmax(0)[: len(seen)] @ v[b, h // group, seen].double()
    return out, lse


def three(seqlen_q=6, seqlen_k=9, heads=(4, 2), dtype=torch.float64, width=5):
    return (torch.randn(2, heads[0], seqlen_q, 8, dtype=dtype), torch.randn(2, heads[1], seqlen_k, 8, dtype=dtype),
            torch.randn(2, heads[1], seqlen_k, width, dtype=dtype))  # fmt: skip


def lengths(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


CASES = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window_left": 2, "window_right": 1},
    "causal window": {"window_left": 2, "causal": True},
    "a window of its own key": {"window_left": 0, "window_right": 0},
    "cap": {"softcap": 1.5, "causal": True},
    "slopes": {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "causal": True},
    "slopes of each sequence": {"slopes": torch.rand(2, 4)},
    "sink": {"sink": torch.tensor([0.5, -1.0, 3.0, 0.0]), "causal": True},
    "bias": {"bias": torch.linspace(-1, 1, 6 * 9).view(6, 9), "causal": True},
    "seen": {"seen": torch.arange(2 * 9).view(2, 1, 1, 9) % 3 != 0},
    "lengths": {"lengths_q": lengths(6, 2), "lengths_k": lengths(4, 9), "causal": True},
    "no keys at all": {"lengths_k": lengths(0, 3), "causal": True},
    "no keys, but a sink": {"lengths_k": lengths(0, 3), "causal": True, "sink": torch.ones(4)},
    "padding in front": {"first_k": lengths(0, 4), "causal": True},
    "all at once": {
        "causal": True, "window_left": 3, "softcap": 2.0, "slopes": torch.rand(4), "sink": torch.rand(4),
        "lengths_q": lengths(5, 3), "lengths_k": lengths(7, 9), "first_k": lengths(1, 2),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name):
    inputs, masking = three(), Masking(**CASES[name])
    for got, expected in zip(masked.attention(*inputs, masking), row_by_row(*inputs, masking), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["all at once", "seen", "bias", "slopes of each sequence", "lengths"])
def test_some_rows_at_a_time_are_the_same(monkeypatch, name):
    inputs, masking = three(), Masking(**CASES[name])
    whole = masked.attention(*inputs, masking)
    monkeypatch.setitem(masked.CHUNK_SCORES, "cpu", 80)
    for got, expected in zip(masked.attention(*inputs, masking), whole, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["no keys at all", "all at once", "cap", "sink"])
def test_gradients_are_right_and_finite_even_where_no_key_is_seen(name):
    inputs = [t.requires_grad_() for t in three(heads=(4, 2))]
    masking = Masking(**CASES[name])
    torch.autograd.gradcheck(lambda *given: masked.attention(*given, masking, -0.4)[0], inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_come_in_the_dtype_of_q(dtype):
    inputs, masking = three(dtype=dtype, width=8), Masking(causal=True, softcap=2.0)
    out, lse = masked.attention(*inputs, masking)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), row_by_row(*inputs, masking)[0], rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_autocast_changes_nothing_and_a_compiled_call_is_whole():
    inputs, masking = three(dtype=torch.float32), Masking(causal=True, softcap=2.0, sink=torch.ones(4))
    expected = masked.attention(*inputs, masking)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = masked.attention(*inputs, masking)
    compiled = torch.compile(lambda *given: masked.attention(*given, masking), fullgraph=True, backend="eager")(*inputs)
    for one, other, true in zip(got, compiled, expected, strict=True):
        assert torch.equal(one, true)
        torch.testing.assert_close(other, true)


def test_dropout_keeps_the_sum_on_average():
    q, k, _ = three(64, 64)
    out, _ = masked.attention(q, k, torch.ones_like(k), Masking(dropout=0.25))
    assert out.std() > 0.01 and abs(float(out.mean()) - 1) < 0.05


def test_empty_sizes():
    q, k, v = three()
    out, lse = masked.attention(q, k[:, :, :0], v[:, :, :0], Masking())
    assert out.shape == (2, 4, 6, 5) and not out.any() and (lse == -math.inf).all()
    assert masked.attention(q[:, :, :0], k, v, Masking())[0].shape == (2, 4, 0, 5)


@pytest.mark.parametrize(("options", "words"), [
    ({"window_left": -2}, "^window_left is -2; it has to be at least 0, or -1"),
    ({"window_right": 1.5}, "^window_right is 1.5; it has to be a whole number"),
    ({"softcap": -1.0}, "^softcap is -1.0; it has to be above 0, or 0 for none"),
    ({"softcap": math.nan}, "^softcap is nan"),
    ({"dropout": 1.0}, "^dropout is 1.0; it has to be at least 0, and below 1"),
    ({"sink": torch.ones(3)}, r"^sink is a torch.float32 tensor \[3\] on cpu; it has to be a float tensor \[4\]"),
    ({"sink": torch.ones(4, dtype=torch.int32)}, r"^sink is a torch.int32 tensor"),
    ({"sink": torch.ones(4, device="meta")}, "^sink lies on meta and q on cpu"),
    ({"slopes": torch.ones(2, 3)}, r"^slopes is .* it has to be a float tensor \[4\] or \[2, 4\], a number a head"),
])  # fmt: skip
def test_bad_input_is_one_sentence(options, words):
    with pytest.raises(InvalidProblem, match=words) as caught:
        masked.attention(*three(), Masking(**options))
    assert "\n" not in str(caught.value)
