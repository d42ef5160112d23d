"""`parallel.under_torch`: torch's `context_parallel` with our attention, and everything else left to torch."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.slow
def test_context_parallel_computes_by_our_attention_what_torch_computes_on_one_device(ranks):
    for got in (one["context_parallel"] for one in ranks[:2]):
        torch.testing.assert_close(got["whole"], got["expected"], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(got["ring"], got["expected"], atol=2e-6, rtol=2e-6)
        for found, expected in zip(got["gradients"], got["expected gradients"], strict=True):
            torch.testing.assert_close(found, expected, atol=5e-6, rtol=5e-6)
        assert got["kind"] == "Tensor"
        assert got["said"] == "FlashCore computed 1 of 1 calls over ranks, and torch 0."


@pytest.mark.slow
def test_what_it_does_not_compute_goes_to_torch_with_the_reason(ranks):
    for got in (one["context_parallel"] for one in ranks[:2]):
        off = "the sequence is not cut in zigzag, since torch's load balance is off"
        without = "gradients are asked for, and plan 'ring' has none"
        assert got["others"] == {"there is dropout": 1, without: 1, off: 1}
        assert got["outside"] != ""  # torch has no such attention on CPUs, so the calls above were ours


@pytest.mark.slow
def test_the_context_for_one_device_hands_on_to_torch_what_is_cut_over_ranks(ranks):
    for got in (one["context_parallel"] for one in ranks[:2]):
        assert got["replaced"] == [got["outside"], 0, {"the tensors are DTensors, cut over ranks": 1}]


@pytest.mark.slow
def test_tensors_that_are_not_cut_are_left_to_torch_without_a_count(ranks):
    assert all(one["context_parallel"]["untouched"] and one["context_parallel"]["plain"] == 0 for one in ranks[:2])
