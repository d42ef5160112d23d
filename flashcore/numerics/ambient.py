"""Keep torch's ambient settings out of a call: what a call means depends on its arguments alone.

Ambient is what somebody sets around a call: autocast, the default dtype and device, deterministic algorithms, float32
products in fewer bits. Without this, autocast would give bfloat16 back for float32, and the judge would take a right
kernel for a wrong one. Where nothing is set, which is nearly always, a shielded call costs a few looks, and no more.

Autocast and the device belong to a thread. The other settings are the process's: another thread sees them as torch has
them by default until the call ends. They are put back by the last of several calls that overlap, so that none computes
under what was set around another one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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


# ------------------------------------------------------------------------------------- settings that threads share

_lock = threading.Lock()
"""Held while settings of the process are changed or put back."""
_inside: dict[int, int] = {}
"""By thread, how many of its calls hold the process's settings. A call that begins meanwhile has to hold them too: what
it finds is what another one has set, and will put back."""
_entered = 0
"""Calls that came to hold them so far."""
alone = threading.RLock()
"""Held by what needs a setting of the process that another thread's call would need otherwise."""
choosing = threading.RLock()
"""Held while torch is told which of its kernels for attention to take, and by who asks which ones it may."""


@contextlib.contextmanager
def torchs_kernel(choice: Any) -> Iterator[None]:
    """``torch.nn.attention.sdpa_kernel``, one thread at a time: what it sets and puts back is the process's."""
    from torch.nn.attention import sdpa_kernel

    with choosing, sdpa_kernel(choice):
        yield


@dataclass(eq=False)
class _Change:
    """What a call found a setting to be, and what it made of it."""

    found: Any
    value: Any
    thread: int = field(default_factory=threading.get_ident)


@dataclass(eq=False)
class _Setting:
    """A setting of the process, and the calls that hold it, in the order in which they came.

    Whoever ends last puts back what the first one found: one that ends before others hands what it found to the next.
    """

    read: Callable[[], Any]
    put: Callable[[Any], None]
    change_to: Callable[[Any], None]
    """`put`, where it is known not to be what was found."""
    defaults: tuple[Any, ...]
    """What torch has where nobody set anything, in its several words; the first is what it is changed to."""
    changes: list[_Change] = field(default_factory=list)

    def hold(self, value: Any) -> _Change:
        """Let it be `value` from now on; under the lock."""
        change = _Change(self.read(), value)
        self.changes.append(change)
        if change.found != value:
            self.change_to(value)
        return change

    def let_go(self, change: _Change) -> None:
        """End a change; under the lock."""
        place = self.changes.index(change)
        del self.changes[place]
        if place == len(self.changes):
            if self.read() != change.found:
                self.put(change.found)
        elif self.changes[place].found == change.value:  # otherwise somebody has set another one since, and means it
            self.changes[place].found = change.found


@functools.cache
def _settings() -> tuple[_Setting, ...]:
    """The settings that FlashCore changes for a while; under the lock, so that there is one of each."""
    torch = _torch()
    dtype = torch.set_default_dtype
    # Not by `use_deterministic_algorithms`, which loads torch's compiler to tell it too.
    mode = torch.set_deterministic_debug_mode
    return (
        _Setting(torch.get_default_dtype, dtype, dtype, (torch.float32,)),
        _Setting(torch.get_deterministic_debug_mode, mode, mode, (0,)),
        *(_Setting(one.setting, one.put_back, one.set, ("ieee", *EXACT)) for one in _products()),
    )


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """Inside, settings of the process are torch's own, whatever other threads' calls put back meanwhile."""
    global _entered
    me, held = threading.get_ident(), []
    with _lock:
        settings = [(setting, setting.read()) for setting in _settings()]
        if _inside or not all(found in setting.defaults for setting, found in settings):
            _entered += 1  # before anything is changed, for `_reaches_here`
            _inside[me] = _inside.get(me, 0) + 1
            for setting, found in settings:
                held.append((setting, setting.hold(found if found in setting.defaults else setting.defaults[0])))
    try:
        yield
    finally:
        if held:
            with _lock:
                for setting, change in reversed(held):
                    setting.let_go(change)
                _inside[me] -= 1
                if not _inside[me]:
                    del _inside[me]


def _in_a_child() -> None:
    """In a forked process only the thread that forked it goes on: what others held is put back, and nobody waits."""
    global _lock, alone, choosing
    _lock, alone, choosing = threading.Lock(), threading.RLock(), threading.RLock()
    me = threading.get_ident()
    for setting in _settings() if _settings.cache_info().currsize else ():
        for change in [change for change in setting.changes if change.thread != me]:
            setting.let_go(change)
    for ident in [ident for ident in _inside if ident != me]:
        del _inside[ident]


os.register_at_fork(after_in_child=_in_a_child)


@contextlib.contextmanager
def deterministic(mode: str | int) -> Iterator[None]:
    """Inside, torch's deterministic debug mode is this one; but not while another thread's call is shielded from it."""
    value = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
    with _lock:
        setting = _settings()[1]
        change = setting.hold(value)
    try:
        yield
    finally:
        with _lock:
            setting.let_go(change)


# --------------------------------------------------------------------------------------------------- around a call


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


def _reaches_here() -> bool:
    """`reaches`, or another thread's call hides what is set: then it would come back in the middle of this one."""
    before = _entered
    if _inside and threading.get_ident() not in _inside:
        return True
    # One that came and went between the two looks would have hidden it from the second.
    return _probe()() or _entered != before


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
        stack.enter_context(_held())
        if _has_default_device():
            stack.enter_context(torch.device("cpu"))
        yield


def shielded(function: Function) -> Function:
    """The function, with what is set around a call kept out of it; grad mode and inference mode go on as they are."""

    @functools.wraps(function)
    def alone(*args, **kwargs):
        if not _reaches_here():
            return function(*args, **kwargs)
        with shield():
            return function(*args, **kwargs)

    return alone


def judging(function: Function) -> Function:
    """The same, with grad mode and inference mode kept out of it as well: for what judges, or makes what is kept."""

    @functools.wraps(function)
    def alone(*args, **kwargs):
        torch = _torch()
        if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or _reaches_here()):
            return function(*args, **kwargs)
        with shield(modes=True):
            return function(*args, **kwargs)

    return alone
