"""`fa3`: FlashAttention-3, where the user has built and installed it. Never installed by FlashCore."""

from __future__ import annotations

import functools
import importlib.util

from flashcore.backends._contract import AVAILABLE, Availability, Backend
from flashcore.backends._peers import readable, with_scale_above_zero
from flashcore.backends._registry import register
from flashcore.problem import Problem


@functools.cache
def _interface():
    """FlashAttention-3's function, and whether it has to be asked for `lse` (newer releases return `out` alone)."""
    import inspect

    from flash_attn_interface import flash_attn_func

    return flash_attn_func, "return_attn_probs" in inspect.signature(flash_attn_func).parameters


@register
class FlashAttention3(Backend):
    """FlashAttention-3 of the flash-attention project, forward only; its causal mask is bottom-right aligned."""

    id = "fa3"
    title = "FlashAttention-3"
    role = "peer"
    device = "cuda"

    def availability(self) -> Availability:
        if importlib.util.find_spec("flash_attn_interface") is None:
            return Availability(False, "FlashAttention-3 is not installed (no module 'flash_attn_interface')",
                                "build it from the flash-attention repository's 'hopper' folder")  # fmt: skip
        import torch

        if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
            return Availability(False, "FlashAttention-3 needs a Hopper GPU", "run on an H100 or H200")
        return AVAILABLE

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is None and (problem.head_dim > 256 or problem.head_dim % 8):
            reason = "FlashAttention-3 takes a head_dim that is a multiple of 8, up to 256"
        return reason

    def run(self, q, k, v, problem):
        function, ask_for_lse = _interface()
        extra = {"return_attn_probs": True} if ask_for_lse else {}
        q, scale = with_scale_above_zero(q, problem.scale)
        q, k, v = readable(q), readable(k), readable(v)
        # It takes [B, S, H, D]; a transposed view costs nothing.
        result = function(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            softmax_scale=scale, causal=problem.causal, **extra,
        )  # fmt: skip
        out, lse = (result[0], result[1]) if isinstance(result, (tuple, list)) else (result, None)
        return out.transpose(1, 2), lse
