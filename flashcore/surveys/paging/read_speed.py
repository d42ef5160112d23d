"""Measure how fast device memory is read when nothing else is done: the floor under every decode kernel's time."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch

from flashcore.errors import FlashCoreError
from flashcore.gpu import build, device, profiling
from flashcore.records import Ledger, RunFolder, Trial, digits

NAME = "read_bandwidth"
BYTES = 2 << 30
BYTES_ON_CPU = 64 << 20
BLOCKS_PER_SM = (2, 4, 8, 16)
THREADS = 512
CALLS, REPEATS = 4, 15
SOURCE = """
// Reads `count` pieces of 16 bytes once, 8 loads of a thread in flight, and writes nothing.
// A copy writes as much as it reads, and a reduction of torch's spends time on sums: neither is a floor.
extern "C" __global__ void __launch_bounds__(512) read_all(
    const uint4* __restrict__ data_gmem, unsigned long long count, unsigned int* never_gmem) {
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned int seen = 0;
  for (; i + 7 * step < count; i += 8 * step) {
    uint4 piece[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) piece[j] = __ldcs(data_gmem + i + j * step);
#pragma unroll
    for (int j = 0; j < 8; ++j) seen ^= piece[j].x ^ piece[j].y ^ piece[j].z ^ piece[j].w;
  }
  for (; i < count; i += step) {
    const uint4 piece = __ldcs(data_gmem + i);
    seen ^= piece.x ^ piece.y ^ piece.z ^ piece.w;
  }
  if (seen == 0x5eed5eedu) never_gmem[0] = seen;  // the compiler may not drop the loads
}
"""


def read_speed(run: RunFolder | Ledger) -> Trial:
    """The run's record of pure read speed, a `ceiling` in TB/s; measured unless the run has it already."""
    known = [t for t in run.trials(kind="ceiling", status="ok") if t.data.get("name") == NAME]
    if known:
        return known[-1]
    value, method = _on_gpu() if device.has_gpu() else _on_cpu()
    data = {"name": NAME, "value": digits(value, 5), "unit": "TB/s", "method": method,
            "device": device.gpu_name() or "cpu"}  # fmt: skip
    return run.append(Trial(kind="ceiling", data=data))


def _on_gpu() -> tuple[float, str]:
    data = torch.zeros(BYTES, dtype=torch.uint8, device="cuda")  # written once, so that its pages are there
    try:
        speeds = {blocks: _kernel_tbs(data, blocks) for blocks in BLOCKS_PER_SM}
    except (FlashCoreError, ImportError) as error:
        whole = data.view(torch.int64)
        value = BYTES / profiling.graph_us(lambda _: torch.sum(whole), calls=CALLS, rounds=REPEATS) / 1e6
        return value, f"2 GiB added up by torch, median of {REPEATS}; no read kernel here ({type(error).__name__})"
    best = max(speeds, key=speeds.get)
    return speeds[best], (
        f"2 GiB read once by 16-byte loads and nothing written, best of {len(speeds)} grids ({best} blocks of "
        f"{THREADS} threads an SM), CUDA graph, median of {REPEATS}"
    )


@functools.cache
def _kernel() -> Any:
    """The read kernel, compiled as ours are, loaded on the current GPU."""
    import cupy

    entry = build.compile_text("read_all", SOURCE).path
    return cupy.RawModule(path=str(entry)).get_function("read_all")


def _kernel_tbs(data: torch.Tensor, blocks_per_sm: int) -> float:
    import numpy as np

    from flashcore.gpu.launching import launch

    never = torch.zeros(1, dtype=torch.int32, device="cuda")
    blocks = blocks_per_sm * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    arguments = [np.uint64(data.data_ptr()), np.uint64(data.numel() // 16), np.uint64(never.data_ptr())]

    def call(stream: int) -> None:
        launch(_kernel(), blocks, THREADS, arguments, stream=stream)

    return data.numel() / profiling.graph_us(call, calls=CALLS, rounds=REPEATS) / 1e6


def _on_cpu() -> tuple[float, str]:
    data = torch.zeros(BYTES_ON_CPU // 8, dtype=torch.int64)
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        torch.sum(data)
        taken.append(time.perf_counter() - started)
    return BYTES_ON_CPU / statistics.median(taken[1:]) / 1e12, "64 MiB added up by torch on the CPU, median of 3"
