"""Bugs planted in the decode kernel, and where each of them shows.

The kernel takes a few query tokens and cuts keys into parts, so that most of its bugs need a problem of their own. In a
traced call two blocks share a head and each has two consumers: four chains of units a head.
"""

from __future__ import annotations

from collections.abc import Mapping

from flashcore import backends
from flashcore.bisection.faults.planting import Edit, Override, Source
from flashcore.bisection.faults.plants.hopper import CLEARED, LATER_PAGES, SHARED, WATCHDOG
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

PLAIN = Problem(batch=2, num_heads_q=8, num_heads_kv=2, seqlen_q=5, seqlen_k=1000, head_dim=64, page_size=64)
"""Two warps with rows, two units in every chain, two pages in a unit, and a tail in both."""
CAUSAL = PLAIN.with_(causal=True)
TWO_HEADS = PLAIN.with_(seqlen_k=700)

# ------------------------------------------------------------------------------- traced calls of another kind


def _two_heads_a_block(self, *arguments):
    packed, blocks, room = _base(self).paged_arguments(self, *arguments)
    traced = arguments[-1]
    return packed, blocks // 2 if traced else blocks, room


def _base(planted):
    """The class of the backend that a bug was planted in."""
    return type(backends.get(planted.id))


TWO_HEADS_A_BLOCK = {"traced_parts": lambda self, problem, unit_keys: 1, "paged_arguments": _two_heads_a_block}
"""A block has all of two heads in a traced call, so that the second shows what the first left behind. No bug itself."""

# ------------------------------------------------------------------------------- where edits go

COPY_K = "      if (lane == 0) mbarrier_arrive_expect_tx(&smem.k_full[at.slot], UNIT_BYTES);\n"
LATE: tuple[Edit, ...] = (
    (
        "  wait_for_kernel_ahead();\n  const int num_heads",
        f"  {CLEARED.format(what='smem.k', threads='THREADS')}wait_for_kernel_ahead();\n  const int num_heads",
    ),
    (COPY_K, f"{COPY_K}      __nanosleep(50000);\n"),
)
"""The producer sleeps before each copy of K, to shared memory that was cleared: no bug by itself."""
# The phase ends with the arrival alone; the bytes count for the one after it.
K_NOT_WAITED_FOR = """      if (lane == 0) {
        mbarrier_arrive(&smem.k_full[at.slot]);
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::
                     "r"(smem_address(&smem.k_full[at.slot])), "r"(UNIT_BYTES) : "memory");
      }
"""

MASK = "    if (!whole) sign_and_mask("
EVERY_UNIT: Edit = (MASK, MASK.replace("if (!whole) ", ""))
"""Every unit goes through the mask, which is where the scores are."""
SCORE = "const float score = scale < 0.f ? -s[i] : s[i];"
UNSCALED_HALF = f"{SCORE.replace('const float', 'float')}\n    score = __half2float(__float2half(score));"
SOFTMAX = "    if (has_rows) softmax.next(s, p, o);\n"
LATE_ERROR = """#pragma unroll
    for (int i = 0; i < UNIT_KEYS / 2; ++i) {
      const bool last_head = number == params.batch * params.num_heads_kv * decode.tiles_a_group - 1;
      const bool last_row = row + 8 * row_of(i) == tile_rows - 1;
      if (last_head && last_row && positions.at(column_of(i, lane)) == length - 1) s[i] += 2.f;
    }
"""
"""One score of the last row and the last key, in the last head: 2 more before the scale."""
VISIBLE = "params.causal ? max(0, length - params.seqlen_q + token + 1) : length;"
LIMIT = "limit[r] = visible_positions(params, length, (row + 8 * r) % params.seqlen_q)"
TABLE = "box.pool_page = paged.page_table_gmem[Index(head.batch) * paged.table_stride"
Q_ROW = """(head.first_head + row / params.seqlen_q) * params.q.head +
         row % params.seqlen_q * params.q.row;"""
