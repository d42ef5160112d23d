"""The catalogue of planted bugs, which prove that bisection finds each one, and at the stage that made it.

F-numbers are bugs that once cost somebody days; G-numbers are mistakes that a kernel writer makes on any ordinary day.
Each bug names the stage at which it has to be found. Bisection is never told which bug is planted. How each is planted
in each backend stands in `flashcore.bisection.faults.plants`.
"""

from __future__ import annotations

from typing import Any

from flashcore.bisection.faults import plants
from flashcore.bisection.faults.planting import PLAIN, Fault
from flashcore.bisection.faults.plants import page_selection
from flashcore.bisection.faults.plants.host import source
from flashcore.errors import UnknownName
from flashcore.problem import Problem, square

CAUSAL = PLAIN.with_(causal=True)
EMPTY_ROWS = PLAIN.with_(causal=True, seqlen_q=200, seqlen_k=77)
"""More queries than keys: the first 123 rows see no key, and the last of them share a tile with rows that do."""
LONG_CHAINS = PLAIN.with_(seqlen_q=256, seqlen_k=1100)
"""More pages than any ring has slots, and rows for every warpgroup of a tile: none lets pages go by unread."""
MANY_TILES = PLAIN.with_(batch=1, num_heads_q=200, num_heads_kv=100, seqlen_q=64)
"""More tiles than an H100 or H200 has multiprocessors (132 at most): some blocks get a second one."""
ROWS_OF_2048 = square(1, 2, 2048, 64)
"""Products large enough that cuBLASLt offers algorithms with different tiles."""
WINDOW = PLAIN.with_(window_left=40, window_right=25)
"""A window whose edges cut pages on both sides."""
CAPPED = PLAIN.with_(causal=True, softcap=1.5)
"""A cap that bends ordinary scores."""
SINK = PLAIN.with_(sink=True)
PADDED = PLAIN.with_(causal=True, lengths="right")
RAGGED = PLAIN.with_(lengths="ragged")
SINK_ALONE = PLAIN.with_(batch=4, causal=True, sink=True, lengths="left")
"""One of the sequences has no key at all."""
MANY_PAGES = Problem(batch=2, num_heads_q=8, num_heads_kv=2, seqlen_q=1, seqlen_k=4096, head_dim=64, page_size=16)
"""Pages for every warp of the kernel that selects some of them."""


def _fault(fault_id: str, title: str, stage: str, looks_like: str, **more: Any) -> Fault:
    more = {"plants": plants.of_fault(fault_id), "problems": plants.problems_of(fault_id), **more}
    return Fault(fault_id, title, stage, looks_like, **more)


