"""The catalogue of planted bugs, which prove that bisection finds each one, and at the stage that made it.

F-numbers are bugs that once cost somebody days; G-numbers are those that a kernel writer makes on any ordinary day.
Each names the stage it has to be found at. Bisection is never told which bug is planted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from flashcore import cublaslt, reference
from flashcore.errors import UnknownName
from flashcore.planting import PLAIN, Edit, Fault, Override, Source
from flashcore.problem import square

CAUSAL = PLAIN.with_(causal=True)
EMPTY_ROWS = PLAIN.with_(causal=True, seqlen_q=200, seqlen_k=77)
"""More queries than keys: the first 123 rows see no key, and the last of them share a tile with rows that do."""
ROWS_OF_2048 = square(1, 2, 2048, 64)
"""Products large enough that cuBLASLt offers algorithms with different tiles."""

LATE = {
    "scalar": (
        "    __syncthreads();  // the page before is done with\n",
        "    __syncthreads();  // the page before is done with\n    if (warp == 1) __nanosleep(20000);\n",
    ),
    "wmma": (
        "  copy_rows<TILE_M>(smem.q, q_tile,",
        "  if (warp == 1) __nanosleep(20000);\n  copy_rows<TILE_M>(smem.q, q_tile,",
    ),
}
"""One warp of each block starts its copies late: a right kernel does not mind, one without a barrier always shows."""


def _source(*edits: Edit) -> Source:
    return Source(edits)


def _cpu(**methods: Callable) -> Override:
    return Override(methods)


# ------------------------------------------------------------------------------- wrong host-side arguments (CUDA)


def _kv_strides(change: Callable[[list[int]], list[int]]) -> Override:
    """K's strides (batch, head, row), wrong as `change` makes them."""

    def strides(self, name, tensor):
        right = list(tensor.stride()[:3])
        return change(right) if name == "k" else right

    return Override({"strides": strides})


def _scale_twice(self, problem):
    return problem.scale * problem.scale


# ------------------------------------------------------------------------------- cublaslt

LT_PAGE = 60
"""Keys in a page where bugs are planted in `cublaslt`: its own 1024 would make one page of a small problem. No multiple
of 8, so that a page ends inside a vector of scores, and 200 keys leave a tail of 20."""
MASKED = "s[step][i] = first + i < keys_here ? s[step][i] : -INFINITY;"
UNSCALED = {"alpha": lambda self, problem: 1.0}
"""The product with K stored as it is, for the softmax kernel to scale."""


def _lt(*edits: Edit, **methods: Any) -> Mapping[str, Source | Override]:
    """One plant for both variants of cublaslt that batch heads; `cublaslt-loop` and `-graph` run the same code."""
    methods = {"pages_of": LT_PAGE, **methods}
    plant = Source(edits, methods) if edits else Override(methods)
    return {"cublaslt": plant, "cublaslt-batched": plant}


def _lt_k_strides(change: Callable[[list[int]], list[int]]) -> Mapping[str, Source | Override]:
    return _lt(**_kv_strides(change).methods)


class _TailInColumns(cublaslt.Product):
    """A product whose B is told to cuBLASLt with rows and columns the wrong way round."""

    def matrices(self):
        a, b, d = super().matrices()
        return a, b._replace(rows=b.columns, columns=b.rows), d


def _lt_base(name: str) -> Callable:
    from flashcore.backends.cublaslt import CublasLt

    return getattr(CublasLt, name)


def _tail_in_columns(self, product, *more):
    is_tail = product.transpose_b and product.n < self.pages_of
    return _lt_base("plan")(self, _TailInColumns(**asdict(product)) if is_tail else product, *more)


