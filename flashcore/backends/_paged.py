"""A backend that reads K and V through a page table; dense ones it copies into pages first, for the checks.

They go there among others (`flashcore.paging.among_others`): after a sequence that is passed over in the results.
"""

from __future__ import annotations

import struct

import torch

from flashcore.backends._chunks import chains
from flashcore.backends._contract import Backend, with_masks
from flashcore.backends._cuda import CudaBackend, is_good_again
from flashcore.backends._masks import mask_params
from flashcore.backends._tensor_maps import tensor_map
from flashcore.backends._traces import TraceBuffers
from flashcore.errors import PageTableError
from flashcore.gpu.launching import (
    LoadedKernel,
    PreparedLaunch,
    aligned,
    current_stream,
    entry_point,
    facts_of,
    is_aligned,
    kept,
    outputs_for,
)
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.reference import Trace
from flashcore.paging import PAGE_SIZES, PagedKV, PageSelection, among_others
from flashcore.problem import FARTHEST, Problem

PAGED = struct.Struct("4Q 3i 4x")
"""`PagedParams` of kernels/include/paged.cuh."""


def check_pools(cache: PagedKV) -> None:
    """Raise `PageTableError` unless every row of the pools can be copied 16 bytes at a time."""
    for name, pool in (("k_pool", cache.k_pool), ("v_pool", cache.v_pool)):
        if not is_aligned(pool):
            raise PageTableError(
                f"Rows of {name} do not all start at multiples of 16 bytes (strides {pool.stride()} elements), as the "
                "copy engine needs; lay the pool out so that they do."
            )


def compiled_for(problem: Problem, cache: PagedKV) -> Problem:
    """The problem that a kernel is compiled for: with a window over all keys where pages may be dropped.

    Without masks a chain of pages whose first one is wholly dropped subtracts 0 from all its scores, so that a score
    far below 0 is lost. With masks compiled in, the first key that a row sees says what is subtracted
    (`UNSEEN` in kernels/include/online_softmax.cuh); so it is in the batch-invariant mode.
    """
    if not cache.holes or problem.masks or problem.batch_invariant:
        return problem
    return problem.with_(window_left=FARTHEST)


class OverPages(Backend):
    """What every backend of ours over pages is: put before the backend that does its work."""

    paged = True
    dense = False
    swept = False
    selects = False
    """Whether it attends to a selection of pages."""

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is None and problem.page_size not in PAGE_SIZES:
            return f"page_size {problem.page_size} is not among {', '.join(map(str, PAGE_SIZES))}"
        return reason

    def why_not_paged(self, problem: Problem, *, selected: bool = False) -> str | None:
        if selected and not self.selects:
            return "it attends to all pages and takes no selection"
        return super().why_not_paged(problem, selected=selected)


