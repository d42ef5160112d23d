"""`parallel.computing` by itself: room for keys whose parts lie together, and results that come in parts.

What the two plans compute together is in `test_attending`.
"""

from __future__ import annotations

import math

import torch

import flashcore
from flashcore.parallel.computing import Result, Rows
from flashcore.parallel.plan import Call


def test_any_rows_of_a_buffer_lie_together_and_the_kernel_sees_heads_first():
    k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    room = Rows(k, 9)
    room.put(2, k, v)
    assert all(part.is_contiguous() and part.shape == (4, 2, 3, 8) for part in room.part(3, 7))
    keys, values = room.views()
    assert torch.equal(keys[:, :, 2:7], k) and torch.equal(values[:, :, 2:7], v) and keys.stride(3) == 1


def test_rows_with_several_calls_are_joined_and_those_without_stay_empty():
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    calls = [Call((0, 4), (0, 3), False), Call((2, 4), (3, 10), False)]
    result = Result(q, calls, None, True, "auto")
    for call in calls:
        result.take(result.computed([call], k, v))
    out, lse = result.whole()
    assert result.joins and out.dtype == torch.float32
    for rows, keys in ((slice(0, 2), slice(0, 3)), (slice(2, 4), slice(0, 10))):
        truth, true_lse = flashcore.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], return_lse=True)
        torch.testing.assert_close(out[:, :, rows], truth, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(lse[:, :, rows], true_lse, atol=1e-6, rtol=1e-6)
    assert not out[:, :, 4:].any() and bool((lse[:, :, 4:] == -math.inf).all())


def test_rows_with_one_call_each_are_taken_as_they_are_in_their_own_dtype():
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.bfloat16) for _ in range(3))
    calls = [Call((0, 3), (0, 3), True), Call((3, 6), (0, 6), True)]
    result = Result(q, calls, 0.3, False, "auto")
    result.take(result.computed(calls, k, v))
    out, lse = result.whole()
    assert not result.joins and lse is None and out.dtype == torch.bfloat16
    late = flashcore.attention(q[:, :, 3:], k, v, causal=True, softmax_scale=0.3)
    assert torch.equal(out[:, :, 3:], late)
