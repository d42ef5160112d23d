"""Bugs planted in backend `scalar`."""

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
        "    __syncthreads();  // the page before is done with\n",
        "    __syncthreads();  // the page before is done with\n    if (warp == 1) __nanosleep(20000);\n",
    ),
)
"""One warp of each block starts its copies late: a right kernel does not mind, one without a barrier always shows."""

SCALAR: Plants = {
    "F1": source(("row_sum = rescale * row_sum + warp_sum(prob);", "row_sum = rescale * row_sum + prob;")),
    "F2": source(("new_max == -INFINITY ? 0.f : new_max;", "new_max;")),
    "F3": source((
        "float accum[COLUMNS] = {};",
        "float accum[COLUMNS];\n  for (int c = 0; c < COLUMNS; ++c) accum[c] = __int_as_float(0x7fc00000);",
    )),
    "F6": source((
        "score = first_key + lane < keys ? score * params.softmax_scale : -INFINITY;",
        "score = __half2float(__float2half(score));\n"
        "    score = first_key + lane < keys ? score * params.softmax_scale : -INFINITY;",
    )),
    "F7": source((
        "score = first_key + lane < keys ? score * params.softmax_scale : -INFINITY;",
        "score = __half2float(__float2half(score));\n    if (!(fabsf(score) < INFINITY)) score = 0.f;\n"
        "    score = first_key + lane < keys ? score * params.softmax_scale : -INFINITY;",
    )),
    "F9": source(("if (!params.causal) return seqlen_k;", "return seqlen_k;")),
    "F11": BATCH_STRIDE_IN_BYTES,
    "F12": ONE_K_HEAD,
    "F15": source((
        "    // m = max(m, rowmax(S)); while",
        "    if (tile.batch == params.batch - 1 && tile.head == params.num_heads_q - 1 &&\n"
        "        row == params.seqlen_q - 1 && first_key + lane == params.seqlen_k - 1) score += 0.25f;\n"
        "    // m = max(m, rowmax(S)); while",
    )),
    "G1": source(
        *LATE,
        ("v_head[(first_key + key) * params.v.row + d] : zero;\n    }\n    __syncthreads();",
         "v_head[(first_key + key) * params.v.row + d] : zero;\n    }"),
    ),
    "G2": source(("score = first_key + lane < keys ?", "score = first_key + lane <= keys ?")),
    "G3": source(("row + 1 + seqlen_k", "row + 2 + seqlen_k")),
    "G4": source(("to_float(k_smem[lane][d])", "to_float(k_smem[lane][d ^ 8])")),
    "G5": source(("v_head[(first_key + key) * params.v.row + d]", "v_head[key * params.v.row + d]")),
    "G6": SCALE_TWICE,
    "G50": V_BY_STRIDES_OF_K,
    "G7": source(("fmaxf(row_max, warp_max(score))", "fmaxf(row_max, score)")),
    "G8": source(("head / (params.num_heads_q / params.num_heads_kv)", "head % params.num_heads_kv")),
    "G9": source((
        "for (int c = 0; c < COLUMNS; ++c) accum[c] += p * to_float(v_smem[key][c * WARP + lane]);",
        "for (int c = 0; c < COLUMNS; ++c)\n"
        "        accum[c] = __half2float(__float2half(accum[c] + p * to_float(v_smem[key][c * WARP + lane])));",
    )),
    "G10": source(("row_sum = rescale * row_sum + warp_sum(prob);", "row_sum = row_sum + warp_sum(prob);")),
    "G13": source(
        ("ex2_approx((row_max - reference) * LOG2_E)", "ex2_approx(row_max - reference)"),
        ("ex2_approx((score - reference) * LOG2_E)", "ex2_approx(score - reference)"),
    ),
    "G14": source(("row_max + logf(row_sum)", "row_max + log2f(row_sum)")),
    "G15": source(("if (!row_exists) return;", "if (!row_exists || row == params.seqlen_q - 1) return;")),
    "G16": source((
        "(visible_keys(params, last_row) + TILE_N - 1) / TILE_N", "visible_keys(params, last_row) / TILE_N",
    )),
}  # fmt: skip
