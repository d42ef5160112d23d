"""Bugs planted in the Hopper kernel: in `hopper` where keys are split, in `hopper-unsplit` where they are not.

Both entry functions stand in one text, and share what the headers hold: softmax, masks, descriptors. `hopper-paged` is
the unsplit one over pages, and has bugs of paging alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from flashcore.bisection.faults.planting import PLAIN, Edit, Source
from flashcore.bisection.faults.plants.host import (
    BATCH_STRIDE_IN_BYTES,
    ONE_K_HEAD,
    ROWS_BY_COLUMNS,
    SCALE_TWICE,
    V_BY_STRIDES_OF_K,
    Plants,
    source,
)
from flashcore.problem import Problem

TWO_SPLITS: Edit = ("NUM_SPLITS = HEAD_DIM == 64 ? 4 : 3;", "NUM_SPLITS = 2;")
"""Two chains of pages in place of four: a small problem then has more than one page in each. No bug by itself."""

# ------------------------------------------------------------------------------- late copies
# Shared memory still holds what an earlier launch left there, which may well be the right page: it is cleared first,
# and the fence makes that seen by the products.

CLEARED = """for (int i = threadIdx.x; i < sizeof({what}) / 4; i += {threads})
    reinterpret_cast<unsigned*>(&{what})[i] = 0;
  asm volatile("fence.proxy.async;" ::: "memory");
  """
Q_IS_ASKED_FOR = "      mbarrier_arrive_expect_tx(&smem.q_full[half], Q_BYTES);\n    }\n"
LOAD_FIRST_PAGES = "    for (int i = 0; i < min(pages, SLOTS); ++i) load_page(i);\n"
Q_IS_THERE = "  mbarrier_wait(&smem.q_full, 0);\n"

UNSPLIT_LATE: tuple[Edit, ...] = (
    (
        "__syncthreads();\n\n  if (threadIdx.x >= CONSUMER_THREADS) {",
        CLEARED.format(what="smem.k", threads="THREADS")
        + "__syncthreads();\n\n  if (threadIdx.x >= CONSUMER_THREADS) {",
    ),
    (Q_IS_ASKED_FOR, f"{Q_IS_ASKED_FOR}    __nanosleep(50000);\n"),
)
"""The producer sleeps between Q and the first page."""
# Whoever loads here also multiplies, and the others of its warpgroup wait for it: no sleep lets them run ahead. So the
# copies are asked for at the last moment, and take a microsecond where the product begins at once.
SPLIT_LATE: tuple[Edit, ...] = (
    (
        "__syncthreads();\n\n  Softmax softmax(",
        CLEARED.format(what="smem.room", threads="BLOCK_THREADS") + "__syncthreads();\n\n  Softmax softmax(",
    ),
    (LOAD_FIRST_PAGES, ""),
    (Q_IS_THERE, f"{Q_IS_THERE}  if (loads) {{\n{LOAD_FIRST_PAGES}  }}\n  __syncwarp();\n"),
)
"""The first pages are asked for once Q is there."""

# A deadlock would only end with the time limit of a whole minute; a barrier that traps says the same in two seconds.
WATCHDOG: tuple[Edit, ...] = (
    (
        '      ".reg .pred done;\\n"\n      "again:\\n"\n',
        '      ".reg .pred done, late;\\n"\n      ".reg .u64 start, now;\\n"\n'
        '      "mov.u64 start, %%globaltimer;\\n"\n      "again:\\n"\n',
    ),
    (
        '      "@!done bra again;\\n"\n',
        '      "@done bra over;\\n"\n      "mov.u64 now, %%globaltimer;\\n"\n      "sub.u64 now, now, start;\\n"\n'
        '      "setp.gt.u64 late, now, 2000000000;\\n"\n      "@late trap;\\n"\n      "bra again;\\n"\n'
        '      "over:\\n"\n',
    ),
)
"""A barrier that is waited for more than two seconds ends the launch."""

# ------------------------------------------------------------------------------- in what both entry functions share

MASK = "const float score = params.softmax_scale < 0.f ? -s[i] : s[i];"
NONE_AS_THEY_ARE: Edit = (
    "return params.softmax_scale < 0.f ? 0 : visible_keys(params, first_row, seqlen_k) / tile_n;",
    "return 0;",
)
"""Every page goes through the mask, which is where both entry functions hold the scores."""
UNSCALED_HALF = f"{MASK.replace('const float', 'float')}\n    score = __half2float(__float2half(score));"
VOTE = "if (!__all_sync(~0u, fits)) {"

SHARED: Plants = {
    "F1": source(("page_sum[row] += odd;", "page_sum[0] += odd;")),
    "F2": source(("highest == -INFINITY ? 0.f : highest;", "highest;")),
    "F6": source(NONE_AS_THEY_ARE, (MASK, UNSCALED_HALF)),
    "F7": source(
        NONE_AS_THEY_ARE,
        (MASK, f"{UNSCALED_HALF}\n    if (!(fabsf(score) < INFINITY)) score = 0.f;"),
    ),
    "F9": source(("if (!params.causal) return seqlen_k;", "return seqlen_k;")),
    "F11": BATCH_STRIDE_IN_BYTES,
    "F12": ONE_K_HEAD,
    "G2": source(("column_of(i, lane) < keys[row_of(i)]", "column_of(i, lane) <= keys[row_of(i)]")),
    "G3": source(("row + 1 + seqlen_k", "row + 2 + seqlen_k")),
    "G4": source(("k.at(block * TILE_N * ROW_BYTES + bytes)", "k.at(block * TILE_N * ROW_BYTES + (bytes ^ 32))")),
    "G6": SCALE_TWICE,
    # Each lane then subtracts the maximum of its own columns, and the trace has that of the first of the four.
    "G7": source(("quad_max(row_max[row]) * scale_log2", "row_max[row] * scale_log2")),
    "G16": source((
        "(visible_keys(params, min(first_row + rows, params.seqlen_q) - 1, seqlen_k) + tile_n - 1) / tile_n",
        "visible_keys(params, min(first_row + rows, params.seqlen_q) - 1, seqlen_k) / tile_n",
    )),
    "G17": source(("p[i / 2] = pack_pair(even, odd);", "p[i / 2 ^ 1] = pack_pair(even, odd);")),
    "G18": source(("fmaxf(fabsf(softmax_scale) * LOG2_E,", "fmaxf(fabsf(softmax_scale),")),
    "G19": source(("    raise_reference(s, [] {});\n", "")),
    "G26": source((NONE_AS_THEY_ARE[0], "return visible_keys(params, first_row, seqlen_k) / tile_n;")),
    "G27": source((NONE_AS_THEY_ARE[0], NONE_AS_THEY_ARE[0].replace("first_row,", "first_row + 63,"))),
    "G28": source(
        *WATCHDOG,
        ("full, ROWS * HEAD_DIM * sizeof(Element));", "full, ROWS * HEAD_DIM * sizeof(Element) + ROW_BYTES);"),
    ),
    "G50": V_BY_STRIDES_OF_K,
}  # fmt: skip
LATER_PAGES: Plants = {
    "G10": source(("      row_sum[row] *= rescale[row];\n", "")),
    "G20": source((VOTE, "if (!fits && false) {")),
    "G21": source((VOTE, "if (!__any_sync(~0u, fits)) {")),
    "G22": source(("      exponentials(s, p, page_sum);\n    }\n", "    }\n")),
    "G23": source(("    rescale_outputs();\n", "")),
    "G24": source(("o[i] *= rescale[row_of(i)];", "o[i] *= rescale[row_of(i) ^ 1];")),
    "G48": source(("FLASHCORE_BF16 ? 1.8446744e19f : 32768.f", "1.8446744e19f")),
}  # fmt: skip
"""In what happens from the second page of a chain on."""

# ------------------------------------------------------------------------------- in masks beyond the causal one


def masked(*edits: Edit) -> Source:
    """A patch of the source with its masks."""
    return Source(edits, masks=True)


MASKS_A_LATER_PAGE = "page * TILE_N MASKED(+ first_key, seqlen_q), seqlen_k, lane);\n"
CAPS_A_LATER_PAGE = "      if (HAS_SOFTCAP && (!whole)) cap(s, masks.scale_by_cap);\n"
CAP = "s[i] = 1.f - 2.f * rcp_approx(1.f + ex2_approx(2.f * LOG2_E * scale_by_cap * s[i]));"
CAPPED_BY_EXPONENTIALS: Edit = (
    "const bool whole = page >= whole_from",
    "const bool whole = false && page >= whole_from",
)
"""No page goes by the series: `cap` is where every score is capped. No bug by itself."""
SINK_OF = "masks.sink_gmem[tile.head] * LOG2_E"
LENGTHS_ARE_READ = "sequence.seqlen_k);\n  return sequence;"
SPANS = "  const Span spans[2] = {seen_by(masks, row, "

IN_WINDOWS: Plants = {
    "G55": masked(("first = of_first.begin / tile_n;", "first = (of_first.begin + tile_n - 1) / tile_n;")),
    "G69": masked(("whole_from = (of_last.begin + tile_n - 1) / tile_n;", "whole_from = of_last.begin / tile_n;")),
    "G70": masked(("0.f MASKED(+ UNSEEN)", "0.f")),
    "G73": masked((
        "at = let_pass(at, uniform(smem.work[0].of[consumer].pages_before));",
        "at = let_pass(at, 0 * uniform(smem.work[0].of[consumer].pages_before));",
    )),
    # The ring comes round to a slot that one warpgroup never handed back.
    "G74": masked(*WATCHDOG, ("      release(&smem.k_empty[from.slot]);\n", "")),
}  # fmt: skip
"""Where a window begins: in how warpgroups share pages, of which tiles of other heights have others."""
IN_MASKS: Plants = {
    **IN_WINDOWS,
    "G53": masked(("position - masks.window_left));", "position - masks.window_left - 1));")),
    "G54": masked(("position + masks.window_right + 1));", "position + masks.window_right + 2));")),
    "G56": masked(
        (CAPS_A_LATER_PAGE, ""),
        (MASKS_A_LATER_PAGE, f"{MASKS_A_LATER_PAGE}#ifdef FLASHCORE_MASKS\n{CAPS_A_LATER_PAGE}#endif\n"),
    ),
    "G57": masked(CAPPED_BY_EXPONENTIALS, (CAP, "s[i] *= scale_by_cap;")),
    # With 64 columns the usual scale is an eighth.
    "G58": masked(
        CAPPED_BY_EXPONENTIALS,
        (CAP, f"{CAP.replace('scale_by_cap', '8.f * scale_by_cap')}\n  for (float& score : s) score *= 0.125f;"),
    ),
    "G59": masked(("MASKED(HAS_SINK ? join_sink(", "MASKED(HAS_SINK && false ? join_sink(")),
    "G60": masked((SINK_OF, SINK_OF.replace("tile.head", "(tile.head + params.num_heads_q - 1) % params.num_heads_q"))),
    "G61": masked((SINK_OF, f"{SINK_OF} * params.softmax_scale")),
    "G62": masked(("row_sum += ex2_approx(fminf(sink - reference, LARGEST_EXPONENT))", "row_sum += ex2_approx(sink)")),
    "G63": masked(("return highest <= UNSEEN ? -INFINITY", "return reference <= UNSEEN ? -INFINITY")),
    "G64": masked(("min(rows, seqlens_gmem[nth]))", "min(rows, seqlens_gmem[max(0, nth - 1)]))")),
    "G65": masked(("first = left ? rows - seqlen : 0;", "first = 0;")),
    "G66": masked((SPANS, f"  row += params.seqlen_k - params.seqlen_q - (seqlen_k - seqlen_q);\n{SPANS}")),
    "G67": masked((LENGTHS_ARE_READ, LENGTHS_ARE_READ.replace("  return", "  ++sequence.seqlen_k;\n  return"))),
    "G68": masked((
        "&smem.k_full[at.slot], page * TILE_N MASKED(+ first_key),",
        "&smem.k_full[at.slot], page * TILE_N MASKED(+ first_key - 1),",
    )),
    "G71": masked(("rows.sequence.seqlen_q, listed.nth);", "rows.sequence.seqlen_q, max(0, int(listed.nth) - 1));")),
    "G72": masked((
        "    if (!whole_warp)\n      store_out_rows(", "    if (!whole_warp && false)\n      store_out_rows(",
    )),
}  # fmt: skip

# ------------------------------------------------------------------------------- in one entry function


def _late_error(is_last_tile: str, first_key: str) -> str:
    """One score of the last row and the last key, in the last tile: 2 more before the scale."""
    return f"""
      if ({is_last_tile}) {{
#pragma unroll
        for (int i = 0; i < 32; ++i) {{
          const bool last_row = row + 8 * row_of(i) == params.seqlen_q - 1;
          if (last_row && {first_key} + column_of(i, lane) == params.seqlen_k - 1) s[i] += 2.f;
        }}
      }}"""


NAN_FIRST = "\n  for (float& x : o) x = __int_as_float(0x7fc00000);"
"""What is left in registers has to be the same in every run."""
IN_HALF = "for (float& x : o) x = __half2float(__float2half(x));\n      "

UNSPLIT_STATE = "float s[TILE_N / 2], o[OUTPUTS];"
UNSPLIT_MASK = "if (page >= whole_pages)\n        sign_and_mask(s, params, row, page * TILE_N, seqlen_k, lane);"
UNSPLIT_P_V = "multiply_p_v(o, p, v_ring.at(at.slot * PAGE_BYTES), page > 1);"
UNSPLIT_ACCUM = ("TRACE(stages.accum(page - 1, o);)", "TRACE(if (pages > 0) stages.accum(pages - 1, o);)")
V_IS_THERE = "      mbarrier_wait(&smem.v_full[at.slot], at.parity);\n      PAGED("
V_IS_READ = "      release(&smem.v_empty[at.slot]);\n      at = k_at;"
NEXT_PAGE = "for (int page = 0; page < pages; ++page, at = at.next()) {\n    mbarrier_wait"

UNSPLIT: Plants = {
    **SHARED,
    **IN_MASKS,
    **LATER_PAGES,
    "F3": source((UNSPLIT_STATE, UNSPLIT_STATE + NAN_FIRST), (UNSPLIT_P_V, UNSPLIT_P_V.replace("page > 1", "true"))),
    "F15": source((
        UNSPLIT_MASK,
        UNSPLIT_MASK
        + _late_error(
            "work.tile.batch == params.batch - 1 && work.tile.head == params.num_heads_q - 1", "page * TILE_N"
        ),
    )),
    "G1": source(*UNSPLIT_LATE, ("  if (any) mbarrier_wait(&smem.k_full[0], 0);\n", "")),
    "G5": source((UNSPLIT_P_V, UNSPLIT_P_V.replace("at.slot * PAGE_BYTES", "0"))),
    "G8": source((" head / (params.num_heads_q / params.num_heads_kv)", " head % params.num_heads_kv")),
    "G9": source(*((accum, IN_HALF + accum) for accum in UNSPLIT_ACCUM)),
    "G14": source(("(reference + lg2_approx(row_sum)) * LN_2", "reference * LN_2 + lg2_approx(row_sum)")),
    "G15": source((
        "tma_store_4d(lane == 0 && ",
        "tma_store_4d(first_row + (warp + 1) * WARP_ROWS < params.seqlen_q && lane == 0 && ",
    )),
    "G25": source(
        (V_IS_THERE, V_IS_THERE.replace(
            "      PAGED", "      release(&smem.v_empty[at.slot]);\n      __nanosleep(100000);\n      PAGED",
        )),
        (V_IS_READ, "      at = k_at;"),
    ),
    # The producer is late, so that the consumers have emptied the slot for sure when it comes round to it.
    "G32": source(
        *WATCHDOG,
        (
            NEXT_PAGE,
            NEXT_PAGE.replace("at = at.next()", "at = {at.next().slot, 0}").replace(
                "    mbarrier", "    __nanosleep(100000);\n    mbarrier"
            ),
        ),
    ),
    "G33": source((
        "last_round = tiles * heads / blocks, left = tiles * heads - last_round * blocks;",
        "last_round = (tiles * heads - 1) / blocks, left = tiles * heads - 1 - last_round * blocks;",
    )),
    "G34": source(("q = q_halves.at(half * Q_BYTES);", "q = q_halves;")),
}  # fmt: skip

SPLIT_STATE = "float s[PAGE_KEYS / 2], o[OUTPUTS];"
SPLIT_FIRST_MASK = "if (split >= whole_pages) sign_and_mask(s, params, row, split * PAGE_KEYS, params.seqlen_k, lane);"
SPLIT_LAST_P_V = "multiply_p_v(o, p, v_slots.at((pages - 1) % SLOTS * SLOT_BYTES), pages > 1);"
SPLIT_ACCUM = (
    "TRACE(stages.accum(page - NUM_SPLITS, o);)",
    "TRACE(stages.accum(split + (pages - 1) * NUM_SPLITS, o);)",
)
REFILL = (
    "      if (i - 1 + SLOTS < pages) {\n"
    "        barrier_sync(own_barrier, WARPGROUP);  // all four warps are done with the last page\n"
    "        if (loads) load_page(i - 1 + SLOTS);\n"
    "      }\n"
)
SPLIT_PRODUCTS = "      wgmma_fence();\n      multiply_q_k<TILE_ROWS, PAGE_KEYS>(s, q, k_slots.at(slot * SLOT_BYTES));"

SPLIT: Plants = {
    **SHARED,
    **IN_WINDOWS,  # no keys are split under a mask: the unsplit entry function, with the smaller tile of few rows
    **{fault: Source((TWO_SPLITS, *plant.edits)) for fault, plant in LATER_PAGES.items()},
    "F3": source(
        (SPLIT_STATE, SPLIT_STATE + NAN_FIRST),
        (SPLIT_LAST_P_V, SPLIT_LAST_P_V.replace("pages > 1", "true")),
    ),
    "F15": source((
        SPLIT_FIRST_MASK,
        SPLIT_FIRST_MASK
        + _late_error("tile.batch == params.batch - 1 && tile.head == params.num_heads_q - 1", "split * PAGE_KEYS"),
    )),
    "G1": source(*SPLIT_LATE, ("  if (pages > 0) mbarrier_wait(&smem.k_full[split][0], 0);\n", "")),
    "G5": source(TWO_SPLITS, (SPLIT_LAST_P_V, SPLIT_LAST_P_V.replace("(pages - 1) % SLOTS * SLOT_BYTES", "0"))),
    "G8": source(("blockIdx.y / (params.num_heads_q / params.num_heads_kv)", "blockIdx.y % params.num_heads_kv")),
    "G9": source(TWO_SPLITS, *((accum, IN_HALF + accum) for accum in SPLIT_ACCUM)),
    "G14": source(("+ logf(row_sum);", "+ log2f(row_sum);")),
    "G15": source(("if (out_row >= params.seqlen_q) break;", "if (out_row >= params.seqlen_q - 1) break;")),
    # All four warps have seen the page arrive before it is overwritten; the sleep is for the copy that overwrites it.
    "G25": source((REFILL, ""), (SPLIT_PRODUCTS, f"{REFILL}      __nanosleep(100000);\n{SPLIT_PRODUCTS}")),
    "G29": source(("weight = ex2_approx(smem.reference[split][row] - highest);", "weight = 1.f;")),
    "G30": source((
        "for (int split = 0; split < NUM_SPLITS; ++split) {\n      const float sum",
        "for (int split = 1; split < NUM_SPLITS; ++split) {\n      const float sum",
    )),
    "G31": source(("highest = fmaxf(highest, smem.reference[split][row]);", "highest = smem.reference[0][row];")),
    # A warpgroup that saw no key of a row has subtracted 0 there, which may be far above what the others did.
    "G49": source(("row_sum == 0.f ? -INFINITY : softmax.reference[r];", "softmax.reference[r];")),
}  # fmt: skip

CLEARS_V = "if (pages > 0 && left < TILE_N)"

PAGED: Plants = {
    "F10": source(("max(-1, table_gmem[key >> paged.page_shift])", "(key >> paged.page_shift) + 0 * table_gmem[0]")),
    "G35": source((CLEARS_V, CLEARS_V.replace("left < TILE_N", "false"))),
    "G36": source(("paged.page_table_gmem + Index(tile.batch) *", "paged.page_table_gmem + Index(0) *")),
    "G37": source(("row = (page * TILE_N + own_key) & ~(-1 << paged.page_shift);", "row = own_key;")),
    "G38": source(("__shfl_sync(~0u, looked, first_box + own_box)", "__shfl_sync(~0u, looked, first_box)")),
    "G50": V_BY_STRIDES_OF_K,
    "G51": source(("PAGED(return paged.lengths_gmem[batch];)", "PAGED(return paged.lengths_gmem[0];)")),
    "G52": ROWS_BY_COLUMNS,
}  # fmt: skip
PAGED_PROBLEMS: Mapping[str, Problem] = {"G37": PLAIN.with_(page_size=128), "G38": PLAIN.with_(page_size=16)}
"""Pages larger and smaller than a tile of keys."""
