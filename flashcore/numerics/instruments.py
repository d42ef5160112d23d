"""Whether what judges and times is still what it was: clocks, comparisons, peers, and torch's settings.

A backend runs in the judge's own process. So it could put another function in the place of a clock, of a comparison or
of a peer, or leave torch with fewer threads than it found. What counts is remembered before any plug-in runs, looked at
again after each call that is judged, and put back.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from flashcore.errors import JudgeTampered
from flashcore.numerics import ambient

_NOTHING = object()
"""Stands for a name that is not there."""
CLOCKS = ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns")
TORCH = (
    "allclose", "argmax", "empty", "empty_like", "equal", "exp", "full_like", "isclose", "isfinite", "isnan", "log",
    "matmul", "maximum", "rand", "randn", "softmax", "where", "zeros", "zeros_like",
)  # fmt: skip
"""Functions of torch that the reference, the inputs and the comparison are made of."""
CUDA = ("Event", "CUDAGraph", "Stream", "graph")
CUDA_METHODS = {
    "Event": ("record", "elapsed_time", "synchronize", "query"),
    "CUDAGraph": ("replay", "capture_begin", "capture_end"),
    "Stream": ("synchronize", "wait_stream", "record_event"),
}

_INSTALLED = tuple(
    os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_OURS = str(Path(__file__).resolve().parent.parent) + os.sep
_JUDGES = f"{_OURS}measure"
"""The folder of what checks and times; the exploits, which lie in a folder within it, are no judges."""

_kept: dict[tuple[int, str], tuple[Any, str, Any]] = {}
"""By owner and name: the owner, the name in words, and what it stood for. The owners live as long as the process."""
_torch_is_kept = False


def trust(owner: Any, names: Sequence[str], where: str = "") -> None:
    """Remember what these names of a module or a class stand for now; one that was remembered before stays as it was.

    Only a module that trusts its own names while it is executed renews them, as when somebody reloads it.

    Parameters
    ----------
    where
        What the owner is called in a sentence; its own name when empty.
    """
    where = where or getattr(owner, "__qualname__", "") or owner.__name__
    caller = sys._getframe(1)
    renewed = caller.f_code.co_name == "<module>" and caller.f_globals is vars(owner)
    for name in names:
        kept = (owner, f"{where}.{name}", vars(owner).get(name, _NOTHING))
        if renewed:
            _kept[id(owner), name] = kept
        else:
            _kept.setdefault((id(owner), name), kept)


def remember() -> None:
    """Remember the clocks, and what torch and `numerics` judge with: called before any plug-in runs."""
    global _torch_is_kept
    if _torch_is_kept:
        return
    trust(time, CLOCKS)
    import torch

    from flashcore.numerics import reference, tolerance

    trust(tolerance, ("compare",))
    trust(reference, ("attention", "attention_same_precision"))
    trust(torch, TORCH)
    trust(torch.nn.functional, ("scaled_dot_product_attention", "softmax"), "torch.nn.functional")
    trust(torch.cuda, CUDA, "torch.cuda")
    for name, methods in CUDA_METHODS.items():
        trust(getattr(torch.cuda, name), methods, f"torch.cuda.{name}")
    # What a tensor has from C cannot be replaced, but a name in front of it hides it.
    trust(torch.Tensor, sorted({*dir(torch._C.TensorBase), *vars(torch.Tensor)} - {"__doc__"}), "torch.Tensor")
    _torch_is_kept = True


def changed() -> list[str]:
    """The names, in words, that do not stand for what they stood for."""
    return [
        words
        for (_, name), (owner, words, value) in list(_kept.items())
        if vars(owner).get(name, _NOTHING) is not value
    ]


def put_back() -> None:
    """Let every name stand for what it stood for again."""
    for (_, name), (owner, _, value) in list(_kept.items()):
        if vars(owner).get(name, _NOTHING) is value:
            continue
        if value is _NOTHING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


def _settings() -> dict[str, Any]:
    """Settings of torch that make other backends slower, with the call that puts each back.

    None of another thread's that is being held to one kernel: it puts back itself what it has set.
    """
    import torch

    cuda = torch.backends.cuda
    with ambient.choosing:
        return {
            "torch's number of threads": (torch.get_num_threads(), torch.set_num_threads),
            "torch's FlashAttention": (cuda.flash_sdp_enabled(), cuda.enable_flash_sdp),
            "torch's memory-efficient attention": (cuda.mem_efficient_sdp_enabled(), cuda.enable_mem_efficient_sdp),
            "torch's plain attention": (cuda.math_sdp_enabled(), cuda.enable_math_sdp),
            "torch's cuDNN attention": (cuda.cudnn_sdp_enabled(), cuda.enable_cudnn_sdp),
        }


# ------------------------------------------------------------------------------------------- whose threads go on


class _Watch:
    """A thread that is being watched, and which threads begin elsewhere meanwhile.

    What it did not hear of counts as begun by the watched thread: there are ways to begin one unheard.
    """

    def __init__(self):
        self._ident = threading.get_ident()
        self._others = set(threading.enumerate()) - {threading.current_thread()}
        """Those that were there before, and what they begin, and what that begins."""
        self._idents = set(sys._current_frames())

    def is_of(self, ident: int) -> bool:
        """Whether it watches this thread."""
        return ident == self._ident

    def hear(self, starter: int, thread: threading.Thread) -> None:
        """A thread begins another one."""
        if starter != self._ident and threading._active.get(starter) in self._others:
            self._others.add(thread)

    def working(self) -> list[str]:
        """Names of threads that the watched one began, that still run, and that run code of somebody's own.

        What an installed package starts for itself, such as a pool that compiles, is not meant; nor is another judge.
        """
        threads, frames = set(threading.enumerate()), sys._current_frames()
        names = dict.fromkeys(set(frames) - {one.ident for one in threads} - self._idents, "one without a name")
        names |= {one.ident: one.name for one in threads - self._others if one.ident != self._ident}
        return sorted(name for ident, name in names.items() if _is_somebodys_own(frames.get(ident)))


def _is_somebodys_own(frame: FrameType | None) -> bool:
    paths = []
    while frame is not None:
        paths.append(os.path.realpath(frame.f_code.co_filename))
        frame = frame.f_back
    own = any(not path.startswith(_INSTALLED) or path.startswith(_OURS) for path in paths)
    return own and not any(os.path.dirname(path) == _JUDGES for path in paths)


_turn = threading.RLock()
"""Held while a thread is watched: what a backend changes is the process's, and would be laid at the others' doors."""
_watches: list[_Watch] = []
"""Of the thread that has its turn, the outer ones first."""
_STARTS = tuple(name for name in ("_start_new_thread", "_start_joinable_thread") if hasattr(threading, name))
"""What `threading.Thread.start` calls, of which Python 3.13 has the second."""


def _in_a_child() -> None:
    """In a forked process the thread that was watched is not there, unless it forked."""
    global _turn
    _turn = threading.RLock()
    _watches[:] = [watch for watch in _watches if watch.is_of(threading.get_ident())]


os.register_at_fork(after_in_child=_in_a_child)


def _heard(start: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and each watch hears who begins which thread."""

    def begin(function: Any, *rest: Any, **named: Any) -> Any:
        thread = getattr(function, "__self__", None)
        if isinstance(thread, threading.Thread):
            for watch in tuple(_watches):
                watch.hear(threading.get_ident(), thread)
        return start(function, *rest, **named)

    return begin