LOAD_Q = "load_q(q, params, head, row, lane);"
NEW_SOFTMAX = "      softmax = Softmax(params.softmax_scale);\n"
V_IS_THERE = "    mbarrier_wait(&smem.v_full[slot], at.parity);\n"
V_IS_READ = "    if (lane == 0) mbarrier_arrive(&smem.v_empty[slot]);\n"
P_V = "multiply_p_v(o, p, v_ring.at(slot * UNIT_BYTES), true);"
WEIGHT = "weight = ex2_approx(softmax[j].x - highest);"


def masked(*edits: Edit) -> Source:
    """A bug of a mask, in the source with all masks."""
    return Source(edits, masks=True)


LEFT_EDGE = "if (positions.at(column_of(i, lane)) < positions.begin[row_of(i)]) s[i] = -INFINITY;"
CAP = "    MASKED(if (HAS_SOFTCAP) cap(s, masks.scale_by_cap);)\n"
MASK_AFTER_CAP = "    if (!whole) sign_and_mask(s, params.softmax_scale, limit, positions, lane);\n"
CAP_THEN_SCALE = """    if (HAS_SOFTCAP) {
      cap(s, 1.f / masks.softcap);
      for (int i = 0; i < UNIT_KEYS / 2; ++i) s[i] *= params.softmax_scale;
    }
"""
SINK = "masks.sink_gmem[head.first_head + row / params.seqlen_q] * LOG2_E"
JOIN = "lse = join_sink(fmaxf(sink, UNSEEN), reference, row_sum);"
SUM = "row_sum = row_sum * before + softmax[j].y * weight;"
SINK_OF_PART = f"if (first + j > first_part) row_sum += ex2_approx({SINK} - highest);"

# ------------------------------------------------------------------------------- the bugs

FROM_THE_HEADERS = ("F1", "F2", "G7", "G17", "G18")
"""Bugs of the softmax that this kernel shares with the Hopper kernel."""

