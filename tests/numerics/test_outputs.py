"""Outputs start out as NaN while a check runs, and in no other call."""

from __future__ import annotations

import threading

import pytest
import torch

from flashcore.numerics.outputs import new_output, poisoned, poisoned_outputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inside_every_element_of_a_new_output_is_nan(dtype):
    with poisoned_outputs():
        found = new_output((2, 3, 5), dtype, CPU)
    assert found.shape == (2, 3, 5) and found.dtype == dtype and found.device == CPU
    assert bool(found.isnan().all())


def test_outside_a_tensor_is_given_back_as_it_is():
    tensor = torch.arange(4.0)
    assert poisoned(tensor) is tensor and tensor.tolist() == [0, 1, 2, 3]
    with poisoned_outputs():
        assert poisoned(tensor) is tensor and bool(tensor.isnan().all()), "filled where it lies, and not copied"


def test_a_view_is_filled_and_what_lies_around_it_is_not():
    whole = torch.zeros(3, 4)
    with poisoned_outputs():
        poisoned(whole[:, 1:3])
    assert whole.isnan().tolist() == [[False, True, True, False]] * 3


def test_it_ends_with_the_context_also_by_an_error_and_the_inner_one_ends_alone():
    def is_on() -> bool:
        return bool(poisoned(torch.zeros(1)).isnan())

    with poisoned_outputs():
        with poisoned_outputs():
            assert is_on()
        assert is_on(), "the outer context goes on"
    assert not is_on()
    with pytest.raises(KeyError), poisoned_outputs():
        raise KeyError
    assert not is_on()


def test_another_thread_is_not_poisoned():
    """A check in one thread must not spoil what another one computes for its user."""
    seen = []
    with poisoned_outputs():
        thread = threading.Thread(target=lambda: seen.append(poisoned(torch.zeros(2)).tolist()))
        thread.start()
        thread.join()
    assert seen == [[0.0, 0.0]]
