"""Run a product through cuBLAS without Lt (`cublasGemmStridedBatchedEx`), which chooses its kernel itself."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from flashcore.errors import CublasLtError, ToolMissing
from flashcore.gpu.cublaslt import COMPUTE_32F, CUDA_TYPE, OP_N, OP_T, Product

CALL = "cublasGemmStridedBatchedEx"
GEMM_DEFAULT = -1
"""cublasGemmAlgo_t CUBLAS_GEMM_DEFAULT: cuBLAS' own heuristic."""
WORKSPACE_BYTES = 32 << 20
"""What cuBLAS' documentation recommends for Hopper; given to it by hand, so that a graph may be captured."""


@functools.cache
def _library() -> Any:
    try:
        from nvmath.bindings import cublas

        return cublas, cublas.create()
    except Exception as error:  # the bindings raise their own kinds when the shared library is not there
        raise ToolMissing("cuBLAS (through nvmath-python)", "pip install 'flashcore[gpu]'") from error


class Call:
    """A product bound to cuBLAS' own choice of kernel; `run` launches it. Row-major, as `Product` says."""

    def __init__(self, product: Product, *, alpha: float = 1.0, beta: float = 0.0):
        self.product = product
        self._scalars = np.array([alpha, beta], np.float32)

    def run(self, a: int, b: int, d: int, *, stream: int, workspace: int, workspace_bytes: int) -> None:
        """Launch on `stream`; pointers are device addresses of the first elements of A, B and D.

        Raises
        ------
        CublasLtError
            cuBLAS returned anything but success.
        """
        cublas, handle = _library()
        p, scalars = self.product, self._scalars.ctypes.data
        kind, out_kind = CUDA_TYPE[p.dtype], CUDA_TYPE[p.out_dtype]
        try:
            cublas.set_stream(handle, stream)  # before the workspace, which it resets
            cublas.set_workspace(handle, workspace, workspace_bytes)
            # A row-major matrix is its transpose in column-major order, and D^T = B^T A^T.
            cublas.gemm_strided_batched_ex(
                handle, OP_T if p.transpose_b else OP_N, OP_N, p.n, p.m, p.k, scalars, b, kind, p.row_b, p.next_b,
                a, kind, p.row_a, p.next_a, scalars + 4, d, out_kind, p.row_d, p.next_d, p.batch, COMPUTE_32F,
                GEMM_DEFAULT,
            )  # fmt: skip
        except cublas.cuBLASError as error:
            raise CublasLtError(CALL, str(error), p.label()) from None
