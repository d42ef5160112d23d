"""Attention with masks in float64, from the definition: of one sequence, and of batches sequence by sequence."""

from __future__ import annotations

import math

import torch


def one_sequence(
    q, k, v, *, causal=False, softmax_scale=None, window_left=-1, window_right=-1, softcap=None, sink=None
):  # fmt: skip
    """``[Hq, Sq, D]`` and ``[Hkv, Sk, D]`` twice; `out` and `lse` in float64, and torch.autograd goes through them."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[0] // k.shape[0], 0) for tensor in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    ahead = torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1])
    right = 0 if causal else window_right
    hidden = (ahead > right) & (right >= 0) | (-ahead > window_left) & (window_left >= 0)
    scores = scores.masked_fill(hidden, -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.double()[:, None, None].expand(-1, q.shape[1], 1)], -1)
    empty = (scores == -math.inf).all(-1, keepdim=True) if scores.shape[-1] else torch.ones(*q.shape[:2], 1).bool()
    finite = scores.masked_fill(empty, 0.0)
    probs = finite.softmax(-1).masked_fill(empty, 0.0)[..., : k.shape[1]]
    lse = finite.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    return probs @ v, lse


def padded(q, k, v, *, seqlens_q=None, seqlens_k=None, padding="right", **options):
    """``[B, Hq, Sq, D]`` and so on; 0 and -inf in rows that are not real."""
    outs, lses = [], []
    for nth in range(q.shape[0]):
        rows = _real(seqlens_q, nth, q.shape[2], padding)
        keys = _real(seqlens_k, nth, k.shape[2], padding)
        out, lse = one_sequence(q[nth, :, rows], k[nth, :, keys], v[nth, :, keys], **options)
        before, after = rows.start, q.shape[2] - rows.stop
        outs.append(torch.nn.functional.pad(out, (0, 0, before, after)))
        lses.append(torch.nn.functional.pad(lse, (before, after), value=-math.inf))
    return torch.stack(outs), torch.stack(lses)


def _real(lengths, nth: int, size: int, padding: str) -> slice:
    length = size if lengths is None else int(lengths[nth])
    return slice(0, length) if padding == "right" else slice(size - length, size)


def ragged(q, k, v, rows, keys, **options):
    """``[tokens, H, D]`` with the lengths of the sequences; `out` alike, and `lse` ``[Hq, tokens]``."""
    pieces = zip(q.split(rows), k.split(keys), v.split(keys), strict=True)
    found = [one_sequence(*(t.transpose(0, 1) for t in piece), **options) for piece in pieces]
    return torch.cat([out.transpose(0, 1) for out, _ in found]), torch.cat([lse for _, lse in found], 1)


def starts(lengths, device="cpu") -> torch.Tensor:
    """Where sequences of these lengths begin, and the end: int32 ``[len(lengths) + 1]``."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def near(got, expected, dtype) -> None:
    """Whether results in a dtype are those of float64, by that dtype's rounding."""
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double().cpu(), expected.double(), rtol=bound, atol=bound)
