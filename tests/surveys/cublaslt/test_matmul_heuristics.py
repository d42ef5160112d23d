"""The second opinion on a product, which needs no GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from flashcore.gpu.cublaslt import Product
from flashcore.surveys.cublaslt import matmul_heuristics

QK = Product(2048, 128, 64, transpose_b=True)


def test_matmul_heuristics_predicts_on_the_cpu_for_a_known_gpu():
    pytest.importorskip("nvMatmulHeuristics")
    found = matmul_heuristics.predict(QK, "NVIDIA H200")
    assert found.split_k >= 1 and found.latency_us > 0
    assert len([int(side) for side in found.tile.split("x")]) == 3
    assert matmul_heuristics.predict(QK, None) is None and matmul_heuristics.predict(QK, "Another GPU") is None


class Library:
    """A library of invented answers, which notes what it is asked."""

    def __init__(self, answers):
        self.answers, self.asked = answers, None

    def makeNvMatmulHeuristicsProblem(self, *asked):
        self.asked = asked
        return "problem"

    def get(self, problem, count, precision):
        self.asked = (*self.asked, count, precision)
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


@pytest.fixture
def library(monkeypatch):
    """Give the answers; what is asked of them stands in the library that comes back."""
    layouts = SimpleNamespace(NT_ROW_MAJOR="NT", NN_ROW_MAJOR="NN")
    stand_in = SimpleNamespace(NvMatmulHeuristicsMatmulLayout=layouts)
    monkeypatch.setitem(sys.modules, "nvMatmulHeuristics", stand_in)

    def put(answers):
        made = Library(answers)
        monkeypatch.setattr(matmul_heuristics, "_library", lambda gpu: names.append(gpu) or made)
        return made

    names = put.names = []
    return put


def test_the_answer_is_read_and_seconds_become_microseconds(library):
    kernel = SimpleNamespace(cta_tile_m=64, cta_tile_n=128, cta_tile_k=32, cluster_m=2, cluster_n=1, split_k=3)
    made = library([{"kernel": kernel, "runtime": 12.5e-6}])
    found = matmul_heuristics.predict(QK, "NVIDIA H100 80GB HBM3")
    assert (found.tile, found.cluster, found.split_k) == ("64x128x32", "2x1", 3)
    assert found.latency_us == pytest.approx(12.5)
    assert made.asked == (2048, 128, 64, "NT", 1, 1, "HSH")
    plain = Product(8, 16, 32, batch=4, dtype="bfloat16", out_dtype="float32")
    matmul_heuristics.predict(plain, "NVIDIA H200")
    assert made.asked == (8, 16, 32, "NN", 4, 1, "TSS")


@pytest.mark.parametrize("answers", [[], RuntimeError("no kernel fits")])
def test_no_answer_is_no_prediction(library, answers):
    library(answers)
    assert matmul_heuristics.predict(QK, "NVIDIA H200") is None


def test_a_gpu_is_known_by_the_most_particular_name(library):
    library([])
    for name in ("NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3", "NVIDIA H20"):
        matmul_heuristics.predict(QK, name)
    assert library.names == ["H200_SXM", "H100_PCIE", "H100_NVL", "H100_SXM", "H20_SXM"]
