"""Backend `cublaslt-paged`: cuBLASLt's products over pages, sequence by sequence, for comparison."""

from __future__ import annotations

from flashcore import backends
from flashcore.problem import square


def test_it_is_cublaslt_over_pages_and_is_not_timed_on_dense_tensors():
    paged, dense = backends.get("cublaslt-paged"), backends.get("cublaslt")
    assert paged.kernel == dense.kernel and paged.paged and not paged.dense and not dense.paged
    assert paged.rounds_scores and paged.traceable, "its stages are those of cublaslt, 16-bit scores among them"


def test_it_takes_what_cublaslt_takes_and_no_selection_of_pages():
    paged = backends.get("cublaslt-paged")
    assert paged.why_not_paged(square(1, 2, 256, 64)) is None
    assert "float32" in paged.why_not(square(1, 2, 256, 64, dtype="float32"))
    assert paged.why_not_paged(square(1, 2, 256, 64), selected=True)
