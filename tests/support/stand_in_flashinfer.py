"""A module that takes FlashInfer's calls for pages and computes them in float64: what it is planned for, it gives."""

from __future__ import annotations

import math
import types

import torch


class _Wrapper:
    """Keeps a plan in FlashInfer's words: where the pages of each sequence begin, all pages, tokens in the last."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, **options):
        assert workspace.dtype == torch.uint8 and workspace.numel() >= 128 << 20 and kv_layout == "HND"
        self.options = options

    def keep(self, queries, begin, pages, last, heads_q, heads_kv, head_dim, page_size, *, causal=False, sm_scale,
             q_data_type, kv_data_type):  # fmt: skip
        assert begin.dtype == pages.dtype == last.dtype == torch.int32
        assert q_data_type == kv_data_type and len(pages) == begin[-1] and bool((last > 0).all())
        self.heads, self.head_dim, self.page_size = (heads_q, heads_kv), head_dim, page_size
        self.queries, self.begin, self.pages, self.last = queries, begin.tolist(), pages.long(), last.tolist()
        self.causal, self.scale = causal, sm_scale

    def run(self, q: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor], return_lse: bool = False):
        assert q.is_contiguous() and q.shape[1:] == (self.heads[0], self.head_dim)
        assert pools[0].shape[1:] == (self.heads[1], self.page_size, self.head_dim)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        for row, last in enumerate(self.last):
            pages = self.pages[self.begin[row] : self.begin[row + 1]]
            keys = (len(pages) - 1) * self.page_size + last
            k, v = (pool[pages].transpose(0, 1).flatten(1, 2)[:, :keys].double() for pool in pools)
            k, v = (t.repeat_interleave(self.heads[0] // self.heads[1], 0) for t in (k, v))
            mine = slice(int(self.queries[row]), int(self.queries[row + 1]))
            scores = q[mine].double().transpose(0, 1) @ k.mT * self.scale
            if self.causal:
                tokens = scores.shape[1]
                ahead = torch.ones(tokens, keys, dtype=torch.bool).triu(keys - tokens + 1)
                scores = scores.masked_fill(ahead, -math.inf)
            out[mine] = (scores.softmax(-1) @ v).transpose(0, 1).to(q.dtype)
            lse[mine] = scores.logsumexp(-1).T.float()
        return (out, lse) if return_lse else out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(self, workspace, kv_layout, *, use_tensor_cores: bool):
        super().__init__(workspace, kv_layout, use_tensor_cores=use_tensor_cores)

    def plan(self, begin, pages, last, *sizes, **options):
        self.keep(torch.arange(len(last) + 1), begin, pages, last, *sizes, **options)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(self, queries, *rest, **options):
        assert queries.dtype == torch.int32
        self.keep(queries, *rest, **options)


class MultiLevelCascadeAttentionWrapper:
    def __init__(self, levels: int, workspace, kv_layout):
        self.levels = [BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout) for _ in range(levels)]

    def plan(self, queries, begins, pages, lasts, *sizes, **options):
        for level, *rest in zip(self.levels, queries, begins, pages, lasts, strict=True):
            level.plan(*rest, *sizes, **options)

    def run(self, q, pools):
        parts = [level.run(q, pools, return_lse=True) for level in self.levels]
        whole = torch.stack([lse for _, lse in parts]).logsumexp(0)
        return sum(out.double() * (lse - whole).exp()[..., None] for out, lse in parts).to(q.dtype)


def module() -> types.SimpleNamespace:
    """The package, as far as paging asks it."""
    return types.SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
        MultiLevelCascadeAttentionWrapper=MultiLevelCascadeAttentionWrapper, __spec__=None,
    )  # fmt: skip


def install(monkeypatch) -> None:
    """Let it be there, on a machine without a GPU too."""
    import sys

    from flashcore import backends
    from flashcore.backends import AVAILABLE

    monkeypatch.setitem(sys.modules, "flashinfer", module())
    monkeypatch.setattr(type(backends.get("flashinfer")), "availability", lambda self: AVAILABLE)
