"""Mask tensors: what is checked of them, and the rows that they say are real, found again wherever they lie."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.errors import InvalidProblem
from flashcore.numerics import masking
from flashcore.numerics.masking import MaskTensors, check_values, mask_tensors
from flashcore.problem import Problem

PROBLEM = Problem(batch=3, num_heads_q=4, num_heads_kv=2, seqlen_q=5, seqlen_k=7, head_dim=2)
PADDED, RAGGED, SINK = PROBLEM.with_(lengths="right"), PROBLEM.with_(lengths="ragged"), PROBLEM.with_(sink=True)


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_a_problem_without_tensors_gets_none_and_one_with_all_gets_them_by_name():
    assert mask_tensors(PROBLEM.with_(causal=True, window_left=2, softcap=3.0), "cpu") is None
    sink, lengths = torch.zeros(4), ints(1, 2, 3)
    found = mask_tensors(PADDED.with_(sink=True), "cpu", sink=sink, seqlens_k=lengths)
    assert dict(found.named()) == {"sink": sink, "seqlens_k": lengths} and found.seqlens_q is None


@pytest.mark.parametrize(
    ("problem", "given", "told"),
    [
        (PROBLEM, {"sink": torch.zeros(4)}, "sink is given, and .* has no use for it; sinks belong to"),
        (RAGGED, {"seqlens_q": ints(1, 2, 3)}, "seqlens_q is given, and .*lengths='right' or 'left'"),
        (PADDED, {"cu_seqlens_k": ints(0, 1, 2, 3)}, "cu_seqlens_k is given, and .*lengths='ragged'"),
        (SINK, {}, "needs sink, which is missing"),
        (PADDED, {}, "needs seqlens_q, seqlens_k or both, and neither is given"),
        (RAGGED, {"cu_seqlens_q": ints(0, 1, 2, 3)}, "needs cu_seqlens_k, which is missing"),
        (SINK, {"sink": torch.zeros(2)}, r"sink is a torch.float32 tensor \[2\].*float32 tensor \[4\]"),
        (SINK, {"sink": torch.zeros(4).half()}, "sink is a torch.float16 tensor.*float32"),
        (SINK, {"sink": [0.0] * 4}, r"sink is \[0.0, .*contiguous float32 tensor"),
        (SINK, {"sink": torch.zeros(8)[::2]}, "numbers do not lie in a row"),
        (SINK, {"sink": torch.zeros(4, device="meta")}, "sink lies on meta and q on cpu"),
        (PADDED, {"seqlens_k": ints(1, 2)}, r"seqlens_k .*int32 tensor \[3\], a length for each sequence"),
        (PADDED, {"seqlens_q": ints(1, 2, 3).long()}, "seqlens_q is a torch.int64 tensor"),
        (RAGGED, {"cu_seqlens_q": ints(0, 1, 2), "cu_seqlens_k": ints(0, 1, 2, 3)}, r"cu_seqlens_q .*\[4\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_problem_are_refused_in_one_sentence(problem, given, told):
    with pytest.raises(InvalidProblem, match=told) as error:
        mask_tensors(problem, "cpu", **given)
    assert str(error.value).endswith(".") and ". " not in str(error.value)


@pytest.mark.parametrize(
    ("problem", "given", "told"),
    [
        (SINK, {"sink": torch.tensor([0, 1, math.nan, 0])}, r"sink\[2\] is nan"),
        (SINK, {"sink": torch.tensor([math.inf, 1, 2, 0])}, r"sink\[0\] is inf"),
        (PADDED, {"seqlens_q": ints(0, 5, 6)}, r"seqlens_q\[2\] is 6; it has to be from 0 to the 5 rows of q"),
        (PADDED, {"seqlens_k": ints(0, -1, 6)}, r"seqlens_k\[1\] is -1"),
        (RAGGED, {"cu_seqlens_q": ints(1, 1, 2, 3), "cu_seqlens_k": ints(0, 1, 2, 3)}, "begins with 1"),
        (RAGGED, {"cu_seqlens_q": ints(0, 2, 1, 3), "cu_seqlens_k": ints(0, 1, 2, 3)}, "falls from 2 to 1 at sequence"),
        (RAGGED, {"cu_seqlens_q": ints(0, 1, 1, 1), "cu_seqlens_k": ints(0, 1, 9, 9)}, "gives sequence 1 8 rows"),
        (RAGGED, {"cu_seqlens_q": ints(0, 5, 9, 14), "cu_seqlens_k": ints(0, 1, 2, 3)}, "ends at row 14, and q has 13"),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_named_with_their_place(problem, given, told):
    with pytest.raises(InvalidProblem, match=told):
        check_values(mask_tensors(problem, "cpu", **given), problem, 13 if problem is RAGGED else 5, 7)


def test_right_numbers_pass():
    check_values(None, PROBLEM, 5, 7)
    check_values(MaskTensors(sink=torch.tensor([-math.inf, 1e30, 0, 1])), SINK, 5, 7)
    check_values(MaskTensors(seqlens_q=ints(0, 5, 1), seqlens_k=ints(7, 0, 1)), PADDED, 5, 7)
    check_values(MaskTensors(cu_seqlens_q=ints(0, 5, 5, 9), cu_seqlens_k=ints(0, 0, 7, 8)), RAGGED, 13, 8)


@pytest.mark.parametrize("lengths", ["right", "left", "ragged"])
def test_real_rows_are_brought_to_the_front_and_put_back(lengths):
    counts_q, counts_k = ints(2, 0, 5), ints(7, 3, 0)
    if lengths == "ragged":
        masks = MaskTensors(cu_seqlens_q=ints(0, 2, 2, 7), cu_seqlens_k=ints(0, 7, 10, 10))
        shapes = (1, 4, 9, 2), (1, 2, 10, 2)  # two rows of Q belong to no sequence
        places_q = [(0, 0, 2), (0, 2, 2), (0, 2, 7)]
        places_k = [(0, 0, 7), (0, 7, 10), (0, 10, 10)]
    else:
        masks = MaskTensors(seqlens_q=counts_q, seqlens_k=counts_k)
        shapes = (3, 4, 5, 2), (3, 2, 7, 2)
        places_q, places_k = (
            [(b, 0, n) if lengths == "right" else (b, size - n, size) for b, n in enumerate(counts.tolist())]
            for counts, size in ((counts_q, 5), (counts_k, 7))
        )
    problem = PROBLEM.with_(lengths=lengths)
    q, k, v = torch.randn(shapes[0]), torch.randn(shapes[1]), torch.randn(shapes[1])
    moved_q, moved_k, moved_v, moved, moved_masks = masking.right_aligned(q, k, v, problem, masks)
    assert moved == PADDED and torch.equal(moved_masks.seqlens_q, counts_q)
    assert torch.equal(moved_masks.seqlens_k, counts_k) and moved_masks.cu_seqlens_q is None
    real = masking.real_rows(q, problem, masks)
    for tensor, to, places in ((q, moved_q, places_q), (k, moved_k, places_k), (v, moved_v, places_k)):
        for b, (index, first, end) in enumerate(places):
            assert torch.equal(to[b, :, : end - first], tensor[index, :, first:end])
            assert not to[b, :, end - first :].any()
    out, lse = masking.put_back(moved_q, moved_q[..., 0], q, problem, masks)
    rows = real[:, None, :]
    assert torch.equal(out, q.where(rows[..., None], 0.0)) and torch.equal(lse, q[..., 0].where(rows, -math.inf))
    again, again_lse = masking.aligned_results(out, lse, problem, masks)
    assert torch.equal(again, moved_q)
    past = torch.arange(5) >= counts_q[:, None]
    assert torch.equal(again_lse, moved_q[..., 0].masked_fill(past[:, None], -math.inf))


def test_a_sequence_without_rows_in_a_tensor_of_one_row_is_zeros():
    one_row, masks = PADDED.with_(seqlen_q=1), MaskTensors(seqlens_q=ints(0, 1, 0))
    q, k = torch.ones(3, 4, 1, 2), torch.ones(3, 2, 7, 2)
    moved = masking.right_aligned(q, k, k, one_row, masks)[0]
    assert moved.sum(dim=(1, 2, 3)).tolist() == [0, 8, 0]


def test_without_lengths_nothing_moves():
    q, k = torch.randn(3, 4, 5, 2), torch.randn(3, 2, 7, 2)
    assert masking.right_aligned(q, k, k, PROBLEM, None) == (q, k, k, PROBLEM, None)
    assert masking.put_back(q, q[..., 0], q, PROBLEM, None)[0] is q
    assert masking.aligned_results(q, q[..., 0], PROBLEM, None)[0] is q
    assert masking.real_rows(q, PROBLEM, None).all()


def test_sequences_of_like_length_are_padded_together_where_that_saves_much():
    def groups(rows, keys):
        starts = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (rows, keys))
        return masking.alike(*starts)

    assert groups([5, 6, 7, 4], [5, 6, 7, 4]) == [[0, 1, 2, 3]] == groups([1, 2, 3, 4], [4, 4, 4, 4])
    assert groups([2, 100, 2, 3], [2, 100, 2, 3]) == [[0, 2, 3], [1]]
    assert groups([0, 90, 0, 1], [3, 90, 2, 0]) == [[0, 2], [1], [3]], "empty on either side"
    assert groups([0, 0], [0, 0]) == [[0, 1]] and groups([3], [900]) == [[0]]


def test_some_sequences_of_a_ragged_batch_lie_one_after_the_other():
    starts = torch.tensor([0, 2, 2, 5, 9], dtype=torch.int32)
    rows, begins, longest = masking.some_sequences(starts, [3, 0, 1])
    assert rows.tolist() == [5, 6, 7, 8, 0, 1] and begins.tolist() == [0, 4, 6, 6] and longest == 4
    assert begins.dtype == starts.dtype and rows.dtype == torch.int64
