"""Launches of our kernels over pages: whether they can run on a device, and launches prepared once and kept."""

from __future__ import annotations

import functools
import importlib.util

import torch

from flashcore.errors import ToolMissing
from flashcore.gpu.build import header_dirs, nvrtc_version, source_version
from flashcore.gpu.launching import LoadedKernel, is_aligned, load_kernel

MOST_BLOCKS_ACROSS = 65535
"""What a grid has in its second and third dimension."""

_loaded: dict[tuple, LoadedKernel] = {}


@functools.lru_cache(maxsize=16)
def _runs_ours(index: int) -> bool:
    """Whether that GPU is one that the kernels are built for, and CuPy and a compiler are installed."""
    if torch.cuda.get_device_capability(index) != (9, 0) or importlib.util.find_spec("cupy") is None:
        return False
    try:
        return bool(nvrtc_version() and header_dirs())
    except ToolMissing:
        return False


def runs_ours(device: torch.device) -> bool:
    """Whether our kernels can be launched on that device, as the current one."""
    if device.type != "cuda" or device.index != torch.cuda.current_device():
        return False
    return _runs_ours(device.index)


def loaded(
    kernel: str, head_dim: int, dtype: torch.dtype, device: int, source: str | None, entry: str | None = None
) -> LoadedKernel | None:
    """The kernel in the GPU's memory, with the launch shape of `entry` (None for the function of the kernel's name).

    None when it would have to be brought there while a CUDA graph is captured.
    """
    wanted = (kernel, head_dim, str(dtype).removeprefix("torch."), False, source, device, (), entry)
    key = (*wanted, version(kernel, source))
    found = _loaded.get(key)
    if found is None and not torch.cuda.is_current_stream_capturing():
        found = _loaded[key] = load_kernel(*wanted)
    return found


def version(kernel: str, source: str | None = None) -> str:
    """What is to run: `source` where one is given, or a name for the text of the kernel's file as it is now."""
    return source if source is not None else source_version(kernel)


def copies_whole(tensor: torch.Tensor) -> bool:
    """Whether every row lies together and starts at a multiple of the 16 bytes that a thread copies at a time."""
    return tensor.stride(-1) == 1 and is_aligned(tensor)


def table_fits(page_table: torch.Tensor, lengths: torch.Tensor) -> bool:
    """Whether these are int32 ``[batch, max_pages]`` and ``[batch]`` that a kernel can read, and not empty."""
    return (
        page_table.dtype == lengths.dtype == torch.int32
        and page_table.dim() == 2
        and page_table.numel() > 0
        and lengths.shape == page_table.shape[:1]
        and (page_table.stride(1) == 1 or page_table.shape[1] == 1)
        and (lengths.stride(0) == 1 or lengths.shape[0] == 1)
    )
