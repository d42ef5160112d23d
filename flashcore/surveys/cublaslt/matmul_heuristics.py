"""Ask `nvidia-matmul-heuristics` for its prediction of a product: a second opinion that needs no GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from flashcore.gpu.cublaslt import Product

_LETTER = {"float16": "H", "bfloat16": "T", "float32": "S"}
_GPUS = (
    ("H200", "H200_SXM"), ("H100 PCIe", "H100_PCIE"), ("H100 NVL", "H100_NVL"), ("H100", "H100_SXM"),
    ("H20", "H20_SXM"), ("A100", "A100_SXM_80GB"), ("B200", "B200"),
)  # fmt: skip
"""Part of the name a driver gives a GPU, and what the library calls it; the first that fits counts."""


@dataclass(frozen=True)
class Prediction:
    """The configuration that the library puts first for a product."""

    tile: str
    """Rows x columns x depth of a thread block's tile."""
    cluster: str
    split_k: int
    latency_us: float
    """Its estimate of the time; it knows nothing of graphs, so small products come out several µs too long."""


def predict(product: Product, gpu: str | None) -> Prediction | None:
    """The library's first choice for a product on a GPU; None without the library, for an unknown GPU or no answer."""
    name = next((theirs for part, theirs in _GPUS if part in (gpu or "")), None)
    library = _library(name) if name else None
    if library is None:
        return None
    import nvMatmulHeuristics as nv

    layouts = nv.NvMatmulHeuristicsMatmulLayout
    layout = layouts.NT_ROW_MAJOR if product.transpose_b else layouts.NN_ROW_MAJOR
    precision = f"{_LETTER[product.dtype]}S{_LETTER[product.out_dtype]}"  # inputs, accumulation, output
    try:
        asked = library.makeNvMatmulHeuristicsProblem(product.m, product.n, product.k, layout, product.batch)
        answers = library.get(asked, 1, precision=precision)
    except Exception:  # a second opinion that does not come is no reason to stop a survey
        return None
    if not answers:
        return None
    kernel = answers[0]["kernel"]
    return Prediction(
        tile=f"{kernel.cta_tile_m}x{kernel.cta_tile_n}x{kernel.cta_tile_k}",
        cluster=f"{kernel.cluster_m}x{kernel.cluster_n}", split_k=int(kernel.split_k),
        latency_us=float(answers[0]["runtime"]) * 1e6,
    )  # fmt: skip


@functools.cache
def _library(gpu: str) -> Any:
    try:
        import nvMatmulHeuristics as nv

        return nv.NvMatmulHeuristicsInterfaceEx(
            backend=nv.NvMatmulHeuristicsTarget.CUTLASS3, gpu=nv.NvMatmulHeuristicsNvidiaGpu[gpu]
        )
    except Exception:  # not installed, no library for this platform, or an older one that does not know the GPU
        return None
