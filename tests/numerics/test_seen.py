"""Which keys a query sees, against a loop over places; and ragged batches there and back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flashcore.numerics import seen

ROWS, KEYS = 5, 7


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("window", list(itertools.product((-1, 0, 2), (-1, 0, 3))), ids=str)
@pytest.mark.parametrize("lengths", [(5, 7), (3, 7), (5, 2), (0, 4), (4, 0)], ids=str)
def test_hidden_is_what_the_words_say(lengths, window, at_end):
    num_q, num_k = lengths
    left, right = window
    got = seen.hidden(
        torch.arange(ROWS)[:, None], torch.arange(KEYS), ROWS, KEYS, left=left, right=right, at_end=at_end,
        lengths_q=torch.tensor([num_q]).view(1, 1, 1), lengths_k=torch.tensor([num_k]).view(1, 1, 1),
    )[0]  # fmt: skip
    first_q, first_k = (ROWS - num_q, KEYS - num_k) if at_end else (0, 0)
    for row, key in itertools.product(range(ROWS), range(KEYS)):
        i, j = row - first_q, key - first_k
        position = i + num_k - num_q
        sees = 0 <= i < num_q and 0 <= j < num_k
        sees = sees and (left < 0 or j >= position - left) and (right < 0 or j <= position + right)
        assert bool(got[row, key]) != sees, (row, key)


def test_without_lengths_and_window_nothing_is_hidden_and_one_mask_serves_all_sequences():
    places = torch.arange(ROWS)[:, None], torch.arange(KEYS), ROWS, KEYS
    assert seen.hidden(*places) is None
    assert seen.hidden(*places, right=0).shape == (ROWS, KEYS)


def test_rows_that_are_not_real():
    lengths = torch.tensor([0, 2, 3], dtype=torch.int32)
    assert seen.unreal(lengths, 3).tolist() == [[True] * 3, [False, False, True], [False] * 3]
    assert seen.unreal(lengths, 3, at_end=True).tolist() == [[True] * 3, [True, False, False], [False] * 3]


@pytest.mark.parametrize("lengths", [[3, 1, 4], [0, 5, 0], [1]], ids=str)
def test_a_ragged_batch_there_and_back(lengths):
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    ragged = torch.randn(sum(lengths), 2, 3)
    whole = seen.padded(ragged, starts, 6)
    for one, piece, length in zip(whole, ragged.split(lengths), lengths, strict=True):
        assert torch.equal(one[:length], piece) and not one[length:].any()
    assert torch.equal(seen.packed(whole, starts, sum(lengths)), ragged)
    longer = seen.packed(whole, starts, sum(lengths) + 2, -math.inf)
    assert torch.equal(longer[:-2], ragged) and (longer[-2:] == -math.inf).all()


def test_what_stands_behind_a_sequence_does_not_reach_its_padding():
    ragged = torch.full((5, 2), math.nan)
    ragged[:2] = 1.0
    assert seen.padded(ragged, torch.tensor([0, 2, 2]), 4)[0].tolist() == [
        [1.0, 1.0],
        [1.0, 1.0],
        [0.0, 0.0],
        [0.0] * 2,
    ]
    assert not seen.padded(ragged[:0], torch.tensor([0, 0]), 3).any()


def test_a_padded_batch_as_a_ragged_one_of_real_sequences_and_of_padding():
    lengths, device = torch.tensor([3, 0, 5], dtype=torch.int32), torch.device("cpu")
    assert seen.alternating(lengths, 3, 5, device).tolist() == [0, 3, 5, 5, 10, 15, 15]
    assert seen.alternating(lengths, 3, 5, device, at_end=True).tolist() == [0, 2, 5, 10, 10, 10, 15]
    whole = seen.alternating(None, 2, 4, device)
    assert whole.tolist() == [0, 4, 4, 8, 8] and whole.dtype == torch.int32
