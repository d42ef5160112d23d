"""Backend `hopper`: tensor copies and warpgroup products (TMA and wgmma)."""

from __future__ import annotations

import functools

import torch

from flashcore.backends import register
from flashcore.backends._cuda import CudaBackend
from flashcore.backends._launch import LoadedKernel
from flashcore.backends._tensor_maps import tensor_map
from flashcore.problem import Problem

WARPGROUP_ROWS = 64
"""Query rows of one warpgroup, which loads its own: the M of wgmma."""


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@register
class Hopper(CudaBackend):
    """`kernels/attention_hopper.cu`."""

    id = "hopper"
    title = "Our Hopper kernel: TMA, wgmma"
    kernel = "attention_hopper"

    def arguments(self, q, k, v, out, lse, problem: Problem, loaded: LoadedKernel) -> list[bytes]:
        def described(name: str, tensor: torch.Tensor, rows: int) -> bytes:
            strides = self.strides(name, tensor)
            return tensor_map(tensor.data_ptr(), tensor.shape, strides, rows=rows, dtype=problem.dtype, name=name)

        return [
            self.params(q, k, v, out, lse, problem),
            described("q", q, WARPGROUP_ROWS),
            described("k", k, loaded.tile_n),
            described("v", v, loaded.tile_n),
        ]

    def blocks(self, problem: Problem, loaded: LoadedKernel, device: int) -> int:
        """One block a multiprocessor, which takes one tile after the other."""
        return min(super().blocks(problem, loaded, device), _multiprocessors(device))
