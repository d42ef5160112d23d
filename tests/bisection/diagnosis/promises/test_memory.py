"""Views that lie in memory as a case says."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.promises import memory
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import Problem

SMALL = Problem(batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=5, seqlen_k=7, head_dim=8)


def a_function(q, k, v, causal=False, softmax_scale=None):
    return q


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("key", ["around", "rows", "columns", "odd rows", "odd heads", "one element late"])
def test_a_view_holds_the_tensor_and_its_room_the_rest(layout, key):
    candidate = candidate_of(a_function, device="cpu", layout=layout)
    tensor = make_inputs(SMALL)[0]
    view, room = memory._laid_out(candidate, tensor, key, math.nan)
    assert torch.equal(view, tensor) and view.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
    assert int(room.isnan().sum()) == room.numel() - tensor.numel() > 0
    handed = view if layout == "bhsd" else view.transpose(1, 2)
    assert handed.stride(-1) == 1
    if key in ("around", "one element late"):
        assert handed.is_contiguous() and handed.storage_offset() == (1 if key[0] == "o" else memory.ROOM_ROWS * 8)
    elif key == "odd rows":
        assert handed.stride(2) == 8 + 3
    elif key == "odd heads":
        assert handed.stride(1) % 2 and handed.stride(2) == 8
    else:
        assert handed.storage_offset() > 0 and not handed.is_contiguous()
    room.fill_(1.0)
    assert bool((view == 1).all())
