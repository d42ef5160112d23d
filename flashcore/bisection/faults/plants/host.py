"""Wrong host-side arguments, and how a patch or a wrong method is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flashcore.bisection.faults.planting import Edit, Override, Source

Plants = Mapping[str, Source | Override]
"""How to plant bugs in one backend, by fault id."""


def source(*edits: Edit) -> Source:
    """A patch of the kernel's source."""
    return Source(edits)


def k_strides(change: Callable[[list[int]], list[int]]) -> Override:
    """K's strides (batch, head, row), wrong as `change` makes them."""

    def strides(self, name, tensor):
        right = list(tensor.stride()[:3])
        return change(right) if name == "k" else right

    return Override({"strides": strides})


def _scale_twice(self, problem):
    return problem.scale * problem.scale


def _strides_of_k(self, name, tensor):
    right = tensor.stride()[:3]
    if name == "k":
        self.strides_of_k = right
    return self.strides_of_k if name == "v" else right


def _rows_by_columns(self, cache, selection):
    from flashcore.paging import PagedKV

    table = cache.page_table.as_strided(cache.page_table.shape, (cache.max_pages, 1))
    narrow = PagedKV(cache.k_pool, cache.v_pool, table, cache.lengths, lengths_fit=True)
    return super(type(self), self).paged_params(narrow, selection)


V_BY_STRIDES_OF_K = Override({"strides": _strides_of_k})
ROWS_BY_COLUMNS = Override({"paged_params": _rows_by_columns})
BATCH_STRIDE_IN_BYTES = k_strides(lambda s: [2 * s[0], s[1], s[2]])
ONE_K_HEAD = k_strides(lambda s: [s[0], 0, s[2]])
SCALE_TWICE = Override({"scale": _scale_twice})
