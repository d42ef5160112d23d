"""The promises that users of attention count on, each with the cases that it is asked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from flashcore.bisection.diagnosis.calling import Candidate
from flashcore.bisection.diagnosis.promises import bits, memory, streams, values
from flashcore.bisection.diagnosis.promises.asking import Asked, Promise, at_home, plain, right
from flashcore.bisection.diagnosis.promises.values import HIDDEN_FROM, HIDDEN_LENGTH
from flashcore.errors import UnknownName
from flashcore.problem import Problem

TILE_LENGTHS = (63, 64, 65, 127, 129, 197, 777)
"""Lengths around the tiles that kernels have."""
GROUPS = (1, 2, 3, 4, 8)
"""Query heads for each K/V head."""
SCALES = (1e-6, 30.0, -0.125, 0.0)
HUGE = ("large", "steep", "sunken", "rising", "falling")
"""Patterns of inputs whose scores run far."""
CROWD = 24
"""Batches of which one is called alone too."""


def _needs_causal(candidate: Candidate) -> str:
    return "" if "causal" in candidate.takes else "it takes no causal option"


def _needs_scale(candidate: Candidate) -> str:
    return "" if "softmax_scale" in candidate.takes else "it takes no softmax_scale"


def _needs_cuda(candidate: Candidate) -> str:
    return "" if torch.device(candidate.device).type == "cuda" else "a CPU has no streams and no CUDA graphs"


def _needs_pages(candidate: Candidate) -> str:
    return "" if candidate.backend and candidate.backend.paged else "it reads no page table"


def _usual(home: Problem, key: str = "", way: str = "") -> Iterator[tuple[dict, str, str]]:
    for causal in (False, True):
        yield {"causal": causal}, key, way


def _both_masks(*ways: tuple[str, str]) -> Callable[[Problem], Iterator[tuple[dict, str, str]]]:
    """Each way without and with a causal mask."""
    return lambda home: (one for key, way in ways for one in _usual(home, key, way))


def _without_mask(*ways: tuple[str, str]) -> Callable[[Problem], Iterator[tuple[dict, str, str]]]:
    return lambda home: (({"causal": False}, key, way) for key, way in ways)


def _lengths(*pairs: tuple[int, int], causal: bool) -> list[tuple[dict, str, str]]:
    return [({"seqlen_q": rows, "seqlen_k": keys, "causal": causal}, "", "") for rows, keys in pairs]


def _unequal(home: Problem) -> list[tuple[dict, str, str]]:
    some = ((1, 1), (1, 130), (8, 130), (40, 130))
    return [*_lengths(*some, (5, 1), (130, 1), (130, 77), causal=False), *_lengths(*some, (130, 77), causal=True)]


def _around_tiles(home: Problem) -> list[tuple[dict, str, str]]:
    one = {"batch": 1, "num_heads_q": 1, "num_heads_kv": 1}
    return [({**one, "seqlen_q": n, "seqlen_k": n, "causal": causal}, "", "")
            for n in TILE_LENGTHS for causal in (False, True)]  # fmt: skip


def _groups(home: Problem) -> list[tuple[dict, str, str]]:
    return [({"batch": 1, "num_heads_kv": kv, "num_heads_q": kv * group}, "", "")
            for kv in (1, 2) for group in GROUPS]  # fmt: skip


def _empty(home: Problem) -> list[tuple[dict, str, str]]:
    return _lengths((2, 1), (8, 5), (100, 37), (130, 1), (192, 64), causal=True)


def _scales(home: Problem) -> list[tuple[dict, str, str]]:
    return [({"softmax_scale": scale, "causal": causal}, "", "") for scale in SCALES for causal in (False, True)]


def _huge(home: Problem) -> list[tuple[dict, str, str]]:
    dtypes = dict.fromkeys((home.dtype, "float16", "bfloat16"))
    return [({"dtype": dtype}, pattern, f"inputs '{pattern}'") for dtype in dtypes for pattern in HUGE]


def _hidden(home: Problem) -> list[tuple[dict, str, str]]:
    shape = {"batch": 1, "num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": HIDDEN_LENGTH, "seqlen_k": HIDDEN_LENGTH}
    return [({**shape, "causal": True}, key, f"NaN in {key.upper()} from key {HIDDEN_FROM} on") for key in "kv"]


def _beside(home: Problem) -> list[tuple[dict, str, str]]:
    group = home.num_heads_q // home.num_heads_kv
    heads = {"num_heads_kv": 2, "num_heads_q": 2 * group}
    return [({"batch": max(2, home.batch)}, "batch other", "other values in the other batches"),
            ({"batch": max(2, home.batch)}, "batch NaN", "NaN in the other batches"),
            (heads, "head other", "other values in the other K/V heads"),
            (heads, "head NaN", "NaN in the other K/V heads")]  # fmt: skip


def _single(home: Problem) -> list[tuple[dict, str, str]]:
    group = home.num_heads_q // home.num_heads_kv
    # Few rows of many keys: alone they leave a GPU idle, so there a kernel may share out the keys in another way.
    crowd = {"seqlen_q": min(home.seqlen_q, 64), "seqlen_k": 768}
    return [({"batch": max(2, home.batch)}, "batch", "the first batch alone"),
            ({**crowd, "batch": CROWD}, "batch", f"the first of {CROWD} batches alone"),
            ({"num_heads_kv": 2, "num_heads_q": 2 * group}, "head", "the first K/V head alone")]  # fmt: skip


def _paged(home: Problem) -> list[tuple[dict, str, str]]:
    few = {"seqlen_q": min(8, home.seqlen_q), "causal": True}
    return [({**few, "seqlen_k": keys, "page_size": size}, "", "") for keys, size in ((17, 16), (100, 16), (300, 64))]


def _has_neighbours(asked: Asked) -> bool:
    return (asked.problem.batch if asked.key.startswith("batch") else asked.problem.num_heads_kv) > 1


PROMISES: tuple[Promise, ...] = (
    Promise("P1", "ordinary problems", "Ordinary inputs give what float64 gives, within bounds.",
            "every element of `out` and `lse`, with and without a causal mask", _both_masks(("", "")), right),
    Promise("P2", "empty rows", "A row that sees no key gives 0, and lse -inf.",
            "a causal mask with more queries than keys", _empty, values.empty_rows, at_home,
            lambda a: a.problem.causal and a.problem.seqlen_q > a.problem.seqlen_k, _needs_causal),
    Promise("P3", "unequal lengths", "Any two lengths go together: fewer keys or more, one query, one key.",
            "lengths from 1 to 130, with and without a causal mask", _unequal, right, at_home),
    Promise("P4", "lengths around tiles", "Lengths just below, at and just above a tile are like any other.",
            f"lengths {', '.join(map(str, TILE_LENGTHS))}", _around_tiles, right, at_home),
    Promise("P5", "every group", "Any number of query heads may share a K/V head.",
            f"groups of {', '.join(map(str, GROUPS))} query heads", _groups, right, at_home),
    Promise("P6", "past the end", "Memory that is not part of Q, K or V has no influence, and is not written.",
            "views of larger buffers full of NaN: before and after, between heads, beside rows",
            _both_masks(("around", "NaN before and after each tensor"), ("rows", "NaN before and after each length"),
                        ("columns", "NaN beside each row")), memory.past_the_end, memory.past_the_end_plain),
    Promise("P7", "masked keys not read", "Keys that the mask hides from every row of a tile are not read.",
            f"NaN in the keys from {HIDDEN_FROM} on; rows far before them are judged", _hidden, values.masked, plain,
            lambda a: a.problem.causal and a.problem.seqlen_q == a.problem.seqlen_k == HIDDEN_LENGTH, _needs_causal,
            binding=False),
    Promise("P8", "infinities", "An infinity in a key or a query does what it does in float64, and nothing elsewhere.",
            "one element +inf or -inf", _without_mask(*((f"{n} {value}", f"{value} in one element of {n.upper()}")
            for n in "kq" for value in ("inf", "-inf"))), values.planted, plain),
    Promise("P9", "NaN shows, and where it belongs", "A NaN in an input shows in the outputs that depend on it, "
            "and in no other.", "one element NaN",
            _without_mask(*((f"{n} nan", f"NaN in one element of {n.upper()}") for n in "qkv")), values.planted, plain),
    Promise("P10", "misaligned starts", "A tensor may begin at any element.",
            "each of Q, K and V, and all of them, one element past an aligned address",
            _without_mask(*((name, f"{name if name == 'all' else name.upper()} one element late")
                            for name in ("q", "k", "v", "all"))), memory.misaligned, plain),
    Promise("P11", "odd strides", "Strides of rows, heads and batches are free.",
            "rows head_dim + 3 elements apart, heads an odd number apart, a batch stride of 0",
            _both_masks(("odd rows", "rows head_dim + 3 elements apart"), ("odd heads", "heads an odd number apart"),
                        ("expanded", "K and V of one batch for all, by a stride of 0")), memory.strides, plain),
    Promise("P12", "orders in memory", "Batch, heads and rows may lie in memory in any order, each tensor in its own.",
            "heads and rows swapped in all tensors, and each tensor otherwise",
            _both_masks(("other", "heads and rows swapped in memory"), ("apart", "each tensor in another order")),
            memory.orders, plain),
    Promise("P13", "any scale", "softmax_scale may be tiny, large, negative or 0.",
            f"{', '.join(f'{scale:g}' for scale in SCALES)}", _scales, right, plain, why_not=_needs_scale),
    Promise("P14", "huge logits", "Scores that run far give no overflow: the maximum is subtracted in time.",
            "inputs 64 times normal, rising, falling, steep and far below zero, in 16 bits", _huge, right, plain),
    Promise("P15", "same bits again", "The same inputs give the same bits.", f"{bits.REPEATS} calls",
            _both_masks(("", "")), bits.repeats),
    Promise("P16", "bits do not hang on neighbours", "What other batches and heads hold changes no bit.",
            "other values, and NaN, in the other batches and in the other K/V heads", _beside,
            bits.neighbours, bits.steady, _has_neighbours),
    Promise("P17", "same bits alone", "A batch or a head alone has the bits that it has among others.",
            "the first batch and the first K/V head in a call of their own", _single, bits.alone, bits.steady,
            _has_neighbours, binding=False),
    Promise("P18", "inputs stay", "Q, K and V are as they were after the call.", "their bits before and after",
            _both_masks(("", "")), bits.inputs_stay),
    Promise("P19", "current stream", "All work is on torch's current stream.",
            "on a side stream, with inputs that arrive after the call was made", _both_masks(("", "on a side stream")),
            streams.side_stream, plain, why_not=_needs_cuda),
    Promise("P20", "graph replay", "A captured call computes with what its inputs hold when it is replayed.",
            "captured once, replayed on other values, the output erased before", _both_masks(("", "in a CUDA graph")),
            streams.graph_replay, plain, why_not=_needs_cuda),
    Promise("P21", "stale tables", "Pages, table and lengths count as they are now, not as they were at a call before.",
            "moved pages, other values and a key fewer at the same addresses, NaN in every unused slot", _paged,
            streams.stale_pages, None, lambda a: a.problem.seqlen_k > 1, why_not=_needs_pages),
)  # fmt: skip
"""In the order in which they are asked: the first says whether it makes sense to ask the others."""


def chosen(only: str | Iterable[str] | None) -> tuple[Promise, ...]:
    """The promises with these ids, in the order of the registry; all for None.

    Raises
    ------
    UnknownName
        No promise has such an id; the message lists those that exist.
    """
    if only is None:
        return PROMISES
    wanted = [one.strip().upper() for one in (only.split(",") if isinstance(only, str) else only)]
    known = [promise.id for promise in PROMISES]
    for one in wanted:
        if one not in known:
            raise UnknownName("promise", one, known)
    return tuple(promise for promise in PROMISES if promise.id in wanted)
