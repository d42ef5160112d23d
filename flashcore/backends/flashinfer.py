"""`flashinfer`: FlashInfer's prefill of one sequence, where the user has installed it."""

from __future__ import annotations

import functools
import importlib
import math
import os
import shutil
from pathlib import Path

from flashcore.backends._contract import Availability, Backend
from flashcore.backends._peers import installed, on_hopper, readable, version_of, with_scale_above_zero
from flashcore.backends._registry import register
from flashcore.problem import Problem

MODULE = "flashinfer"
COMPILED = "flashinfer_jit_cache"
"""The package that holds its kernels compiled; without it they are compiled at the first call, by nvcc."""


@functools.cache
def _prefill():
    return importlib.import_module(MODULE).single_prefill_with_kv_cache


def _can_compile() -> bool:
    """Whether nvcc and ninja are where FlashInfer looks for them."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (
        Path(home, "bin", "nvcc").exists()
        if home
        else shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
    )
    return bool(nvcc) and shutil.which("ninja") is not None


@register
class FlashInfer(Backend):
    """FlashInfer for one sequence at a time; its causal mask is bottom-right aligned.

    Its functions for a batch take the rows of all sequences as one tensor. `[batch, heads, rows, head_dim]` would have
    to be copied into that form, and the copy would be timed with it.
    """

    id = "flashinfer"
    title = "FlashInfer, prefill of one sequence"
    role = "peer"
    device = "cuda"
    foreign = True
    head_dims = (64, 128, 256)

    def availability(self) -> Availability:
        if installed((MODULE,)) is None:
            return Availability(
                False, f"FlashInfer is not installed (no module '{MODULE}')", "pip install 'flashcore[peers]'"
            )
        if installed((COMPILED,)) is None and not _can_compile():
            return Availability(
                False, "FlashInfer has no compiled kernels here, and finds no nvcc and ninja to compile them",
                "install its package flashinfer-jit-cache, or a CUDA toolkit and ninja",
            )  # fmt: skip
        return on_hopper("FlashInfer", _prefill)

    def software(self) -> str | None:
        number = version_of(("flashinfer-python",)) if installed((MODULE,)) else None
        return f"flashinfer-python {number}" if number else None

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is None and problem.batch > 1:
            reason = "its batches are rows of all sequences in one tensor, and a copy into that would be timed with it"
        if reason is None and problem.causal and problem.seqlen_q > problem.seqlen_k:
            reason = "under a causal mask FlashInfer takes no more queries than keys"
        return reason

    def run(self, q, k, v, problem):
        return self._call(q, k, v, problem, with_lse=False), None

    def run_with_lse(self, q, k, v, problem):
        out, lse = self._call(q, k, v, problem, with_lse=True)
        # [rows, heads], to the base of 2: ln(x) = log2(x) ln(2).
        return out, (lse * math.log(2)).transpose(0, 1).unsqueeze(0).contiguous()

    def _call(self, q, k, v, problem: Problem, *, with_lse: bool):
        q, scale = with_scale_above_zero(q, problem.scale)
        # It takes [rows, heads, head_dim]; a transposed view costs nothing.
        q, k, v = (readable(t)[0].transpose(0, 1) for t in (q, k, v))
        result = _prefill()(q, k, v, causal=problem.causal, sm_scale=scale, kv_layout="NHD", return_lse=with_lse)
        out, lse = result if with_lse else (result, None)
        out = out.transpose(0, 1).unsqueeze(0)
        return (out, lse) if with_lse else out
