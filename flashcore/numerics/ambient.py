"""Keep torch's ambient settings out of a call: what a call means depends on its arguments alone.

Ambient is what somebody sets around a call: autocast, the default dtype and device, deterministic algorithms, float32
products in fewer bits. Without this, autocast would give bfloat16 back for float32, and the judge would take a right
kernel for a wrong one. Where nothing is set, which is nearly always, a shielded call costs a few looks, and no more.

Autocast and the device belong to a thread. The other settings are the process's: they are put back when the call ends,
and another thread sees them as torch has them by default until then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

EXACT = ("none", "ieee", "highest")
"""Names that torch has for float32 products in float32."""
DEVICES = ("cpu", "cuda")
"""Kinds of devices that FlashCore computes on, and that autocast is asked about."""


@functools.cache
def _torch() -> Any:
    """Loaded at the first call: whoever only lists backends does without."""
    import torch

    return torch


class _Products:
    """How exactly one kind of device multiplies float32 matrices: by the setting of its own that torch 2.9 brought."""

    def __init__(self, device: str):
        self.device = device
        self._of_device = {"cpu": _torch().backends.mkldnn, "cuda": _torch().backends.cuda}[device].matmul

    def setting(self) -> str:
        """What is in force, whether it was set for this device or for all."""
        return self._of_device.fp32_precision

    def set(self, setting: str) -> None:
        self._of_device.fp32_precision = setting

    def put_back(self, setting: str) -> None:
        """What was in force before; it is not written down for this device where it comes from what is set for all."""
        self.set("none")
        if self.setting() != setting:
            self.set(setting)


class _AllProducts:
    """The same before torch 2.9: one setting for all devices."""

    def setting(self) -> str:
        return _torch().get_float32_matmul_precision()

    def set(self, setting: str) -> None:
        _torch().set_float32_matmul_precision("highest" if setting == "ieee" else setting)

    put_back = set


@functools.cache
def _products() -> tuple[_Products | _AllProducts, ...]:
    one_each = hasattr(_torch().backends.cuda.matmul, "fp32_precision")
    return tuple(_Products(device) for device in DEVICES) if one_each else (_AllProducts(),)


def _has_default_device() -> bool:
    # A default device is a mode on this stack; only a default tensor type, which is older, is not.
    inside = _torch()._C
    return inside._len_torch_function_stack() > 0 or inside._get_default_device() != "cpu"


@functools.cache
def _probe() -> Callable[[], bool]:
    """`reaches`, of questions as cheap as this release of torch allows: it is asked at every call."""
    torch = _torch()
    inside = torch._C
    any_autocast = getattr(inside, "_is_any_autocast_enabled", None)
    any_autocast = any_autocast or (lambda: any(map(torch.is_autocast_enabled, DEVICES)))
    dtype, float32 = torch.get_default_dtype, torch.float32
    modes, own_device = inside._len_torch_function_stack, inside._get_default_device
    deterministic = inside._get_deterministic_algorithms
    precision = getattr(inside, "_get_fp32_precision_getter", None)
    exact = frozenset(EXACT)

    def coarse() -> bool:
        if precision is None:
            return any(products.setting() not in exact for products in _products())
        return precision("cuda", "matmul") not in exact or precision("mkldnn", "matmul") not in exact

    def anything() -> bool:
        return (
            any_autocast() or dtype() is not float32 or modes() > 0 or own_device() != "cpu" or deterministic()
            or coarse()
        )  # fmt: skip

    return anything


def reaches() -> bool:
    """Whether something is set around the call that would change what torch computes in it."""
    return _probe()()


@contextlib.contextmanager
def shield(*, modes: bool = False) -> Iterator[None]:
    """Inside this context torch is as it is when nobody has set anything.

    Parameters
    ----------
    modes
        Also record no gradients, and leave inference mode, so that a tensor made inside is like any other and can be
        kept for later. Not for what writes into tensors of the caller's: those of inference mode take no writes
        outside it.
    """
    torch = _torch()
    with contextlib.ExitStack() as stack:
        if modes and torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if modes and torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if (dtype := torch.get_default_dtype()) is not torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if (deterministic := torch.get_deterministic_debug_mode()) != 0:
            # Not by `use_deterministic_algorithms`, which loads torch's compiler to tell it too.
            stack.callback(torch.set_deterministic_debug_mode, deterministic)
            torch.set_deterministic_debug_mode(0)
        for products in _products():
            if (setting := products.setting()) not in EXACT:
                stack.callback(products.put_back, setting)
                products.set("ieee")
        if _has_default_device():
            stack.enter_context(torch.device("cpu"))
        yield


def shielded(function: Function) -> Function:
    """The function, with what is set around a call kept out of it; grad mode and inference mode go on as they are."""

    @functools.wraps(function)
    def alone(*args, **kwargs):
        if not _probe()():
            return function(*args, **kwargs)
        with shield():
            return function(*args, **kwargs)

    return alone


def judging(function: Function) -> Function:
    """The same, with grad mode and inference mode kept out of it as well: for what judges, or makes what is kept."""

    @functools.wraps(function)
    def alone(*args, **kwargs):
        torch = _torch()
        if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or reaches()):
            return function(*args, **kwargs)
        with shield(modes=True):
            return function(*args, **kwargs)

    return alone