@contextlib.contextmanager
def _hearing() -> Iterator[Callable[[], list[str]]]:
    """Inside, watches hear of threads that begin; gives what says whether a backend has stopped their ears.

    Only while somebody is watched, in whose time nothing but a backend runs: else `threading` is as Python has it.
    """
    if _watches:
        yield list
        return
    own = {name: getattr(threading, name) for name in _STARTS}
    ears = {name: _heard(start) for name, start in own.items()}
    for name, ear in ears.items():
        setattr(threading, name, ear)
    try:
        yield lambda: [f"threading.{name}" for name, ear in ears.items() if getattr(threading, name) is not ear]
    finally:
        for name, start in own.items():
            setattr(threading, name, start)


@contextlib.contextmanager
def watched(who: str) -> Iterator[None]:
    """Inside this context a backend runs; afterwards everything stands as it stood, or it is said what did not.

    A thread that it began and that goes on after the call is a finding too: its work is not in the time of the call,
    and it takes a core from whoever is timed next.

    One thread at a time is inside. What another one, which judges nothing, changes meanwhile is laid at the backend,
    since clocks, functions and torch's settings are the process's: judge where nothing else goes on.

    Raises
    ------
    JudgeTampered
        Something was changed, before or inside; it has been put back. Whatever the backend itself raised comes first.
    """
    with _turn:
        remember()
        if before := changed():
            put_back()
            raise JudgeTampered(None, before)
        settings = _settings()
        with _hearing() as deaf:
            watch = _Watch()
            _watches.append(watch)
            try:
                yield
                wrong = changed() + deaf()
                now = _settings()
                wrong += [f"{name} (from {value} to {now[name][0]})" for name, (value, _) in settings.items()
                          if now[name][0] != value]  # fmt: skip
                if (threads := watch.working()) or wrong:
                    raise JudgeTampered(who, wrong, threads[0] if threads else None)
            finally:
                _watches.remove(watch)
                put_back()
                for name, (value, _) in _settings().items():
                    before, put = settings[name]
                    if value != before:
                        put(before)
