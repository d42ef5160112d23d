"""`fa4`: FlashAttention-4, the form of FlashAttention in CuTe's Python language, where the user has installed it."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from flashcore.backends._contract import Availability, Backend
from flashcore.backends._peers import (
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

MODULE = "flash_attn.cute"
DISTRIBUTIONS = ("flash-attn-4", "fa4")
COMPILER = "cutlass"
"""The module of nvidia-cutlass-dsl, which compiles its kernels at the first call of each kind."""


@functools.cache
def _interface() -> tuple[Callable[..., Any], bool]:
    """FlashAttention-4's function, and whether it has to be asked for `lse` (older releases always return it)."""
    function = importlib.import_module(MODULE).flash_attn_func
    return function, "return_lse" in inspect.signature(function).parameters


@functools.cache
def _ragged() -> tuple[Callable[..., Any], frozenset[str]]:
    """FlashAttention-4's function for ragged batches, and the words that it knows, which have grown in number."""
    function = getattr(importlib.import_module(MODULE), "flash_attn_varlen_func", None)
    if function is None:
        raise Unsupported("fa4", "this release of FlashAttention-4 has no function for ragged batches")
    return function, frozenset(inspect.signature(function).parameters)


@register
class FlashAttention4(Backend):
    """FlashAttention-4, forward only; its causal mask is bottom-right aligned."""

    id = "fa4"
    title = "FlashAttention-4"
    role = "peer"
    device = "cuda"
    foreign = True
    masks = ("window", "softcap", "sink", "ragged")
    tanh_error = 2.0**-11

    def availability(self) -> Availability:
        if installed((MODULE,)) is None:
            return Availability(
                False, f"FlashAttention-4 is not installed (no module '{MODULE}')", "pip install 'flashcore[peers]'"
            )
        if installed((COMPILER,)) is None:
            return Availability(
                False, f"FlashAttention-4 lacks its compiler (no module '{COMPILER}')", "pip install nvidia-cutlass-dsl"
            )
        return on_hopper("FlashAttention-4", _interface)

    def software(self) -> str | None:
        number = version_of(DISTRIBUTIONS) if installed((MODULE,)) else None
        return f"flash-attn-4 {number}" if number else None

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is None and (problem.head_dim > 256 or problem.head_dim % 8):
            reason = "FlashAttention-4 takes a head_dim that is a multiple of 8, up to 256"
        return reason

    def run(self, q, k, v, problem, masks=None):
        # It takes sinks of bfloat16 alone; to round a number a head is less than a thousandth of a call's time.
        sink = {"learnable_sink": masks.sink.bfloat16()} if problem.sink else {}
        if problem.lengths == "ragged":
            function, words = _ragged()
            extra = {"return_lse": True} if "return_lse" in words else {}
            longest = "max_seqlen_q" in words
            return call_ragged(function, q, k, v, problem, masks, no_limit=None, longest=longest, **sink, **extra)
        function, ask_for_lse = _interface()
        extra = {"return_lse": True} if ask_for_lse else {}
        # What rows that see no key get is not promised, as with FlashAttention-2.
        found = call_flash_attention(function, q, k, v, problem, no_limit=None, **sink, **extra)
        return with_empty_rows(*found, problem, masks)
