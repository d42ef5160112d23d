"""The namespace `flashcore` of torch's ops: how an op is defined in it, and told what computes it."""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "flashcore"
DEVICES = ("CPU", "CUDA")
"""Dispatch keys that an op has an implementation for; a tensor of another device gets torch's sentence."""
AS_TRACED = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
"""Inputs reach the op with the strides that they were traced with: those of `out` follow from those of `q`."""
TAGS = (torch.Tag.pt2_compliant_tag, AS_TRACED)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # its definitions end when it is collected


def define(name: str, schema: str, fake: Callable) -> torch._ops.OpOverload:
    """Define an op, with the function that says what its results look like; `implement` says what computes it."""
    _library.define(f"{name}{schema}", tags=TAGS)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def implement(op: torch._ops.OpOverload, function: Callable) -> None:
    """Say what computes an op on real tensors of the CPU and of a GPU."""
    name = op.name().partition("::")[2]
    for device in DEVICES:
        _library.impl(name, function, device)


def differentiate(op: torch._ops.OpOverload, backward: Callable, setup_context: Callable | None = None) -> None:
    """Say how gradients flow back through an op."""
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_library)


_dispatch_modes = torch._C._len_torch_dispatch_stack


def traced() -> bool:
    """Whether a call is being traced: by torch's compiler, or by a dispatch mode such as that of fake tensors."""
    return torch.compiler.is_compiling() or _dispatch_modes() > 0


def map_over(op: torch._ops.OpOverload, rule: Callable) -> None:
    """Say what `torch.vmap` makes of an op."""
    torch.library.register_vmap(op.name(), rule, lib=_library)
