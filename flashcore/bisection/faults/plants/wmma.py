"""Bugs planted in backend `wmma`."""

from __future__ import annotations

from flashcore.bisection.faults.plants.host import (
    BATCH_STRIDE_IN_BYTES,
    ONE_K_HEAD,
    SCALE_TWICE,
    V_BY_STRIDES_OF_K,
    Plants,
    source,
)

LATE = (
    (
        "  copy_rows<TILE_M>(smem.q, q_tile,",
        "  if (warp == 1) __nanosleep(20000);\n  copy_rows<TILE_M>(smem.q, q_tile,",
    ),
)
"""One warp of each block starts its copies late: a right kernel does not mind, one without a barrier always shows."""

WMMA: Plants = {
    "F1": source((
        "row_sum = rescale * row_sum + page_sum;",
        "row_sum = rescale * __shfl_sync(~0u, row_sum, 0) + page_sum;",
    )),
    "F2": source(("new_max == -INFINITY ? 0.f : new_max * scale_log2;", "new_max * scale_log2;")),
    "F3": source((
        "fill_fragment(accum[r][h], 0.f)", "fill_fragment(accum[r][h], __int_as_float(0x7fc00000))",
    )),
    "F6": source((
        "    const int keys_here = keys - first_key;",
        "    for (int n = 0; n < TILE_N; ++n) s_rmem[n] = __half2float(__float2half(s_rmem[n]));\n"
        "    const int keys_here = keys - first_key;",
    )),
    "F7": source((
        "    const int keys_here = keys - first_key;",
        "    for (int n = 0; n < TILE_N; ++n) {\n      s_rmem[n] = __half2float(__float2half(s_rmem[n]));\n"
        "      if (!(fabsf(s_rmem[n]) < INFINITY)) s_rmem[n] = 0.f;\n    }\n"
        "    const int keys_here = keys - first_key;",
    )),
    # What is stale has to be finite, as it was in the bug that this one is: the first page finds zeros.
    "F8": source(
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
    "F9": source(("if (!params.causal) return seqlen_k;", "return seqlen_k;")),
    "F11": BATCH_STRIDE_IN_BYTES,
    "F12": ONE_K_HEAD,
    "F15": source((
        "    const int keys_here = keys - first_key;",
        "    const int keys_here = keys - first_key;\n"
        "    if (tile.batch == params.batch - 1 && tile.head == params.num_heads_q - 1 &&\n"
        "        row == params.seqlen_q - 1) {\n"
        "      for (int n = 0; n < TILE_N; ++n)\n"
        "        if (first_key + n == params.seqlen_k - 1) s_rmem[n] += 2.f;\n    }",
    )),
    "G1": source(
        *LATE,
        ("    __syncthreads();  // this page has arrived, and everyone is done with the other slot", ""),
    ),
    "G2": source(("s_rmem[n] = n < keys_here ?", "s_rmem[n] = n <= keys_here ?")),
    "G3": source(("row + 1 + seqlen_k", "row + 2 + seqlen_k")),
    "G4": source((
        "&smem.k[slot][n * FRAGMENT][h * FRAGMENT]", "&smem.k[slot][n * FRAGMENT][(h ^ 1) * FRAGMENT]",
    )),
    "G5": source((
        "&smem.v[slot][n * FRAGMENT][h * FRAGMENT]", "&smem.v[1 - slot][n * FRAGMENT][h * FRAGMENT]",
    )),
    "G6": SCALE_TWICE,
    "G50": V_BY_STRIDES_OF_K,
    "G8": source(("head / (params.num_heads_q / params.num_heads_kv)", "head % params.num_heads_kv")),
    "G9": source((
        "wmma::mma_sync(accum[r][h], p[r], v, accum[r][h]);",
        "{\n          wmma::mma_sync(accum[r][h], p[r], v, accum[r][h]);\n"
        "          for (float& x : accum[r][h].x) x = __half2float(__float2half(x));\n        }",
    )),
    "G10": source(("row_sum = rescale * row_sum + page_sum;", "row_sum = row_sum + page_sum;")),
    "G11": source(("__any_sync(~0u, rescale != 1.f)", "__all_sync(~0u, rescale != 1.f)")),
    "G12": source(("r * FRAGMENT + element_row[i]);", "r * FRAGMENT + (element_row[i] ^ 1));")),
    "G13": source(("fmaxf(fabsf(params.softmax_scale) * LOG2_E,", "fmaxf(fabsf(params.softmax_scale),")),
    "G14": source(("+ logf(row_sum)", "+ log2f(row_sum)")),
    "G15": source((
        "if (warp_first_row + r < params.seqlen_q) {",
        "if (warp_first_row + r < params.seqlen_q / 16 * 16) {",
    )),
    "G16": source((
        "(visible_keys(params, last_row) + TILE_N - 1) / TILE_N", "visible_keys(params, last_row) / TILE_N",
    )),
}  # fmt: skip
