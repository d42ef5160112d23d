"""The second opinion on a product, which needs no GPU."""

from __future__ import annotations

import pytest

from flashcore.gpu.cublaslt import Product
from flashcore.survey import matmul_heuristics

QK = Product(2048, 128, 64, transpose_b=True)


def test_matmul_heuristics_predicts_on_the_cpu_for_a_known_gpu():
    pytest.importorskip("nvMatmulHeuristics")
    found = matmul_heuristics.predict(QK, "NVIDIA H200")
    assert found.split_k >= 1 and found.latency_us > 0
    assert len([int(side) for side in found.tile.split("x")]) == 3
    assert matmul_heuristics.predict(QK, None) is None and matmul_heuristics.predict(QK, "Another GPU") is None
