"""Call FlashInfer over the same pages: planned once and ahead, since only its `run` belongs to a decode step."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashcore import backends
from flashcore.errors import Unsupported
from flashcore.paging import PagedKV
from flashcore.problem import Problem
from flashcore.surveys.paging.serving_facts import CUDA, SEVERAL, TENSOR

NAME = "flashinfer"
"""The backend of one sequence's prefill, which knows whether the package works here and what it is called."""
WORKSPACE = 256 << 20
"""Bytes; it keeps the parts of split sequences there, and recommends half as much."""

Call = Callable[[int], tuple[torch.Tensor, None]]


def planned(
    variant: str, qs: Sequence[torch.Tensor], caches: Sequence[PagedKV], problem: Problem, *, prefix: int = 0
) -> Call:
    """A call of one of FlashInfer's kernels on queries and cache number i, whose plans have been made.

    Parameters
    ----------
    variant
        By its name in `serving_facts`: `TENSOR` or `CUDA` for one query token, `SEVERAL` for a few, `CASCADE` for one
        over pages that all share.
    qs, caches
        Of each set: ``[batch, num_heads_q, q_tokens, head_dim]``, and pages in which nothing was dropped.
    prefix
        Tokens in the pages that all sequences share, for `CASCADE`.

    Raises
    ------
    BackendUnavailable
        FlashInfer is not installed, or does not work here.
    Unsupported
        It has no kernel for this head_dim.
    """
    backend = backends.get(NAME)
    backend.require()
    if problem.head_dim not in backend.head_dims:
        raise Unsupported(NAME, f"head_dim {problem.head_dim} is not among {', '.join(map(str, backend.head_dims))}")
    module = importlib.import_module(NAME)
    # Zeros, since some of its kernels count in there; calls on one stream take turns, so that all share it.
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=caches[0].device)
    wrappers = [_planned(module, variant, workspace, cache, problem, prefix) for cache in caches]
    rows = [q.transpose(1, 2).flatten(0, 1).contiguous() for q in qs]  # it takes [tokens of all, heads, head_dim]

    def call(i: int) -> tuple[torch.Tensor, None]:
        out = wrappers[i].run(rows[i], (caches[i].k_pool, caches[i].v_pool))
        return out.unflatten(0, (problem.batch, problem.seqlen_q)).transpose(1, 2), None

    return call


def _planned(module: Any, variant: str, workspace: torch.Tensor, cache: PagedKV, problem: Problem, prefix: int) -> Any:
    """One of its wrappers, planned for this table and these lengths."""
    sizes = (problem.num_heads_q, problem.num_heads_kv, problem.head_dim, cache.page_size)
    options = {"sm_scale": problem.scale, "q_data_type": cache.dtype, "kv_data_type": cache.dtype}
    device, tokens = cache.device, problem.seqlen_q
    queries = torch.arange(0, (problem.batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
    if variant in (TENSOR, CUDA):
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=variant == TENSOR)
        wrapper.plan(*pages_of(cache), *sizes, **options)
    elif variant == SEVERAL:
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(queries, *pages_of(cache), *sizes, causal=problem.causal, **options)
    else:
        shared = prefix // cache.page_size
        common = [torch.tensor(one, dtype=torch.int32, device=device) for one in ([0, shared], [cache.page_size])]
        first, own = cache.page_table[0, :shared].contiguous(), pages_of(cache, first=shared)
        wrapper = module.MultiLevelCascadeAttentionWrapper(2, workspace, "HND")
        wrapper.plan(
            [queries[[0, -1]], queries], [common[0], own[0]], [first, own[1]], [common[1], own[2]], *sizes, **options
        )
    return wrapper


def pages_of(cache: PagedKV, *, first: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table as FlashInfer reads it, int32: where each sequence's pages begin in a list of them all, that list, and
    the tokens in each last page; of the pages from `first` on, of which each sequence has one."""
    used = cache.used_pages()
    begin = torch.nn.functional.pad((used - first).cumsum(0), (1, 0)).to(torch.int32)
    columns = torch.arange(cache.max_pages, device=cache.device)
    listed = cache.page_table[(columns >= first) & (columns < used[:, None])]
    return begin, listed, cache.lengths - (used - 1) * cache.page_size
