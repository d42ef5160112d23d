"""Measure what this machine can do at best, so that every other figure can be compared with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from flashcore.gpu.device import gpu_name, has_gpu
from flashcore.measure.cluster import Pool, Task, perform
from flashcore.numerics import ambient
from flashcore.records import RunFolder, Trial

REPEATS = 15
MATRIX = 8192
"""Side of the square product: large enough that its time is the Tensor Cores' and nothing else."""
NODES = 1000
LAUNCHES = 500


def ceilings(run: RunFolder, *, pool: Pool | None = None) -> list[Trial]:
    """Measure and record this machine's ceilings, one `ceiling` trial each; with a pool, those of one of its cards.

    GPU: device-to-device copy (TB/s, bytes read plus written), fp16 and bf16 matrix products on random data (TFLOPS),
    an empty kernel inside a graph and the host time of one launch (µs). CPU: memory copy (GB/s) and an fp32 product
    (TFLOPS).
    """
    return perform([Task("ceilings", measured, timing=True, owed=({"kind": "ceiling"},))], run=run, pool=pool)[0]


@ambient.judging
def measured() -> list[Trial]:
    """The ceilings of the card, or CPU, that this process works on."""
    return [Trial(kind="ceiling", data=data) for data in (_gpu() if has_gpu() else _cpu())]


def _ceiling(name: str, value: float, unit: str, method: str, where: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "method": method, "device": where}


def gpu_ms(call: Callable[[], Any]) -> float:
    """Median time of a call on the GPU in milliseconds, by events, after three warm-ups."""
    for _ in range(3):
        call()
    taken = []
    for _ in range(REPEATS):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        call()
        after.record()
        after.synchronize()
        taken.append(before.elapsed_time(after))
    return statistics.median(taken)


def _host_s(call: Callable[[], Any]) -> float:
    """Median time of a call on the host in seconds, after one warm-up."""
    call()
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _gpu() -> list[dict[str, Any]]:
    where = gpu_name() or "gpu"
    found = [_copy_bandwidth(where)]
    for dtype, name in ((torch.float16, "matmul_fp16"), (torch.bfloat16, "matmul_bf16")):
        a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype) for _ in range(2))
        tflops = 2 * MATRIX**3 / gpu_ms(lambda a=a, b=b: a @ b) / 1e9
        method = f"{MATRIX} x {MATRIX} x {MATRIX} product of random normal data, median of {REPEATS}"
        found.append(_ceiling(name, tflops, "TFLOPS", method, where))
    found += _launches(where)
    torch.cuda.empty_cache()
    return found


def _copy_bandwidth(where: str) -> dict[str, Any]:
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    value = 2 * source.numel() / gpu_ms(lambda: target.copy_(source)) / 1e9
    method = f"2 GiB device-to-device copy, bytes read plus written, median of {REPEATS}"
    return _ceiling("copy_bandwidth", value, "TB/s", method, where)


def _launches(where: str) -> list[dict[str, Any]]:
    """What a kernel costs at the least: as a node of a graph on the GPU, and as an eager call on the host."""
    one = torch.zeros(1, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        one.add_(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(NODES):
                one.add_(1)
    node_us = gpu_ms(graph.replay) * 1e3 / NODES
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(LAUNCHES):
        one.add_(1)
    launch_us = (time.perf_counter() - started) * 1e6 / LAUNCHES
    torch.cuda.synchronize()
    return [
        _ceiling("graph_node", node_us, "us", f"one-element kernel, {NODES} of them in a CUDA graph", where),
        _ceiling("launch_overhead", launch_us, "us", f"host time of an eager torch call, mean of {LAUNCHES}", where),
    ]


def _cpu() -> list[dict[str, Any]]:
    source = torch.rand(64 << 20)
    target = torch.empty_like(source)
    bandwidth = 8 * source.numel() / _host_s(lambda: target.copy_(source)) / 1e9
    size = 1024
    a, b = torch.rand(size, size), torch.rand(size, size)
    tflops = 2 * size**3 / _host_s(lambda: a @ b) / 1e12
    return [
        _ceiling(
            "copy_bandwidth", bandwidth, "GB/s", "256 MiB memory copy, bytes read plus written, median of 5", "cpu"
        ),
        _ceiling("matmul_fp32", tflops, "TFLOPS", f"{size} x {size} x {size} float32 product, median of 5", "cpu"),
    ]