class PagedBackend(OverPages, CudaBackend):
    """A backend whose work is one launch of a kernel that takes `AttentionParams` and `PagedParams`."""

    def run(self, q, k, v, problem: Problem, masks: MaskTensors | None = None):
        out, lse = self.run_paged(*among_others(q, k, v, problem), **with_masks(masks))
        return out[1:], lse[1:]

    def trace(self, q, k, v, problem: Problem, masks: MaskTensors | None = None) -> Trace:
        loaded = self.load(problem, q.device, trace=True)
        q, cache, problem = among_others(q, k, v, problem, even=loaded.tile_n)
        buffers = TraceBuffers.make(problem, loaded.tile_n, self.traced_rows(loaded), q.device)
        out, lse = (tensor.fill_(float("nan")) for tensor in outputs_for(q))
        self.attend(q, cache, problem, None, out, lse, buffers, masks)
        trace = buffers.trace(problem, loaded.tile_n, out, lse, self.chains(problem, loaded), masks)
        return trace.map(lambda stage: stage[1:])

    def run_paged(
        self, q, cache: PagedKV, problem: Problem, selection: PageSelection | None = None,
        masks: MaskTensors | None = None,
    ):  # fmt: skip
        check_pools(cache)
        cache = cache.within_table()
        out, lse = outputs_for(q)
        self.attend(q, cache, problem, selection, out, lse, masks=masks)
        return out, lse

    def traced_rows(self, loaded: LoadedKernel) -> int:
        """Query rows that the kernel stores at once."""
        return loaded.tile_m

    def chains(self, problem: Problem, loaded: LoadedKernel) -> tuple[int, ...] | None:
        """Which page of keys each one continues in a traced call; None for one chain."""
        return chains(problem.seqlen_k) if problem.batch_invariant else None

    def takes_room(self, problem: Problem) -> bool:
        """Whether a launch takes room besides its outputs."""
        return problem.batch_invariant

    def paged_arguments(
        self, q, cache: PagedKV, problem: Problem, selection, out, lse, loaded: LoadedKernel, stream: int, traced: bool
    ) -> tuple[list[bytes], int, object]:
        """What the entry function takes, how many blocks there are, and what the arguments need kept alive.

        What masks need, and room for stages, come after it.
        """
        raise NotImplementedError

    def attend(
        self, q, cache: PagedKV, problem: Problem, selection, out, lse, buffers: TraceBuffers | None = None,
        masks: MaskTensors | None = None,
    ) -> None:  # fmt: skip
        """Launch once, on torch's current stream."""
        device = q.device.index or 0
        stream = current_stream(device)
        chosen = () if selection is None else (selection.pages, selection.counts)
        given = () if masks is None else tuple(tensor for _, tensor in masks.named())
        tensors = (q, cache.k_pool, cache.v_pool, cache.page_table, cache.lengths, out, lse, *chosen, *given)
        key = None
        if buffers is None and not (self.takes_room(problem) and self.has_own_room()):
            key = (type(self), self.version(), problem, cache.holes, device, stream, *map(facts_of, tensors))

        def prepare() -> PreparedLaunch:
            compiled = compiled_for(problem, cache)
            loaded = self.load(compiled, q.device, trace=buffers is not None)
            rows = aligned(q)
            arguments, blocks, keeps = self.paged_arguments(
                rows, cache, problem, selection, out, lse, loaded, stream, buffers is not None
            )
            if compiled.masks:
                arguments.append(mask_params(compiled, masks, self.scale(problem)))
            keys = cache.max_pages * cache.page_size
            keeps = (keeps, self.told_of_room(arguments, problem, loaded, keys, q.device, stream))
            if buffers is not None:
                arguments.append(buffers.packed())
            function = entry_point(loaded, self.entry(compiled, device), device)
            again = rows is q
            return PreparedLaunch(function, loaded, (blocks, 1, 1), arguments, stream, again=again, keeps=keeps)

        kept(key, prepare, is_good_again).launch()

    def pool_map(self, name: str, pool: torch.Tensor, tile_n: int, dtype: str, *, promote: bool) -> bytes:
        """A tensor map over ``[num_pages, num_heads_kv, page_size, head_dim]``, for boxes that lie within one page."""
        rows, strides = min(tile_n, pool.shape[2]), self.strides(name, pool)
        return tensor_map(
            pool.data_ptr(), pool.shape, strides, rows=rows, dtype=dtype, name=f"{name}_pool", promote=promote
        )

    def paged_params(self, cache: PagedKV, selection: PageSelection | None) -> bytes:
        """`PagedParams`, packed."""
        chosen = (0, 0, 0) if selection is None else (
            selection.pages.data_ptr(), selection.counts.data_ptr(), selection.pages.shape[-1]
        )  # fmt: skip
        return PAGED.pack(
            cache.page_table.data_ptr(), cache.lengths.data_ptr(), chosen[0], chosen[1], cache.page_table.stride(0),
            chosen[2], cache.page_size.bit_length() - 1,
        )  # fmt: skip