def _another_algorithm(self, product, alpha, beta, device, room):
    """The algorithm that is named is the heuristic's first; what runs are the bytes of one with another tile."""
    offered = cublaslt.candidates(product, workspace_bytes=room, device=device)
    named = offered[0]
    others = [a for a in offered if a.tile != named.tile and a.workspace_bytes <= named.workspace_bytes]
    ran = others[0] if others else offered[-1]
    return cublaslt.Plan(product, replace(named, raw=ran.raw), alpha=alpha, beta=beta, device=device)


# ------------------------------------------------------------------------------- wrong stages (cpu)


def _cpu_base(name: str) -> Callable:
    from flashcore.backends.cpu import CpuBackend

    return getattr(CpuBackend, name)


def _cpu_after(name: str, change: Callable) -> Override:
    """The cpu backend's own method, and then `change(result, *arguments)` of what it gave."""

    def method(self, *arguments):
        return change(_cpu_base(name)(self, *arguments), *arguments)

    return Override({name: method})


def _half(tensor):
    import torch

    return tensor.to(torch.float16).float()


def _cpu_kv_modulo(self, tensor, problem):
    return tensor.float().repeat(1, problem.num_heads_q // problem.num_heads_kv, 1, 1)


def _cpu_no_mask(self, q, k, problem, page):
    return _cpu_base("scores")(self, q, k, problem.with_(causal=False), page)


def _cpu_swizzled(self, q, k, problem, page):
    return _cpu_base("scores")(self, q, k.roll(8, dims=-1), problem, page)


def _cpu_last_row_unwritten(result, accum, row_sum, row_max):
    out, lse = result
    out[..., -1, :] = math.nan
    return out, lse


def _cpu_broadcast_k(self, q, k, problem, page):
    return _cpu_base("scores")(self, q, k[:, :1].expand_as(k), problem, page)


def _cpu_unscaled_half(self, q, k, problem, page):
    scores = _half(q @ k.transpose(-1, -2)) * problem.scale
    mask = reference.visible(problem, slice(0, problem.seqlen_q), page, q.device)
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def _cpu_laundered_half(self, q, k, problem, page):
    return _cpu_unscaled_half(self, q, k, problem, page).nan_to_num(nan=0.0, posinf=0.0, neginf=-math.inf)


def _cpu_stale_cells(scores, q, k, problem, page):
    """Of each 64 x 64 block only the first 16 x 16 cells are stored; the others hold what another head left there."""
    import torch

    rows, columns = torch.arange(scores.shape[2]) % 64 < 16, torch.arange(scores.shape[3]) % 64 < 16
    return torch.where(rows[:, None] & columns[None, :], scores, scores.roll(1, dims=1))


def _cpu_batch_in_bytes(self, q, k, problem, page):
    """Sequence b reads the K of sequence 2b, as far as there is one."""
    import torch

    return _cpu_base("scores")(self, q, k[(2 * torch.arange(problem.batch)) % problem.batch], problem, page)


def _cpu_page_too_early(self, q, k, problem, page):
    """Some rows of the page have not arrived yet; which ones, nobody knows."""
    import torch

    anywhere = torch.Generator()
    anywhere.seed()  # from the system: unlike the run before
    return _cpu_base("scores")(self, q, k * (torch.rand(k.shape[2], generator=anywhere) < 0.5)[:, None], problem, page)


def _cpu_late(scores, q, k, problem, page):
    if page.stop == problem.seqlen_k:
        scores[-1, -1, -1, -1] += 0.25
    return scores


def _cpu_tail(scores, q, k, problem, page):
    """The diagonal one key too far: the first masked key of each row is seen."""
    if not problem.causal:
        return scores
    looser = problem.with_(causal=False)
    everything = _cpu_base("scores")(None, q, k, looser, page)
    import torch

    row = torch.arange(problem.seqlen_q)[:, None] + problem.seqlen_k - problem.seqlen_q + 1
    column = torch.arange(page.start, page.stop)[None, :]
    return torch.where(row == column, everything, scores)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "F1", "softmax state of one row reused for others", "row_sum", "finite or Inf, wrong",
        {
            "scalar": _source(("row_sum = rescale * row_sum + warp_sum(prob);", "row_sum = rescale * row_sum + prob;")),
            "wmma": _source((
                "row_sum = rescale * row_sum + page_sum;",
                "row_sum = rescale * __shfl_sync(~0u, row_sum, 0) + page_sum;",
            )),
            **_lt((": page.row_sum_gmem[row_here];", ": page.row_sum_gmem[row_here - warp];")),
            "cpu": _cpu(row_sum=lambda self, s, r, p: r * s[..., :1] + p.sum(dim=-1)),
        },
    ),
    Fault(
        "F2", "fully masked rows: -inf minus -inf", "rescale", "NaN",
        {
            "scalar": _source(("new_max == -INFINITY ? 0.f : new_max;", "new_max;")),
            "wmma": _source(("new_max == -INFINITY ? 0.f : new_max * scale_log2;", "new_max * scale_log2;")),
            **_lt(("new_max == -INFINITY ? 0.f : new_max;", "new_max;")),
            "cpu": _cpu(
                rescale=lambda self, before, m: (before - m).exp(),
                probs=lambda self, s, m: (s - m[..., None]).exp(),
            ),
        },
        problem=EMPTY_ROWS,
    ),
    Fault(
        "F3", "page 0 rescales an accumulator that was never initialised", "accum", "NaN",
        {
            "scalar": _source((
                "float accum[COLUMNS] = {};",
                "float accum[COLUMNS];\n  for (int c = 0; c < COLUMNS; ++c) accum[c] = __int_as_float(0x7fc00000);",
            )),
            "wmma": _source((
                "fill_fragment(accum[r][h], 0.f)", "fill_fragment(accum[r][h], __int_as_float(0x7fc00000))",
            )),
            **_lt(beta=lambda self, number: 1.0),
            "cpu": _cpu(initial_accum=lambda self, q: q.new_full(q.shape, math.nan)),
        },
    ),
    Fault(
        "F4", "tail of K or V set as columns where rows are meant", "scores", "a status code, or wrong scores",
        _lt(plan=_tail_in_columns), error_is_found=True,
    ),
    Fault(
        "F5", "a 4-byte value given for a 64-bit layout attribute", "scores", "a status code, if it is checked",
        _lt_k_strides(lambda s: [s[0], np.int32(s[1]), s[2]]), error_is_found=True,
    ),
    Fault(
        "F6", "scores kept in 16 bits before they are scaled", "scores", "Inf or NaN for large inputs",
        {
            "scalar": _source((
                "score = first_key + lane < keys ? score * params.softmax_scale : -INFINITY;",
                "score = __half2float(__float2half(score));\n"
                "    score = first_key + lane < keys ? score * params.softmax_scale : -INFINITY;",
            )),
            "wmma": _source((
                "    const int keys_here = keys - first_key;",
                "    for (int n = 0; n < TILE_N; ++n) s_rmem[n] = __half2float(__float2half(s_rmem[n]));\n"
                "    const int keys_here = keys - first_key;",
            )),
            **_lt((MASKED, MASKED.replace("? s[step][i]", "? s[step][i] * params.softmax_scale")), **UNSCALED),
            "cpu": _cpu(scores=_cpu_unscaled_half),
        },
        pattern="large",
    ),
    Fault(
        "F7", "a guard that launders non-finite scores into zeros", "scores", "finite, wrong",
        {
            "scalar": _source((
                "score = first_key + lane < keys ? score * params.softmax_scale : -INFINITY;",
                "score = __half2float(__float2half(score));\n    if (!(fabsf(score) < INFINITY)) score = 0.f;\n"
                "    score = first_key + lane < keys ? score * params.softmax_scale : -INFINITY;",
            )),
            "wmma": _source((
                "    const int keys_here = keys - first_key;",
                "    for (int n = 0; n < TILE_N; ++n) {\n      s_rmem[n] = __half2float(__float2half(s_rmem[n]));\n"
                "      if (!(fabsf(s_rmem[n]) < INFINITY)) s_rmem[n] = 0.f;\n    }\n"
                "    const int keys_here = keys - first_key;",
            )),
            **_lt(
                (
                    MASKED,
                    "if (!(fabsf(s[step][i]) < INFINITY)) s[step][i] = 0.f;\n      "
                    + MASKED.replace("? s[step][i]", "? s[step][i] * params.softmax_scale"),
                ),
                **UNSCALED,
            ),
            "cpu": _cpu(scores=_cpu_laundered_half),
        },
        pattern="large",
    ),
    Fault(
        "F8", "fragments stored by a wrong lane map: 256 cells of a tile written, the rest stale", "scores",
        "finite, wrong",
        {
            # What is stale has to be finite, as it was in the bug that this one is: the first page finds zeros.
            "wmma": _source(
                (
                    "  int element_row[8];\n  read_element_rows(",
                    "  for (int i = lane; i < WARP_ROWS * SCORE_STRIDE; i += WARP) (&scores[0][0])[i] = 0.f;\n"
                    "  __syncwarp();\n  int element_row[8];\n  read_element_rows(",
                ),
                (
                    "wmma::store_matrix_sync(&scores[r * FRAGMENT][n * FRAGMENT], s[r][n], SCORE_STRIDE, "
                    "wmma::mem_row_major);\n    }\n    __syncwarp();",
                    "for (int i = 0; i < 8; ++i) scores[lane / 2][lane % 2 * 8 + i] = s[r][n].x[i];\n    }\n"
                    "    __syncwarp();",
                ),
            ),
            "cpu": _cpu_after("scores", _cpu_stale_cells),
        },
    ),
    Fault(
        "F9", "causal flag ignored", "scores", "finite, wrong",
        {
            "scalar": _source(("if (!params.causal) return params.seqlen_k;", "return params.seqlen_k;")),
            "wmma": _source(("if (!params.causal) return params.seqlen_k;", "return params.seqlen_k;")),
            **_lt(("min(visible_keys(params, row) - page.first_key, page.keys)", "page.keys")),
            "cpu": _cpu(scores=_cpu_no_mask),
        },
        problem=CAUSAL,
    ),
    Fault(
        "F10", "page indices never looked up", "scores", "right when dense, wrong when sparse",
        awaits="paged attention",
    ),
    Fault(
        "F11", "batch stride given in bytes, not in elements", "scores", "wrong sequence, or out of bounds",
        {
            "scalar": _kv_strides(lambda s: [2 * s[0], s[1], s[2]]),
            "wmma": _kv_strides(lambda s: [2 * s[0], s[1], s[2]]),
            # What lies between two matrices of cuBLASLt's strided batch, and between sequences, in bytes.
            **_lt_k_strides(lambda s: [2 * s[0], 2 * s[1], s[2]]),
            "cpu": _cpu(scores=_cpu_batch_in_bytes),
        },
        may_crash=True, crash_is_found=True,
    ),
    Fault(
        "F12", "one K head broadcast to all heads", "scores", "finite, wrong from head 1 on",
        {
            "scalar": _kv_strides(lambda s: [s[0], 0, s[2]]),
            "wmma": _kv_strides(lambda s: [s[0], 0, s[2]]),
            **_lt_k_strides(lambda s: [s[0], 0, s[2]]),
            "cpu": _cpu(scores=_cpu_broadcast_k),
        },
    ),
    Fault(
        "F13", "racy base offset in the page list", "page table", "overlap, changes from run to run",
        awaits="paged attention",
    ),
    Fault(
        "F14", "the algorithm surveyed is not the one run", "survey", "label unlike the kernel",
        {name: Override({"plan": _another_algorithm}) for name in ("cublaslt", "cublaslt-batched")},
        problem=ROWS_OF_2048, found_by="labels",
    ),
    Fault(
        "F15", "one element of the last page and the last head wrong: what a tracer of page 0 misses", "scores",
        "finite, one element slightly wrong",
        {
            "scalar": _source((
                "    // m = max(m, rowmax(S)); while",
                "    if (tile.batch == params.batch - 1 && tile.head == params.num_heads_q - 1 &&\n"
                "        row == params.seqlen_q - 1 && first_key + lane == params.seqlen_k - 1) score += 0.25f;\n"
                "    // m = max(m, rowmax(S)); while",
            )),
            "wmma": _source((
                "    const int keys_here = keys - first_key;",
                "    const int keys_here = keys - first_key;\n"
                "    if (tile.batch == params.batch - 1 && tile.head == params.num_heads_q - 1 &&\n"
                "        row == params.seqlen_q - 1) {\n"
                "      for (int n = 0; n < TILE_N; ++n)\n"
                "        if (first_key + n == params.seqlen_k - 1) s_rmem[n] += 2.f;\n    }",
            )),
            **_lt((
                MASKED,
                f"{MASKED}\n      if (page.first_head + head == params.batch * params.num_heads_q - 1 &&\n"
                "          row == params.seqlen_q - 1 && page.first_key + first + i == params.seqlen_k - 1)\n"
                "        s[step][i] += 0.25f;",
            )),
            "cpu": _cpu_after("scores", _cpu_late),
        },
    ),
    Fault(
        "F16", "a verdict read the wrong way round", "report", "a false pass",
        held_by="tests/test_faults.py plants it in the verdict, in the tables' words and in the audit of the SASS",
    ),
    Fault(
        "G1", "missing barrier: a page is used before it has arrived", "scores", "changes from run to run",
        {
            "scalar": _source(
                LATE["scalar"],
                ("v_head[(first_key + key) * params.v.row + d] : zero;\n    }\n    __syncthreads();",
                 "v_head[(first_key + key) * params.v.row + d] : zero;\n    }"),
            ),
            "wmma": _source(
                LATE["wmma"],
                ("    __syncthreads();  // this page has arrived, and everyone is done with the other slot", ""),
            ),
            "cpu": _cpu(scores=_cpu_page_too_early),
        },
        may_crash=True,
    ),
    Fault(
        "G2", "off by one at the end of the keys: a key that does not exist is counted", "row_sum", "finite, wrong",
        {
            "scalar": _source(("score = first_key + lane < keys ?", "score = first_key + lane <= keys ?")),
            "wmma": _source(("s_rmem[n] = n < keys_here ?", "s_rmem[n] = n <= keys_here ?")),
            **_lt((MASKED, MASKED.replace("<", "<="))),
            "cpu": _cpu_after("row_sum", lambda total, before, r, p: total + (1.0 if p.shape[-1] < 64 else 0.0)),
        },
    ),
    Fault(
        "G3", "off by one on the diagonal: a row sees the key after its own", "scores", "finite, wrong",
        {
            "scalar": _source(("row + 1 + params.seqlen_k", "row + 2 + params.seqlen_k")),
            "wmma": _source(("row + 1 + params.seqlen_k", "row + 2 + params.seqlen_k")),
            **_lt(("min(visible_keys(params, row) -", "min(visible_keys(params, row + 1) -")),
            "cpu": _cpu_after("scores", _cpu_tail),
        },
        problem=CAUSAL,
    ),
    Fault(
        "G4", "wrong swizzle: pieces of K's rows read in another order than they were written", "scores",
        "finite, wrong",
        {
            "scalar": _source(("to_float(k_smem[lane][d])", "to_float(k_smem[lane][d ^ 8])")),
            "wmma": _source((
                "&smem.k[slot][n * FRAGMENT][h * FRAGMENT]", "&smem.k[slot][n * FRAGMENT][(h ^ 1) * FRAGMENT]",
            )),
            "cpu": _cpu(scores=_cpu_swizzled),
        },
    ),
    Fault(
        "G5", "stale ring slot: V of another page", "accum", "finite, wrong",
        {
            "scalar": _source(("v_head[(first_key + key) * params.v.row + d]", "v_head[key * params.v.row + d]")),
            "wmma": _source((
                "&smem.v[slot][n * FRAGMENT][h * FRAGMENT]", "&smem.v[1 - slot][n * FRAGMENT][h * FRAGMENT]",
            )),
            **_lt(first_value=lambda self, page: 0),
            "cpu": _cpu(page_of_v=lambda self, v, pages, j: v[..., : pages[j].stop - pages[j].start, :]),
        },
    ),
    Fault(
        "G6", "scale applied twice", "scores", "finite, too even",
        {
            "scalar": Override({"scale": _scale_twice}),
            "wmma": Override({"scale": _scale_twice}),
            **_lt(scale=_scale_twice),
            "cpu": _cpu_after("scores", lambda scores, q, k, problem, page: scores * problem.scale),
        },
    ),
    Fault(
        "G7", "maximum not reduced across lanes", "probs", "finite, wrong",
        {
            "scalar": _source(("fmaxf(row_max, warp_max(score))", "fmaxf(row_max, score)")),
            **_lt(("fmaxf(old_max, warp_max(page_max))", "fmaxf(old_max, page_max)")),
        },
    ),
    Fault(
        "G8", "query heads mapped to K/V heads by remainder instead of by group", "scores", "finite, wrong",
        {
            "scalar": _source(("head / (params.num_heads_q / params.num_heads_kv)", "head % params.num_heads_kv")),
            "wmma": _source(("head / (params.num_heads_q / params.num_heads_kv)", "head % params.num_heads_kv")),
            **_lt(queries_of=lambda self, span, member, p: (span.head_kv + member * p.num_heads_kv, 1)),
            "cpu": _cpu(kv_of_head=_cpu_kv_modulo),
        },
    ),
    Fault(
        "G9", "accumulator kept in 16 bits", "accum", "finite, a little wrong",
        {
            "scalar": _source((
                "for (int c = 0; c < COLUMNS; ++c) accum[c] += p * to_float(v_smem[key][c * WARP + lane]);",
                "for (int c = 0; c < COLUMNS; ++c)\n"
                "        accum[c] = __half2float(__float2half(accum[c] + p * to_float(v_smem[key][c * WARP + lane])));",
            )),
            "wmma": _source((
                "wmma::mma_sync(accum[r][h], p[r], v, accum[r][h]);",
                "{\n          wmma::mma_sync(accum[r][h], p[r], v, accum[r][h]);\n"
                "          for (float& x : accum[r][h].x) x = __half2float(__float2half(x));\n        }",
            )),
            "cpu": _cpu_after("accum", lambda accum, *_: _half(accum)),
        },
    ),
    Fault(
        "G10", "row sum not rescaled when the maximum moves", "row_sum", "finite, wrong",
        {
            "scalar": _source(("row_sum = rescale * row_sum + warp_sum(prob);", "row_sum = row_sum + warp_sum(prob);")),
            "wmma": _source(("row_sum = rescale * row_sum + page_sum;", "row_sum = row_sum + page_sum;")),
            **_lt(("rescale * old_sum + warp_sum(page_sum)", "old_sum + warp_sum(page_sum)")),
            "cpu": _cpu(row_sum=lambda self, s, r, p: s + p.sum(dim=-1)),
        },
        pattern="rising",
    ),
    Fault(
        "G11", "accumulator rescaled only when every row of the warp asks for it", "accum", "finite, wrong",
        {
            "wmma": _source(("__any_sync(~0u, rescale != 1.f)", "__all_sync(~0u, rescale != 1.f)")),
            "cpu": _cpu(
                accum=lambda self, a, r, p, v: (r[..., None] * a if bool((r != 1).all()) else a) + p.float() @ v
            ),
        },
    ),
    Fault(
        "G12", "rescale factor of a neighbouring row", "accum", "finite, wrong",
        {
            "wmma": _source(("r * FRAGMENT + element_row[i]);", "r * FRAGMENT + (element_row[i] ^ 1));")),
            "cpu": _cpu(accum=lambda self, a, r, p, v: r.roll(1, dims=-1)[..., None] * a + p.float() @ v),
        },
    ),
    Fault(
        "G13", "exponential of base 2 without log2(e)", "rescale", "finite, too even",
        {
            "scalar": _source(
                ("ex2_approx((row_max - reference) * LOG2_E)", "ex2_approx(row_max - reference)"),
                ("ex2_approx((score - reference) * LOG2_E)", "ex2_approx(score - reference)"),
            ),
            "wmma": _source(("fmaxf(fabsf(params.softmax_scale) * LOG2_E,", "fmaxf(fabsf(params.softmax_scale),")),
            **_lt(
                ("ex2_approx((old_max - reference) * LOG2_E)", "ex2_approx(old_max - reference)"),
                ("ex2_approx((s[step][i] - reference) * LOG2_E)", "ex2_approx(s[step][i] - reference)"),
                ("ex2_approx((s[step][i + 1] - reference) * LOG2_E)", "ex2_approx(s[step][i + 1] - reference)"),
            ),
            "cpu": _cpu(
                rescale=lambda self, before, m: (before - reference.safe(m)).exp2(),
                probs=lambda self, s, m: (s - reference.safe(m)[..., None]).exp2(),
            ),
        },
    ),
    Fault(
        "G14", "lse with a logarithm of base 2", "lse", "out is right, lse is not",
        {
            "scalar": _source(("row_max + logf(row_sum)", "row_max + log2f(row_sum)")),
            "wmma": _source(("+ logf(row_sum)", "+ log2f(row_sum)")),
            **_lt(("+ logf(row_sum)", "+ log2f(row_sum)")),
            "cpu": _cpu_after("finish", lambda result, a, s, m: (result[0], m + s.log2())),
        },
    ),
    Fault(
        "G15", "the tail of the query rows is never written", "out", "stale memory in the last rows",
        {
            "scalar": _source(("if (!row_exists) return;", "if (!row_exists || row == params.seqlen_q - 1) return;")),
            "wmma": _source((
                "if (warp_first_row + r < params.seqlen_q) {",
                "if (warp_first_row + r < params.seqlen_q / 16 * 16) {",
            )),
            **_lt(("d = 2 * lane; d < HEAD_DIM;", "d = 2 * lane; row < params.seqlen_q - 1 && d < HEAD_DIM;")),
            "cpu": _cpu_after("finish", _cpu_last_row_unwritten),
        },
    ),
    Fault(
        "G16", "the last, partial page is dropped", "scores", "finite, wrong",
        {
            "scalar": _source((
                "(visible_keys(params, last_row) + TILE_N - 1) / TILE_N", "visible_keys(params, last_row) / TILE_N",
            )),
            "wmma": _source((
                "(visible_keys(params, last_row) + TILE_N - 1) / TILE_N", "visible_keys(params, last_row) / TILE_N",
            )),
            **_lt(num_pages=lambda self, problem, page_size: problem.seqlen_k // page_size),
            "cpu": _cpu_after("scores", lambda s, q, k, problem, page: s if s.shape[-1] == 64 else s.fill_(-math.inf)),
        },
    ),
)  # fmt: skip


def get(fault_id: str) -> Fault:
    """The fault with this id; `UnknownName` lists those that exist."""
    for fault in FAULTS:
        if fault.id == fault_id:
            return fault
    raise UnknownName("fault", fault_id, [fault.id for fault in FAULTS])


def planted_in(backend_id: str) -> list[Fault]:
    """The faults that know how to be planted in this backend."""
    return [fault for fault in FAULTS if backend_id in fault.plants]