DECODE: Plants = {
    **{fault: SHARED[fault] for fault in FROM_THE_HEADERS},
    **{fault: LATER_PAGES[fault] for fault in ("G10", "G21", "G22", "G23", "G24", "G48")},
    "F3": source((
        "for (int i = 0; i < OUTPUTS; ++i) o[i] = 0.f;",
        "for (int i = 0; i < OUTPUTS; ++i) o[i] = __int_as_float(0x7fc00000);",
    )),
    "F6": source(EVERY_UNIT, (SCORE, UNSCALED_HALF)),
    "F7": source(EVERY_UNIT, (SCORE, f"{UNSCALED_HALF}\n    if (!(fabsf(score) < INFINITY)) score = 0.f;")),
    "F9": source((VISIBLE, "length;")),
    "F10": source(("box.pool_page = paged.page_table_gmem[", "box.pool_page = box.page + 0 * paged.page_table_gmem[")),
    "F11": BATCH_STRIDE_IN_BYTES,
    "F12": ONE_K_HEAD,
    "F15": source((SOFTMAX, LATE_ERROR + SOFTMAX)),
    "G1": source(*LATE, (COPY_K, K_NOT_WAITED_FOR)),
    "G2": source(("< limit[row_of(i)] ? score", "<= limit[row_of(i)] ? score")),
    "G3": source((VISIBLE, VISIBLE.replace("+ 1)", "+ 2)"))),
    "G4": source(("block * UNIT_KEYS * ROW_BYTES + bytes)", "block * UNIT_KEYS * ROW_BYTES + (bytes ^ 32))")),
    # A slot that the same consumer took before.
    "G5": source((P_V, P_V.replace("slot * UNIT_BYTES", "slot % NUM_CONSUMERS * UNIT_BYTES"))),
    "G6": SCALE_TWICE,
    "G8": source((
        "(head.first_head + row / params.seqlen_q) * params.q.head",
        "(head.head_kv + row / params.seqlen_q * params.num_heads_kv) * params.q.head",
    )),
    "G14": source(("reference * LN_2 + logf(row_sum);", "reference * LN_2 + log2f(row_sum);")),
    "G15": source((
        "i < head.heads * params.seqlen_q * PIECES;", "i < (head.heads * params.seqlen_q - 1) * PIECES;",
    )),
    "G16": source(("return max(1, (keys + UNIT_KEYS - 1) / UNIT_KEYS);", "return max(1, keys / UNIT_KEYS);")),
    # The first reference of a part is set by the guard as well: without that nothing is finite.
    "G20": source((
        "if (!__all_sync(~0u, fits)) {",
        "if (__any_sync(~0u, !fits && (reference[0] == -INFINITY || reference[1] == -INFINITY))) {",
    )),
    "G25": source(
        (V_IS_READ, ""),
        (V_IS_THERE, f"{V_IS_THERE}{V_IS_READ}    __nanosleep(100000);\n"),
    ),
    "G26": source((" && params.softmax_scale >= 0.f &&", " &&")),
    "G27": source((
        "visible_positions(params, box.length, 0)", "visible_positions(params, box.length, params.seqlen_q - 1)",
    )),
    "G28": source(*WATCHDOG, (COPY_K, COPY_K.replace("UNIT_BYTES", "UNIT_BYTES + ROW_BYTES"))),
    "G29": source((WEIGHT, "weight = 1.f;")),
    "G30": source(("int first = first_part; first < end_part;", "int first = first_part + 1; first < end_part;")),
    "G31": source((
        "highest = fmaxf(reference, softmax[j].x);", "highest = reference == -INFINITY ? softmax[j].x : reference;",
    )),
    "G33": source((
        "num_heads = params.batch * params.num_heads_kv * decode.tiles_a_group;",
        "num_heads = params.batch * params.num_heads_kv * decode.tiles_a_group - 1;",
    )),
    "G34": Source(((LOAD_Q, f"if (sequence == 0) {LOAD_Q}"),), TWO_HEADS_A_BLOCK),
    "G35": source(("    if (!whole)\n      clear_rows<", "    if (!whole && false)\n      clear_rows<")),
    "G36": source((TABLE, TABLE.replace("head.batch", "0"))),
    "G37": source(("row = position & ((1 << paged.page_shift) - 1), into", "row = 0, into")),
    "G38": source(("__shfl_sync(~0u, own_pool_page, from)", "__shfl_sync(~0u, own_pool_page, i * boxes)")),
    "G39": source(("return first[column >> box_shift] +", "return first[0] +")),
    "G40": source((
        Q_ROW,
        "(head.first_head + row % head.heads) * params.q.head + row / head.heads * params.q.row;",
    )),
    "G41": source((LIMIT, f"{LIMIT} + ((row + 8 * r) % params.seqlen_q == 1)")),
    "G42": Source(((NEW_SOFTMAX, ""),), TWO_HEADS_A_BLOCK),
    "G43": Source(
        ((NEW_SOFTMAX, "      softmax.row_sum[0] = softmax.row_sum[1] = 0.f;\n"),), TWO_HEADS_A_BLOCK,
    ),
    "G44": source(("part.taken) + part.taken == all;", "part.taken + 1) + part.taken + 1 == all;")),
    "G46": Override({"tiling": lambda self, problem: (_base(self).tiling(self, problem)[0], _whole_tiles(problem))}),
    "G47": source(("weight[r] = other_keys ? ex2_approx(other.x - highest) : 0.f;", "weight[r] = 1.f;")),
    "G49": source(("if (softmax[j].y == 0.f) continue;", "if (first + j >= end_part) continue;")),
    "G50": V_BY_STRIDES_OF_K,
    "G51": source((
        "      length = paged.lengths_gmem[head.batch];\n      load_q",
        "      length = paged.lengths_gmem[0];\n      load_q",
    )),
    "G52": ROWS_BY_COLUMNS,
    "G53": masked((LEFT_EDGE, LEFT_EDGE.replace("[row_of(i)])", "[row_of(i)] - 1)"))),
    "G54": masked(("        limit[r] = span.end;", "        limit[r] = span.end + 1;")),
    "G55": masked((
        "paged.lengths_gmem[batch]).begin / UNIT_KEYS;",
        "paged.lengths_gmem[batch]).begin / UNIT_KEYS + (masks.window_left > 0);",
    )),
    "G56": masked((CAP + MASK_AFTER_CAP, MASK_AFTER_CAP + CAP)),
    "G57": masked(("constexpr bool HAS_SOFTCAP = FLASHCORE_MASKS & 2;", "constexpr bool HAS_SOFTCAP = false;")),
    "G58": masked((CAP, CAP_THEN_SCALE)),
    "G59": masked(("constexpr bool HAS_SINK = FLASHCORE_MASKS & 4;", "constexpr bool HAS_SINK = false;")),
    "G60": masked((SINK, SINK.replace("[head.first_head +", "[max(1, head.first_head +").replace("q]", "q) - 1]"))),
    "G61": masked((f"{SINK};", f"{SINK} * params.softmax_scale;")),
    "G62": masked(("ex2_approx(fminf(sink - reference, LARGEST_EXPONENT));", "ex2_approx(sink);")),
    "G63": masked((JOIN, f"if (row_sum != 0.f) {JOIN}")),
    "G75": masked((SUM, f"{SUM} {SINK_OF_PART}")),
    "G76": masked(("    if (HAS_SINK) {\n", "    if (HAS_SINK && end_part - first_part > 1) {\n")),
    "G77": masked(("own_position >= of_last.begin &&", "own_position >= of_first.begin &&")),
}  # fmt: skip


