"""Comparing element by element: NaN fails, and the first and the worst element are named."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.numerics.tolerance import compare, coordinates


def test_compare_counts_first_and_worst(monkeypatch):
    monkeypatch.setattr("flashcore.numerics.tolerance.ELEMENTS_AT_ONCE", 5)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[0, 0] = -math.inf
    got = expected.clone()
    got[0, 3], got[1, 2], got[2, 1] = 0.1, 0.5, 0.3
    found = compare(got, expected, atol=0.2, rtol=0.0, axes=("row", "column"))
    assert (found.checked, found.num_bad, found.num_nan, found.num_inf) == (12, 2, 0, 0)
    assert found.first_bad == {"row": 1, "column": 2, "got": 0.5, "expected": 0.0}
    assert found.max_abs_error == 0.5 and found.bound == 0.2 and not found.passed
    assert compare(expected, expected, atol=0.0, rtol=0.0).passed
    found = compare(torch.full((2,), math.nan), torch.full((2,), math.nan), atol=9.0, rtol=9.0)
    assert found.num_bad == found.num_nan == 2, "NaN fails even where NaN was expected"
    found = compare(torch.zeros(2), torch.tensor([math.inf, 0.0]), atol=1.0, rtol=1.0)
    assert found.num_bad == 1, "an infinite bound lets nothing through"


def test_the_bound_is_absolute_and_relative_and_met_by_what_reaches_it():
    expected = torch.tensor([8.0, -8.0, 0.0], dtype=torch.float64)
    at_the_bound = expected + torch.tensor([1.5, -1.5, 0.5], dtype=torch.float64)
    assert compare(at_the_bound, expected, atol=0.5, rtol=0.125).passed
    found = compare(at_the_bound + 2.0**-40, expected, atol=0.5, rtol=0.125)
    assert found.num_bad == 2 and found.first_bad["batch"] == 0, "-8 came nearer, and the others went past it"


def test_the_worst_is_a_bad_element_however_far_a_good_one_is_off():
    expected = torch.tensor([1000.0, 1.0])
    found = compare(torch.tensor([1009.0, 1.5]), expected, atol=0.0, rtol=0.01, axes=("row",))
    assert found.worst == {"row": 1, "got": 1.5, "expected": 1.0} == found.first_bad
    assert found.max_abs_error == 0.5 and found.bound == 0.01
    good = compare(torch.tensor([1009.0, 1.001]), expected, atol=0.0, rtol=0.01, axes=("row",))
    assert good.passed and good.first_bad is None and good.worst["row"] == 0 and good.max_abs_error == 9.0
    assert good.max_abs_error <= good.bound == 10.0
    second = compare(torch.tensor([1.0, -1000.5]), -expected.flip(0), atol=9.0, rtol=0.01, axes=("row",))
    assert second.passed and second.worst["row"] == 0 and second.max_abs_error == 2.0
    third = compare(torch.tensor([-1.0, -1000.5]), -expected.flip(0), atol=9.0, rtol=0.01, axes=("row",))
    assert third.passed and third.worst["row"] == 1, "an element that is right to the bit is not the worst"
    assert third.max_abs_error == 0.5 and third.bound == 19.0


@pytest.mark.parametrize("got", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_far_off(got):
    found = compare(torch.tensor([1.0, got, 5.0]), torch.tensor([1.0, 1.0, 1.0]), atol=0.1, rtol=0.0, axes=("row",))
    assert found.num_bad == 2 and found.max_abs_error == math.inf and found.worst["row"] == 1
    assert (found.num_nan, found.num_inf) == (int(math.isnan(got)), int(math.isinf(got)))
    assert not found.max_abs_error <= found.bound


def test_an_infinity_is_met_by_the_same_infinity_alone():
    expected = torch.tensor([math.inf, -math.inf])
    same = compare(expected, expected, atol=0.25, rtol=0.0)
    assert same.passed and (same.max_abs_error, same.bound) == (0.0, 0.25)
    found = compare(-expected, expected, atol=1.0, rtol=1.0, axes=("row",))
    assert found.num_bad == found.num_inf == 2 and found.bound == 1.0
    assert compare(torch.tensor([3e38, -math.inf]), expected, atol=1.0, rtol=1.0).num_bad == 1


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 24, 100])
def test_the_size_of_a_piece_changes_nothing(monkeypatch, piece):
    torch.manual_seed(1)
    expected = torch.randn(2, 3, 4)
    got = expected.clone()
    got[0, 2, 1], got[1, 0, 0], got[1, 2, 3] = math.nan, 9.0, -math.inf
    whole = compare(got, expected, atol=1e-3, rtol=0.0, axes=("head", "row", "column"))
    monkeypatch.setattr("flashcore.numerics.tolerance.ELEMENTS_AT_ONCE", piece)
    cut = compare(got, expected, atol=1e-3, rtol=0.0, axes=("head", "row", "column"))
    assert str(cut) == str(whole), "as words, since a NaN is equal to nothing"
    assert (cut.num_bad, cut.num_nan, cut.num_inf) == (3, 1, 1)
    assert {axis: cut.first_bad[axis] for axis in ("head", "row", "column")} == {"head": 0, "row": 2, "column": 1}


def test_views_are_compared_by_their_coordinates_and_dtypes_in_float64():
    expected = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    got = expected.bfloat16().t().contiguous().t()
    got[2, 1] = 0
    found = compare(got, expected, atol=0.0, rtol=0.0, axes=("row", "column"))
    assert found.first_bad == {"row": 2, "column": 1, "got": 0.0, "expected": 9.0} and found.num_bad == 1


def test_a_sentence_for_a_person():
    zeros = torch.zeros(2, 2)
    right = compare(zeros + 0.25, zeros, atol=1.0, rtol=0.0)
    assert right.sentence() == "all 4 elements are within bounds; the largest error is 2.50e-01"
    wrong = compare(torch.tensor([[0.0, math.nan], [math.inf, 0.0]]), zeros, atol=1.0, rtol=0.0, axes=("row", "column"))
    assert wrong.sentence().startswith("2 of 4 elements are wrong (1 NaN, 1 Inf); first ")
    assert "row 0" in wrong.sentence() and "column 1" in wrong.sentence()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"cannot compare shapes \(2, 3\) and \(3, 2\)"):
        compare(torch.zeros(2, 3), torch.zeros(3, 2), atol=1.0, rtol=0.0)
    with pytest.raises(ValueError, match=r"there is nothing to compare in tensors of shape \(1, 2, 0, 8\)"):
        compare(torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8), atol=1.0, rtol=0.0)


def test_gradients_and_inference_mode_do_not_reach_it():
    tensor = torch.ones(3, requires_grad=True)
    assert compare(tensor, tensor.detach() + 1, atol=0.0, rtol=0.0).num_bad == 3
    with torch.inference_mode():
        assert compare(torch.ones(3), torch.ones(3), atol=0.0, rtol=0.0).passed


def test_coordinates_of_a_flat_index():
    shape = (2, 3, 5)
    every = [coordinates(n, shape, ("head", "row", "column")) for n in range(30)]
    assert every[0] == {"head": 0, "row": 0, "column": 0} and every[29] == {"head": 1, "row": 2, "column": 4}
    assert [e["head"] * 15 + e["row"] * 5 + e["column"] for e in every] == list(range(30))
    assert coordinates(7, (10,), ("batch", "head")) == {"batch": 7}, "as many axes as there are dimensions"
