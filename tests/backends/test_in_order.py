"""Arithmetic of a given order: as exact as float32 allows, and the same bits wherever a number stands."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.backends import _in_order

ULP = 2.0**-24
"""Half a unit in the last place of float32, relative."""
FUNCTIONS = {"exp": _in_order.exp, "log": _in_order.log, "tanh": _in_order.tanh}


def samples(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    even, wide = torch.rand(20_000, generator=generator), torch.logspace(-30, 1.9, 10_000)
    return {"exp": torch.cat([-104 * even, -wide, wide.clamp(max=80)]), "log": torch.cat([even * 8, wide]),
            "tanh": torch.cat([even * 20 - 10, wide, -wide])}[name]  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_off_by_the_last_places_alone(name):
    x = samples(name)
    found, expected = FUNCTIONS[name](x), getattr(x.double(), name)()
    assert found.dtype == torch.float32
    allowed = {"exp": 4 * ULP * expected + 2.0**-149, "log": 2 * ULP * expected.abs(), "tanh": 2.0**-22}[name]
    assert bool(((found.double() - expected).abs() <= allowed).all())


def test_what_is_no_ordinary_number():
    odd = torch.tensor([-math.inf, math.nan, 0.0, -104.5])
    assert (
        _in_order.exp(odd).tolist()[::2] == [0.0, 1.0] and _in_order.exp(odd)[3] == 0 and _in_order.exp(odd)[1].isnan()
    )
    assert _in_order.log(torch.tensor([0.0, 1.0])).tolist() == [-math.inf, 0.0]
    assert _in_order.log(torch.tensor([math.nan])).isnan() and _in_order.tanh(odd[1:2]).isnan()
    assert _in_order.tanh(torch.tensor([-math.inf, 0.0, math.inf])).tolist() == [-1.0, 0.0, 1.0]


def test_products_and_sums_go_by_the_order_that_they_name():
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(2, 3, *shape, generator=generator) for shape in ((5, 24), (24, 7)))
    found, by_hand = _in_order.product(a, b), torch.zeros(2, 3, 5, 7)
    for i in range(24):
        by_hand = by_hand + a[..., i, None] * b[..., i, None, :]
    assert torch.equal(found, by_hand)
    torch.testing.assert_close(found, a @ b, rtol=1e-5, atol=1e-5)
    assert torch.equal(_in_order.product(a, b.mT.contiguous().mT), found), "whatever the strides are"
    x = torch.randn(4, _in_order.TILE, generator=generator)
    torch.testing.assert_close(_in_order.total(x), x.sum(-1), rtol=1e-5, atol=1e-5)
    short = torch.cat([x[:, :5], torch.zeros(4, _in_order.TILE - 5)], -1)
    assert torch.equal(_in_order.total(x[:, :5]), _in_order.total(short)), "what is not there counts as 0"


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a_number_has_the_same_bits_at_any_place(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, function in FUNCTIONS.items():
            x = samples(name)[:: 97 if threads == 1 else 89]
            whole = function(samples(name))[:: 97 if threads == 1 else 89]
            for start, size in ((0, 1), (3, 7), (11, 64), (5, 250)):
                assert torch.equal(function(x[start : start + size]), whole[start : start + size])
        generator = torch.Generator().manual_seed(5)
        a, b = torch.randn(9, 40, 64, generator=generator), torch.randn(9, 64, 64, generator=generator)
        found = _in_order.product(a, b)
        for which, row in ((0, 0), (4, 17), (8, 39)):
            assert torch.equal(_in_order.product(a[which, row : row + 1], b[which])[0], found[which, row])
    finally:
        torch.set_num_threads(before)
