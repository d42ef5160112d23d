"""`fa3`: FlashAttention-3, where the user has installed it: built from source, or as a wheel by somebody else."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flashcore.backends._contract import Availability, Backend
from flashcore.backends._peers import (
    as_refusal,
    call_flash_attention,
    call_ragged,
    installed,
    on_hopper,
    version_of,
    with_empty_rows,
)
from flashcore.backends._registry import register
from flashcore.errors import Unsupported
from flashcore.problem import Problem

MODULES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn_3.flash_attn_interface")
"""What the module with its functions is called: by its own build, by the wheel `fa3-fwd`, and inside its package."""
CONFIGS = {
    "flash_attn_interface": "flash_attn_config",
    "fa3_fwd_interface": "fa3_fwd_config",
    "flash_attn_3.flash_attn_interface": "flash_attn_3.flash_attn_config",
}
"""The module, beside the one with the functions, that says what a build left out."""
DISTRIBUTIONS = {"fa3_fwd_interface": ("fa3-fwd",)}
LEFT_OUT = {"window": ("LOCAL", "windows"), "softcap": ("SOFTCAP", "softcaps"), "ragged": ("VARLEN", "ragged batches")}
"""What a build says that it was made without, by what we call it."""
HEAD_DIMS = (64, 96, 128, 192, 256)
"""What it compiles kernels for; a smaller head_dim runs on the next larger one."""


@functools.cache
def _interface() -> tuple[Callable[..., Any], bool]:
    """FlashAttention-3's function, and whether it has to be asked for `lse` (newer releases return `out` alone)."""
    function = importlib.import_module(installed(MODULES)).flash_attn_func
    return function, "return_attn_probs" in inspect.signature(function).parameters


@functools.cache
def _ragged() -> Callable[..., Any]:
    """FlashAttention-3's function for ragged batches."""
    try:
        return importlib.import_module(installed(MODULES)).flash_attn_varlen_func
    except AttributeError:
        raise Unsupported("fa3", "this build of FlashAttention-3 has no function for ragged batches") from None


@functools.cache
def _left_out() -> frozenset[str]:
    """What this build was made without, such as ``FP16`` or ``HDIM256``; empty where it does not say."""
    name = CONFIGS.get(installed(MODULES) or "")
    if name is None or installed((name,)) is None:
        return frozenset()
    try:
        flags = importlib.import_module(name).CONFIG["build_flags"]
    except Exception:  # another form of the file says nothing, and whoever calls is told by the kernel itself
        return frozenset()
    if not isinstance(flags, Mapping):
        return frozenset()
    return frozenset(str(flag).partition("_DISABLE_")[2] for flag, without in flags.items() if without)


@register
class FlashAttention3(Backend):
    """FlashAttention-3 of the flash-attention project, forward only; its causal mask is bottom-right aligned."""

    id = "fa3"
    title = "FlashAttention-3"
    role = "peer"
    device = "cuda"
    foreign = True
    masks = ("window", "softcap", "ragged")
    tanh_error = 2.0**-11

    def availability(self) -> Availability:
        if installed(MODULES) is None:
            return Availability(
                False, "FlashAttention-3 is not installed (no module 'flash_attn_interface' or 'fa3_fwd_interface')",
                "pip install 'flashcore[peers]', or build it from the flash-attention repository's 'hopper' folder",
            )  # fmt: skip
        return on_hopper("FlashAttention-3", _interface)

    def software(self) -> str | None:
        module = installed(MODULES)
        if module is None:
            return None
        found = DISTRIBUTIONS.get(module, ("flash-attn-3", "flash-attn-interface"))
        number = version_of(found)
        return f"{found[0]} {number}" if number else None

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is None and (problem.head_dim > 256 or problem.head_dim % 8):
            reason = "FlashAttention-3 takes a head_dim that is a multiple of 8, up to 256"
        if reason is None and problem.dtype == "float16" and "FP16" in _left_out():
            reason = "this build of FlashAttention-3 has no kernels for float16"
        if reason is None and f"HDIM{next(d for d in HEAD_DIMS if d >= problem.head_dim)}" in _left_out():
            reason = f"this build of FlashAttention-3 has no kernels for head_dim {problem.head_dim}"
        for name in problem.masks:
            flag, words = LEFT_OUT.get(name, ("", ""))
            if reason is None and flag in _left_out():
                reason = f"this build of FlashAttention-3 has no kernels for {words}"
        return reason

    def run(self, q, k, v, problem, masks=None):
        function, ask_for_lse = _interface()
        extra = {"return_attn_probs": True} if ask_for_lse else {}
        try:
            if problem.lengths == "ragged":
                return call_ragged(_ragged(), q, k, v, problem, masks, **extra)
            found = call_flash_attention(function, q, k, v, problem, **extra)
        except RuntimeError as error:  # a build may lack kernels without saying so anywhere else
            raise as_refusal(self.id, error) from error
        return with_empty_rows(*found, problem) if "window" in problem.masks else found
