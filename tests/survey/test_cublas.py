"""cuBLAS without Lt, the peer: what it is called with, and what its refusal becomes."""

from __future__ import annotations

import pytest

from flashcore.errors import CublasLtError
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Product


def test_cublas_is_called_with_the_transposed_product(monkeypatch):
    from flashcore.survey import cublas

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
