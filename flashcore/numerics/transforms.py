"""Refuse what a forward pass alone would lose without a word: gradients, tangents, an axis mapped by `torch.vmap`.

Our kernels read memory, and none of these lies there. torch would either say nothing and drop them, or fail inside.
`is_distributed` tells a tensor of which this process holds a part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from flashcore.errors import InvalidProblem

_functorch = torch._C._functorch
_TRANSFORMED = (
    "{names} is transformed by torch.func (grad, jvp or another), and FlashCore computes the forward pass only; call "
    "it outside the transform."
)


def constant_when_traced(function: Callable) -> Callable:
    """Mark a function whose result torch's compiler takes for a constant of the graph that it traces.

    As ``torch.compiler.assume_constant_result`` marks it; but that imports the compiler, which takes as long as the
    rest of torch does, and most processes compile nothing.
    """
    function._dynamo_marked_constant = True
    return function


def _no_transform() -> None:
    return None


_transform = getattr(_functorch, "peek_interpreter_stack", _no_transform)
"""The innermost of torch.func's transforms that runs now, or None."""


def under_way() -> bool:
    """Whether tensors may carry a tangent, or a transform of torch.func runs: cheap, and nearly always False."""
    return forward_ad._current_level >= 0 or _transform() is not None


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether `torch.vmap` maps over an axis of the tensor."""
    return _functorch.is_batchedtensor(tensor)


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor, told without loading what makes these: that takes a second."""
    made = sys.modules.get("torch.distributed.tensor")
    return made is not None and isinstance(tensor, made.DTensor)


def carries_derivatives(*tensors: torch.Tensor) -> bool:
    """Whether a tensor carries a tangent, or is traced by a transform of torch.func other than vmap, or both."""
    return under_way() and any(_is_transformed(tensor) or _has_tangent(tensor) for tensor in tensors)


@constant_when_traced
def traces_derivative() -> bool:
    """Whether torch's compiler traces a call inside of a transform of torch.func other than vmap.

    What it traces carries no derivative that could be looked for; which transforms run is known, and part of its
    guards.
    """
    stack = _functorch.get_interpreter_stack() or []
    return any(one.key() != _functorch.TransformType.Vmap for one in stack)


@constant_when_traced
def refuse_traced_derivatives(names: str) -> None:
    """Raise `InvalidProblem` where `traces_derivative`; torch's compiler shows the sentence in an error of its own."""
    if traces_derivative():
        raise InvalidProblem(_TRANSFORMED.format(names=names))


def _is_transformed(tensor: torch.Tensor) -> bool:
    while is_mapped(tensor):  # what is mapped may itself be what a derivative is taken of
        tensor = _functorch.get_unwrapped(tensor)
    return _functorch.is_functorch_wrapped_tensor(tensor)


def _has_tangent(tensor: torch.Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def want_gradients(*tensors: torch.Tensor) -> bool:
    """Whether a result with gradients is asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def refuse(names: str, *tensors: torch.Tensor) -> None:
    """Raise `InvalidProblem` where more than a forward pass is asked of these tensors, which `names` names.

    Raises
    ------
    InvalidProblem
        A tensor is mapped by `torch.vmap`, carries a tangent, is traced by another transform of torch.func, or
        gradients are asked of it.
    """
    if under_way():
        if any(map(is_mapped, tensors)):
            raise InvalidProblem(
                f"{names} is mapped by torch.vmap, which FlashCore does not support; put the mapped axis into the "
                "batch dimension, and make one call."
            )
        refuse_derivatives(names, *tensors)
    if want_gradients(*tensors):
        raise InvalidProblem(
            f"{names} requires gradients, and FlashCore computes the forward pass only; "
            "call it under torch.no_grad(), or detach the tensors."
        )


def refuse_derivatives(names: str, *tensors: torch.Tensor) -> None:
    """Raise `InvalidProblem` where a tensor carries a tangent, or is traced by a transform of torch.func but vmap.

    An axis that `torch.vmap` maps over goes through: whoever calls this has a rule for it.
    """
    for tensor in tensors:
        if _functorch.is_functorch_wrapped_tensor(tensor) and not is_mapped(tensor):
            raise InvalidProblem(_TRANSFORMED.format(names=names))
        if _has_tangent(tensor):
            raise InvalidProblem(
                f"{names} carries a tangent (torch.autograd.forward_ad), and FlashCore computes the forward pass only; "
                "pass the primal, as forward_ad.unpack_dual gives it."
            )
