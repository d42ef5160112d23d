"""Gradients, tangents and mapped axes: seen wherever they hide, and refused in one sentence; nothing else is."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch
from torch.autograd import forward_ad

from flashcore.errors import InvalidProblem
from flashcore.numerics import transforms


def seen_inside(transform) -> list:
    """What `under_way` says inside of a transform of torch.func, and what `refuse` says of the tensor there."""
    found = []

    def function(tensor):
        found.append(transforms.under_way())
        with pytest.raises(InvalidProblem) as refused:
            transforms.refuse("q", tensor)
        found.append(str(refused.value))
        return (tensor * 2).sum()

    transform(function)(torch.ones(3))
    return found


def test_only_what_a_loaded_torch_calls_a_dtensor_is_distributed(monkeypatch):
    class Cut(torch.Tensor):
        pass

    cut = torch.ones(3).as_subclass(Cut)
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor", raising=False)
    assert not transforms.is_distributed(cut)
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", types.SimpleNamespace(DTensor=Cut))
    assert transforms.is_distributed(cut) and not transforms.is_distributed(torch.ones(3))
    assert not transforms.is_distributed("a word")


def test_nothing_is_under_way_in_an_ordinary_call():
    assert not transforms.under_way()
    plain = torch.ones(3)
    transforms.refuse("q, k or v", plain, plain.half(), torch.ones(3, dtype=torch.int32))
    with torch.inference_mode():
        transforms.refuse("q", torch.ones(3))


def test_gradients_are_wanted_of_any_one_tensor_and_only_while_they_are_recorded():
    plain, wanted = torch.ones(3), torch.ones(3, requires_grad=True)
    assert transforms.want_gradients(plain, wanted) and transforms.want_gradients(wanted * 2)
    assert not transforms.want_gradients(plain) and not transforms.want_gradients(wanted.detach())
    assert not transforms.want_gradients()
    with pytest.raises(InvalidProblem, match=r"^k requires gradients, .* call it under torch.no_grad\(\), or detach"):
        transforms.refuse("k", plain, wanted)
    with torch.no_grad():
        assert not transforms.want_gradients(wanted)
        transforms.refuse("k", plain, wanted)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda f: torch.vmap(f), "q is mapped by torch.vmap.* put the mapped axis into the batch dimension"),
        (lambda f: torch.func.grad(f), "q is transformed by torch.func .* call it outside the transform"),
        (lambda f: torch.vmap(torch.func.grad(f)), "q is transformed by torch.func"),
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), "q is transformed by torch.func"),
    ],
    ids=["vmap", "grad", "vmap of grad", "jvp"],
)
def test_a_transform_is_under_way_inside_it_and_not_after_it(transform, words):
    (under_way, sentence) = seen_inside(transform)
    assert under_way and "\n" not in sentence
    assert re.match(words, sentence), sentence
    assert not transforms.under_way()


def test_a_tensor_from_outside_a_transform_may_be_used_in_it():
    """A function of `k` that takes an ordinary `q` from around it: only what is transformed would be lost."""
    outside = torch.ones(3)

    def function(tensor):
        transforms.refuse("q", outside)
        return tensor.sum()

    assert torch.equal(torch.func.grad(function)(torch.ones(3)), torch.ones(3))


def test_only_a_tensor_that_carries_a_tangent_is_refused():
    tensor = torch.ones(3)
    with forward_ad.dual_level():
        assert transforms.under_way()
        dual = forward_ad.make_dual(tensor, torch.full((3,), 2.0))
        transforms.refuse("q", tensor)
        transforms.refuse("q", forward_ad.unpack_dual(dual).primal)
        for named in (dual, dual * 3, dual.view(3, 1)):
            with pytest.raises(InvalidProblem, match="^v carries a tangent .* pass the primal, as "):
                transforms.refuse("v", tensor, named)
    assert not transforms.under_way()
    transforms.refuse("v", dual)  # its tangent went with the level


def test_a_derivative_is_told_from_an_axis_that_is_mapped_however_they_nest():
    said = []

    def look(tensor):
        said.append((transforms.carries_derivatives(tensor), transforms.traces_derivative()))
        return tensor.sum()

    rows, grad, vmap = torch.ones(2, 3), torch.func.grad, torch.func.vmap
    look(rows), vmap(look)(rows)
    assert said == [(False, False)] * 2
    said.clear()
    grad(look)(rows), vmap(grad(look))(rows), grad(lambda x: vmap(look)(x).sum())(rows)
    torch.func.jvp(look, (rows,), (rows,))
    assert said == [(True, True)] * 4
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows, rows)
        assert transforms.carries_derivatives(rows, dual) and not transforms.carries_derivatives(rows)
        assert not transforms.traces_derivative()


def test_under_torchs_compiler_it_is_refused_by_what_runs_around_the_call():
    transforms.refuse_traced_derivatives("q")
    torch.func.vmap(lambda x: (transforms.refuse_traced_derivatives("q"), x)[1])(torch.ones(2, 3))
    with pytest.raises(InvalidProblem, match=r"^q is transformed by torch.func .*; call it outside the transform\.$"):
        torch.func.grad(lambda x: (transforms.refuse_traced_derivatives("q"), x.sum())[1])(torch.ones(3))
