"""What the checks and the bounds ask of keys and values in pages: the sizes, pools and tables, whoever holds them.

`PagedKV` is what callers pass; the modules that it is built on need no more than this, so they do not import it.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Pages(Protocol):
    """Two pools, a page table and lengths, as `flashcore.paging.PagedKV` describes them."""

    k_pool: torch.Tensor
    v_pool: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor
    batch: int
    num_pages: int
    max_pages: int
    page_size: int
    num_heads_kv: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def used_pages(self) -> torch.Tensor:
        """``[batch]`` int32: logical pages that each sequence's length takes."""