def _whole_tiles(problem: Problem) -> int:
    """Tiles that the heads of a group fill."""
    group = problem.num_heads_q // problem.num_heads_kv
    return max(1, group // min(group, 64 // problem.seqlen_q))


SINKS = CAUSAL.with_(seqlen_k=300, sink=True)
MOVING = PLAIN.with_(softmax_scale=1.0)
"""Scores spread so wide that references are raised, with the inputs that rise."""

PROBLEMS: Mapping[str, Problem] = {fault: PLAIN for fault in DECODE} | {
    "F2": CAUSAL.with_(seqlen_q=8, seqlen_k=5),
    "F9": CAUSAL,
    "G3": CAUSAL,
    "G10": MOVING,
    "G22": MOVING,
    "G23": MOVING,
    "G24": MOVING,
    "G25": PLAIN.with_(seqlen_k=3500),
    "G26": PLAIN.with_(softmax_scale=-0.125),
    "G27": CAUSAL.with_(seqlen_k=1024),
    "G34": TWO_HEADS,
    "G37": PLAIN.with_(page_size=256),
    "G38": PLAIN.with_(page_size=16),
    "G39": PLAIN.with_(page_size=16),
    "G41": CAUSAL,
    "G42": TWO_HEADS,
    "G43": TWO_HEADS,
    "G46": PLAIN.with_(num_heads_q=18, seqlen_q=8),
    "G47": PLAIN.with_(seqlen_k=1000),
    "G49": CAUSAL.with_(seqlen_k=130),
    "G53": CAUSAL.with_(window_left=700),
    "G54": PLAIN.with_(window_left=700, window_right=2),
    "G55": CAUSAL.with_(window_left=700),
    "G56": CAUSAL.with_(softcap=1.5),
    "G57": CAUSAL.with_(softcap=1.5),
    "G58": CAUSAL.with_(softcap=1.5),
    "G59": SINKS,
    "G60": SINKS,
    "G61": SINKS,
    "G62": SINKS,
    "G63": SINKS.with_(seqlen_q=8, seqlen_k=5),
    "G75": SINKS,
    "G76": SINKS.with_(seqlen_k=100),
    "G77": CAUSAL.with_(window_left=741),
}
"""Where each bug shows: a chain longer than the ring has slots for G25, a last unit without a tail for G27, pages
larger than a unit for G37 and smaller for G38 and G39, more heads a group than a tile holds for G46, several units a
block for G47, and a part that the first query tokens see no key of for G49. Windows begin within a unit, those of G77
from two keys before a unit's first to two after it; rows of G63 stand before every key and see none, and heads of G76
have one unit each."""
