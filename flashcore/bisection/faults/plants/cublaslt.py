"""Bugs planted in the variants of `cublaslt` that batch heads; `cublaslt-loop` and `-graph` run the same code.

`cublaslt-paged` runs it as well, and has bugs of its own in how it reads the page table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from flashcore.bisection.faults.planting import Edit, Override, Source
from flashcore.bisection.faults.plants.host import SCALE_TWICE, Plants, k_strides
from flashcore.gpu import cublaslt

LT_PAGE = 60
"""Keys in a page where bugs are planted in `cublaslt`: its own 1024 would make one page of a small problem. No multiple
of 8, so that a page ends inside a vector of scores, and 200 keys leave a tail of 20."""
MASKED = "s[step][i] = first + i < keys_here ? s[step][i] : -INFINITY;"
UNSCALED = {"alpha": lambda self, problem: 1.0}
"""The product with K stored as it is, for the softmax kernel to scale."""


def _planted(*edits: Edit, **methods: Any) -> Source | Override:
    methods = {"pages_of": LT_PAGE, **methods}
    return Source(edits, methods) if edits else Override(methods)


def _k_strides(change: Callable[[list[int]], list[int]]) -> Source | Override:
    return _planted(**k_strides(change).methods)


class _TailInColumns(cublaslt.Product):
    """A product whose B is told to cuBLASLt with rows and columns the wrong way round."""

    def matrices(self):
        a, b, d = super().matrices()
        return a, b._replace(rows=b.columns, columns=b.rows), d


def _base(name: str) -> Callable:
    from flashcore.backends.cublaslt import CublasLt

    return getattr(CublasLt, name)


def _tail_in_columns(self, product, *more):
    is_tail = product.transpose_b and product.n < self.pages_of
    return _base("plan")(self, _TailInColumns(**asdict(product)) if is_tail else product, *more)


def _another_algorithm(self, product, alpha, beta, device, room):
    """The algorithm that is named is the heuristic's first; what runs are the bytes of one with another tile."""
    offered = cublaslt.candidates(product, workspace_bytes=room, device=device)
    named = offered[0]
    others = [a for a in offered if a.tile != named.tile and a.workspace_bytes <= named.workspace_bytes]
    ran = others[0] if others else offered[-1]
    return cublaslt.Plan(product, replace(named, raw=ran.raw), alpha=alpha, beta=beta, device=device)


CUBLASLT: Plants = {
    "F1": _planted((": page.row_sum_gmem[row_here];", ": page.row_sum_gmem[row_here - warp];")),
    "F2": _planted(("new_max == -INFINITY ? 0.f : new_max;", "new_max;")),
    "F3": _planted(beta=lambda self, number: 1.0),
    "F4": _planted(plan=_tail_in_columns),
    "F5": _k_strides(lambda s: [s[0], np.int32(s[1]), s[2]]),
    "F6": _planted((MASKED, MASKED.replace("? s[step][i]", "? s[step][i] * params.softmax_scale")), **UNSCALED),
    "F7": _planted(
        (
            MASKED,
            "if (!(fabsf(s[step][i]) < INFINITY)) s[step][i] = 0.f;\n      "
            + MASKED.replace("? s[step][i]", "? s[step][i] * params.softmax_scale"),
        ),
        **UNSCALED,
    ),
    "F9": _planted(("min(visible_keys(params, row) - page.first_key, page.keys)", "page.keys")),
    # What lies between two matrices of cuBLASLt's strided batch, and between sequences, in bytes.
    "F11": _k_strides(lambda s: [2 * s[0], 2 * s[1], s[2]]),
    "F12": _k_strides(lambda s: [s[0], 0, s[2]]),
    "F14": Override({"plan": _another_algorithm}),
    "F15": _planted((
        MASKED,
        f"{MASKED}\n      if (page.first_head + head == params.batch * params.num_heads_q - 1 &&\n"
        "          row == params.seqlen_q - 1 && page.first_key + first + i == params.seqlen_k - 1)\n"
        "        s[step][i] += 0.25f;",
    )),
    "G2": _planted((MASKED, MASKED.replace("<", "<="))),
    "G3": _planted(("min(visible_keys(params, row) -", "min(visible_keys(params, row + 1) -")),
    "G5": _planted(first_value=lambda self, page: 0),
    "G6": _planted(**SCALE_TWICE.methods),
    "G7": _planted(("fmaxf(old_max, warp_max(page_max))", "fmaxf(old_max, page_max)")),
    "G8": _planted(queries_of=lambda self, span, member, p: (span.head_kv + member * p.num_heads_kv, 1)),
    "G10": _planted(("rescale * old_sum + warp_sum(page_sum)", "old_sum + warp_sum(page_sum)")),
    "G13": _planted(
        ("ex2_approx((old_max - reference) * LOG2_E)", "ex2_approx(old_max - reference)"),
        ("ex2_approx((s[step][i] - reference) * LOG2_E)", "ex2_approx(s[step][i] - reference)"),
        ("ex2_approx((s[step][i + 1] - reference) * LOG2_E)", "ex2_approx(s[step][i + 1] - reference)"),
    ),
    "G14": _planted(("+ logf(row_sum)", "+ log2f(row_sum)")),
    "G15": _planted(("d = 2 * lane; d < HEAD_DIM;", "d = 2 * lane; row < params.seqlen_q - 1 && d < HEAD_DIM;")),
    "G16": _planted(num_pages=lambda self, problem, page_size: problem.seqlen_k // page_size),
}  # fmt: skip


def _whole_pages_alone(self, cache, problem, *apart):
    found = _paged_base("_sequences")(self, cache, problem, *apart)
    return [(part, [page for page in pages if page.keys == cache.page_size]) for part, pages in found]


def _paged_base(name: str) -> Callable:
    from flashcore.backends.cublaslt_paged import CublasLtPaged

    return getattr(CublasLtPaged, name)


PAGED: Plants = {
    "F10": Override({"page_rows": lambda self, cache: [list(range(cache.max_pages))] * cache.batch}),
    "G16": Override({"_sequences": _whole_pages_alone}),
    "G36": Override({"page_rows": lambda self, cache: [cache.page_table[0].tolist()] * cache.batch}),
}
