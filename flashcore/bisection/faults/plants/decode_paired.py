"""Bugs planted in the decode kernel by pairs: those of the decode kernel, where its text is another one.

In a traced call two blocks share a head, each with one chain of units; and a head of one unit is one block's alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from flashcore.bisection.faults.planting import Source
from flashcore.bisection.faults.plants import decode
from flashcore.bisection.faults.plants.decode import LOAD_Q, P_V, SINK, TWO_HEADS_A_BLOCK, masked
from flashcore.bisection.faults.plants.host import Plants, source
from flashcore.problem import Problem

OF_TWO_WARPGROUPS = ("G47",)
"""Bugs of what one warpgroup of a block lends to the other: here there is one."""
WEIGHT = "const float weight = part.softmax.y == 0.f ? 0.f : ex2_approx(part.softmax.x - highest);"
HIGHEST = "if (softmax.y != 0.f) highest = fmaxf(highest, softmax.x);"
SUM = "row_sum += part.softmax.y * weight;"
ROWS = "const int all_rows = head.heads * params.seqlen_q, tile_rows"
FIRST_PART = "const int first_part = number + shares.block_of(smem.first_unit[number]);"
SINK_OF_ALONE = "    if (HAS_SINK) {\n      const float sink = masks.sink_gmem[head.first_head + (row + 8 * r)"
JOIN_OF_ALONE = "lse = join_sink(fmaxf(sink, UNSEEN), reference[r], row_sum[r]);"

PAIRED: Plants = {
    **{fault: plant for fault, plant in decode.DECODE.items() if fault not in OF_TWO_WARPGROUPS},
    "G5": source((P_V, P_V.replace("slot * UNIT_BYTES", "(slot ^ 1) * UNIT_BYTES"))),
    "G15": source((ROWS, ROWS.replace("seqlen_q,", "seqlen_q - 1,"))),
    "G29": source((WEIGHT, "const float weight = 1.f;")),
    "G30": source((FIRST_PART, FIRST_PART.replace(";", " + 1;"))),
    "G31": source((HIGHEST, "if (highest == -INFINITY) highest = softmax.x;")),
    "G34": Source(((LOAD_Q, f"if (number % 2 == 0) {LOAD_Q}"),), TWO_HEADS_A_BLOCK),
    "G49": source((HIGHEST, "highest = fmaxf(highest, softmax.x);")),
    "G63": masked((JOIN_OF_ALONE, f"if (row_sum[r] != 0.f) {JOIN_OF_ALONE}")),
    "G75": masked((SUM, f"{SUM} if (first + j > 0) row_sum += ex2_approx({SINK} - highest);".replace(
        "row / params", "(first_row + nth) / params",
    ))),
    "G76": masked((SINK_OF_ALONE, SINK_OF_ALONE.replace("(HAS_SINK)", "(HAS_SINK && params.batch == 0)"))),
}  # fmt: skip

PROBLEMS: Mapping[str, Problem] = {fault: decode.PROBLEMS[fault] for fault in PAIRED}