FAULTS: tuple[Fault, ...] = (
    _fault("F1", "softmax state of one row reused for others", "row_sum", "finite or Inf, wrong"),
    _fault("F2", "fully masked rows: -inf minus -inf", "rescale", "NaN", problem=EMPTY_ROWS),
    _fault("F3", "page 0 rescales an accumulator that was never initialised", "accum", "NaN"),
    _fault(
        "F4", "tail of K or V set as columns where rows are meant", "scores", "a status code, or wrong scores",
        error_is_found=True,
    ),
    _fault(
        "F5", "a 4-byte value given for a 64-bit layout attribute", "scores", "a status code, if it is checked",
        error_is_found=True,
    ),
    _fault(
        "F6", "scores kept in 16 bits before they are scaled", "scores", "Inf or NaN for large inputs",
        pattern="large",
    ),
    _fault("F7", "a guard that launders non-finite scores into zeros", "scores", "finite, wrong", pattern="large"),
    _fault(
        "F8", "fragments stored by a wrong lane map: 256 cells of a tile written, the rest stale", "scores",
        "finite, wrong",
    ),
    _fault("F9", "causal flag ignored", "scores", "finite, wrong", problem=CAUSAL),
    _fault("F10", "page indices never looked up", "scores", "right while pages lie in order, wrong or NaN otherwise"),
    _fault(
        "F11", "batch stride given in bytes, not in elements", "scores", "wrong sequence, or out of bounds",
        may_crash=True, crash_is_found=True,
    ),
    _fault("F12", "one K head broadcast to all heads", "scores", "finite, wrong from head 1 on"),
    _fault(
        "F13", "racy base offset in the page list", "page table", "overlap, changes from run to run",
        plants={page_selection.KERNEL: source(*page_selection.RACY_BASE)}, problem=MANY_PAGES, found_by="selection",
    ),
    _fault(
        "F14", "the algorithm surveyed is not the one run", "survey", "label unlike the kernel",
        problem=ROWS_OF_2048, found_by="labels",
    ),
    _fault(
        "F15", "one element of the last page and the last head wrong: what a tracer of page 0 misses", "scores",
        "finite, one element slightly wrong",
    ),
    _fault(
        "F16", "a verdict read the wrong way round", "report", "a false pass",
        held_by="tests/bisection/faults/test_catalogue.py plants it in the verdict, in the tables' words and in the "
        "audit of the SASS",
    ),
    _fault(
        "G1", "missing barrier: a page is used before it has arrived", "scores", "changes from run to run",
        may_crash=True,
    ),
    _fault("G2", "off by one at the end of the keys: a key that does not exist is counted", "row_sum",
           "finite, wrong; NaN where a page holds no more keys"),
    _fault(
        "G3", "off by one on the diagonal: a row sees the key after its own", "scores", "finite, wrong",
        problem=CAUSAL,
    ),
    _fault(
        "G4", "wrong swizzle: pieces of K's rows read in another order than they were written", "scores",
        "finite, wrong",
    ),
    _fault("G5", "stale ring slot: V of another page", "accum", "finite, wrong"),
    _fault("G6", "scale applied twice", "scores", "finite, too even"),
    _fault("G7", "maximum not reduced across lanes", "probs", "finite, wrong"),
    _fault("G8", "query heads mapped to K/V heads by remainder instead of by group", "scores", "finite, wrong"),
    _fault("G9", "accumulator kept in 16 bits", "accum", "finite, a little wrong"),
    _fault("G10", "row sum not rescaled when the maximum moves", "row_sum", "finite, wrong", pattern="rising"),
    _fault("G11", "accumulator rescaled only when every row of the warp asks for it", "accum", "finite, wrong"),
    _fault("G12", "rescale factor of a neighbouring row", "accum", "finite, wrong"),
    _fault("G13", "exponential of base 2 without log2(e)", "rescale", "finite, too even"),
    _fault("G14", "lse with a logarithm of base 2", "lse", "out is right, lse is not"),
    _fault("G15", "the tail of the query rows is never written", "out", "stale memory in the last rows"),
    _fault("G16", "the last, partial page is dropped", "scores", "finite, wrong"),
    _fault("G17", "probs of one row taken for those of another: a wrong lane map", "probs", "finite, wrong"),
    _fault("G18", "exponential of base 2 without log2(e), all in one factor", "probs", "finite, too even"),
    _fault("G19", "the reference of the first page never set", "row_max", "NaN"),
    _fault("G20", "no guard: probs outgrow a reference that went stale", "row_max", "NaN or Inf", pattern="large"),
    _fault("G21", "a reference raised only when every row of the warp outgrew it", "row_max", "NaN or Inf",
           pattern="large"),
    _fault("G22", "a page not done again after its reference was raised", "probs", "finite or Inf, wrong",
           pattern="rising"),
    _fault("G23", "accumulator not rescaled when the reference is raised", "accum", "finite, wrong", pattern="rising"),
    _fault("G24", "accumulator rescaled by the factor of the thread's other row", "accum", "finite, slightly wrong",
           pattern="rising"),
    _fault("G25", "a slot of V handed back before its page was read", "accum", "changes from run to run",
           problem=LONG_CHAINS, may_crash=True),
    _fault("G26", "the sign of a negative scale lost on pages without a mask", "scores", "finite, wrong",
           problem=PLAIN.with_(softmax_scale=-0.125)),
    _fault("G27", "pages called whole by the last row of a tile instead of its first", "scores", "finite, wrong",
           problem=CAUSAL),
    _fault("G28", "a barrier that expects more bytes than are copied", "scores", "a hang", may_crash=True,
           crash_is_found=True),
    _fault("G29", "chains of pages added up without their weights", "out", "finite, wrong"),
    _fault("G30", "one of the chains of pages left out", "out", "finite, wrong"),
    _fault("G31", "chains weighed against the maximum of the first alone", "out", "NaN for large inputs",
           pattern="large"),
    _fault("G32", "the parity of a ring never flips", "scores", "a hang", problem=PLAIN.with_(seqlen_k=1000),
           may_crash=True, crash_is_found=True),
    _fault("G33", "the last tile never dealt out", "scores", "stale memory in the last head"),
    _fault("G34", "Q of another tile, from a block's second tile on", "scores", "finite, wrong", problem=MANY_TILES),
    _fault("G35", "rows of V past the end of a sequence not cleared: zero times NaN", "accum", "NaN"),
    _fault("G36", "the first sequence's row of the page table taken for all", "scores", "another sequence's keys"),
    _fault("G37", "the offset within a page ignored: pages larger than a tile of keys", "scores", "finite, wrong"),
    _fault("G38", "one page looked up for a whole tile of keys: pages smaller than that", "scores", "finite, wrong"),
    _fault("G39", "positions of a tile's keys counted on from its first page", "row_sum", "NaN or finite, wrong"),
    _fault("G40", "query rows of a tile read by token and written by head", "scores", "finite, wrong"),
    _fault("G41", "the second of several query tokens sees the key after its own", "scores", "finite, one row wrong"),
    _fault("G42", "the softmax of one head carried on into the next", "row_sum", "finite, wrong"),
    _fault("G43", "the reference of one head kept for the next", "row_max", "zeros or NaN for large inputs",
           pattern="large"),
    _fault("G44", "units of a part miscounted: the parts of a head are never all there", "out", "stale memory"),
    _fault("G46", "query heads of a group past the last whole tile left out", "scores", "stale memory in some heads"),
    _fault("G47", "half of a part added as it is, whatever maximum it was taken against", "out", "finite, wrong"),
    _fault("G48", "the guard of bfloat16 in float16's place: probs past float16's largest number", "row_max",
           "NaN or Inf where scores climb", pattern="steep"),
    _fault("G49", "a chain that saw no key of a row counts with a reference of 0", "out",
           "zeros where all scores lie far below zero", pattern="sunken", problem=CAUSAL),
    _fault("G50", "V addressed by K's strides", "accum", "right while K and V lie in one order, wrong otherwise"),
    _fault("G51", "the first sequence's length taken for all", "scores", "right while all are of one length"),
    _fault("G52", "rows of the page table found by their columns, not by their stride", "scores",
           "right while the table has no room to spare, another sequence's keys otherwise"),
    _fault("G53", "window one key too wide on the left", "scores", "finite, slightly wrong", problem=WINDOW),
    _fault("G54", "window one key too wide on the right", "scores", "finite, slightly wrong", problem=WINDOW),
    _fault("G55", "a page that the left edge of a window cuts taken for one before it", "scores", "finite, wrong",
           problem=WINDOW),
    _fault("G56", "softcap after the mask: a hidden key scores minus the cap", "scores", "finite, wrong",
           problem=CAPPED),
    _fault("G57", "softcap forgotten", "scores", "right while scores are far below the cap", problem=CAPPED),
    _fault("G58", "softcap taken before the scale", "scores", "finite, too even", problem=CAPPED),
    _fault("G59", "sink forgotten", "out", "finite, too large", problem=SINK),
    _fault("G60", "sink of the head before", "out", "finite, wrong", problem=SINK),
    _fault("G61", "sink multiplied by the softmax scale", "out", "finite, wrong", problem=SINK),
    _fault("G62", "sink added without being weighed against the row's maximum", "out", "finite, wrong", problem=SINK),
    _fault("G63", "sink left out of a row that sees no key", "lse", "out is right, lse is -inf", problem=SINK_ALONE),
    _fault("G64", "lengths of the sequence before", "scores", "right while all are of one length", problem=PADDED),
    _fault("G65", "left padding taken for right padding", "scores", "another part of each sequence, or NaN",
           problem=PADDED.with_(lengths="left")),
    _fault("G66", "causal mask aligned by the padded lengths", "scores", "finite, wrong", problem=PADDED),
    _fault("G67", "off by one at the end of a sequence: a key of its padding is seen", "scores", "finite, wrong",
           problem=PADDED.with_(causal=False)),
    _fault("G68", "keys of a ragged sequence read from one row early", "scores", "another sequence's last key",
           problem=RAGGED),
    _fault("G69", "a page that the left edge of a window cuts taken as one without a mask", "scores", "finite, wrong",
           problem=PLAIN.with_(window_left=40)),
    _fault("G70", "a reference of 0 for a row that sees no key of the first pages", "row_max",
           "zeros where all scores lie far below zero", pattern="sunken",
           problem=PLAIN.with_(causal=True, window_left=8)),
    _fault("G71", "a tile of a ragged batch taken for the one before it in its sequence", "scores",
           "right while no sequence is longer than a tile, stale memory in the last rows of others",
           problem=RAGGED.with_(seqlen_q=600)),
    _fault("G72", "the last rows of a sequence never written where they are not a whole warp's", "out",
           "stale memory in a few rows", problem=PADDED),
    _fault("G73", "pages that only earlier rows of a tile see taken for a warpgroup's own", "scores", "finite, wrong",
           problem=WINDOW),
    _fault("G74", "pages before a warpgroup's own never handed back", "scores", "a hang where the ring comes round",
           problem=PLAIN.with_(seqlen_k=1000, window_left=700, window_right=25), may_crash=True, crash_is_found=True),
    _fault("G75", "sink counted by each part that a row's keys are cut into", "out", "too small where keys are split",
           problem=SINK),
    _fault("G76", "sink forgotten where one part has all keys of a row", "out", "right for long sequences",
           problem=SINK),
    _fault("G77", "a page taken for whole though the windows of later queries begin in it", "scores",
           "finite, slightly wrong", problem=WINDOW),
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
