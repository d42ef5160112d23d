"""cuBLAS without Lt, the peer: what it is called with, and what its refusal becomes."""

from __future__ import annotations

import ctypes
import sys

import pytest

from flashcore.errors import CublasLtError, ToolMissing
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Product
from flashcore.surveys.cublaslt import cublas


def test_cublas_is_called_with_the_transposed_product(monkeypatch):
    class Library:
        cuBLASError = RuntimeError
        calls: list = []

        def set_stream(self, *arguments):
            self.calls.append("stream")

        def set_workspace(self, *arguments):
            self.calls.append("workspace")

        def gemm_strided_batched_ex(self, *arguments):
            self.calls.append(arguments)

    library = Library()
    monkeypatch.setattr(cublas, "_library", lambda: (library, 7))
    product = Product(2048, 128, 64, batch=3, transpose_b=True, out_dtype="float32", row_b=72)
    cublas.Call(product).run(1, 2, 3, stream=4, workspace=5, workspace_bytes=6)
    assert library.calls[:2] == ["stream", "workspace"], "setting the stream resets the workspace"
    handle, first, second, m, n, k, _, b, _, ldb, next_b, a, _, lda, _, _, d, kind, ldd, _, batch, _, _ = library.calls[
        2
    ]
    assert (handle, first, second, m, n, k) == (7, cublaslt.OP_T, cublaslt.OP_N, 128, 2048, 64)
    assert (b, ldb, next_b, a, lda, d, ldd, batch, kind) == (2, 72, 128 * 72, 1, 64, 3, 128, 3, 0)

    def refuse(*arguments):
        raise RuntimeError("CUBLAS_STATUS_INVALID_VALUE")

    monkeypatch.setattr(library, "gemm_strided_batched_ex", refuse)
    with pytest.raises(CublasLtError, match="cublasGemmStridedBatchedEx gave CUBLAS_STATUS_INVALID_VALUE"):
        cublas.Call(product).run(1, 2, 3, stream=4, workspace=5, workspace_bytes=6)


def test_a_product_as_it_lies_is_not_transposed_and_its_scalars_are_handed_over(monkeypatch):
    seen = {}

    class Library:
        cuBLASError = RuntimeError
        set_stream = set_workspace = staticmethod(lambda *arguments: None)

        @staticmethod
        def gemm_strided_batched_ex(*arguments):
            seen["operations"], seen["kinds"] = arguments[1:3], (arguments[8], arguments[12], arguments[17])
            seen["alpha"], seen["beta"] = (
                ctypes.cast(arguments[at], ctypes.POINTER(ctypes.c_float))[0] for at in (6, 15)
            )
            seen["compute"], seen["algorithm"] = arguments[-2:]

    monkeypatch.setattr(cublas, "_library", lambda: (Library, 7))
    product = Product(2048, 64, 128, dtype="bfloat16", out_dtype="float32")
    cublas.Call(product, alpha=0.5, beta=1.0).run(1, 2, 3, stream=4, workspace=5, workspace_bytes=6)
    half, whole = cublaslt.CUDA_TYPE["bfloat16"], cublaslt.CUDA_TYPE["float32"]
    assert seen == {
        "operations": (cublaslt.OP_N, cublaslt.OP_N), "kinds": (half, half, whole), "alpha": 0.5, "beta": 1.0,
        "compute": cublaslt.COMPUTE_32F, "algorithm": cublas.GEMM_DEFAULT,
    }  # fmt: skip


def test_without_the_bindings_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvmath.bindings", None)
    cublas._library.cache_clear()
    with pytest.raises(ToolMissing, match=r"cuBLAS .*flashcore\[gpu\]"):
        cublas.Call(Product(8, 8, 8)).run(1, 2, 3, stream=0, workspace=0, workspace_bytes=0)
