"""Say which problems a sweep holds against each other, with masks and in the batch-invariant mode; no torch in here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from flashcore.problem import Problem, square

Lengths = Literal["mixed", "equal", "uniform"]
"""How long sequences are, as `flashcore.numerics.inputs.lengths_of` draws them."""
BESIDE = "beside"
"""What an aim is held against that is not a peer: the problem that is timed in the same rounds."""


@dataclass(frozen=True)
class Workload:
    """A problem with masks, or with none beside one that has some, as a table of speeds shows it."""

    words: str
    problem: Problem
    lengths: Lengths = "mixed"
    beside: Problem | None = None
    """The problem to hold it against, operation by operation, besides the peers; timed in the same rounds."""
    beside_words: str = ""
    against: str = ""
    """What the aim speaks of: a backend's id, or `BESIDE`; empty where there is no aim."""
    aim: float | None = None
    """How many times as fast it is meant to be."""


def _dense(batch: int, seqlen: int, head_dim: int) -> Problem:
    return square(batch, 16, seqlen, head_dim, dtype="bfloat16", causal=True)


def _equal(batch: int, seqlen: int, head_dim: int) -> Workload:
    dense = _dense(batch, seqlen, head_dim)
    return Workload(
        f"ragged batch, {batch} sequences of {seqlen} each, head_dim {head_dim}", dense.with_(lengths="ragged"),
        lengths="equal", beside=dense, beside_words="the same sequences as a dense batch", against=BESIDE, aim=0.97,
    )  # fmt: skip


def _sink(plain: Problem, words: str) -> Workload:
    return Workload(words, plain.with_(sink=True), beside=plain, beside_words="the same without a sink",
                    against=BESIDE, aim=0.99)  # fmt: skip


def _long(head_dim: int) -> tuple[Workload, ...]:
    """4 sequences of 8192 in 16 heads: as a ragged batch, with a sink, and with a softcap."""
    dense, words = _dense(4, 8192, head_dim), f"4 sequences of 8192, head_dim {head_dim}"
    capped = {"against": "fa3", "aim": 1.15} if head_dim == 128 else {}
    return (
        _equal(4, 8192, head_dim),
        _sink(dense, f"a sink, {words}"),
        Workload(f"softcap 30, {words}", dense.with_(softcap=30.0), **capped),
    )


RAGGED = Workload(
    "ragged batch, 32 sequences of 64 to 4096, head_dim 128", _dense(32, 4096, 128).with_(lengths="ragged"),
    lengths="uniform", against="fa3", aim=1.15,
)  # fmt: skip
GROUPED = Problem(batch=1, num_heads_q=64, num_heads_kv=8, seqlen_q=8192, seqlen_k=8192, head_dim=64, dtype="bfloat16",
                  causal=True)  # fmt: skip
NARROW = GROUPED.with_(window_left=1024)
WIDE = GROUPED.with_(window_left=2048)
LONG = NARROW.with_(seqlen_q=32_768, seqlen_k=32_768)
HEADS = "64 heads on 8, head_dim 64"
WINDOW = Workload(f"window 1024, one sequence of 32768, {HEADS}", LONG, against="fa4", aim=1.3)

WORKLOADS: tuple[Workload, ...] = (
    RAGGED,
    _equal(16, 2048, 64), _equal(16, 2048, 128),
    *_long(64), *_long(128),
    WINDOW,
    _sink(LONG, f"window 1024 and a sink, one sequence of 32768, {HEADS}"),
    Workload(f"window 1024, one sequence of 8192, {HEADS}", NARROW, beside=WIDE, beside_words="window 2048"),
    _sink(NARROW, f"window 1024 and a sink, one sequence of 8192, {HEADS}"),
    Workload(f"window 2048, one sequence of 8192, {HEADS}", WIDE, beside=GROUPED, beside_words="no window"),
)  # fmt: skip
"""All are causal, in bfloat16, which every build of FlashAttention-3 takes, and have 16 heads where none are named."""
QUICK = (RAGGED, WINDOW)
"""Those that a quick profile measures."""


def _prefill(batch: int, seqlen: int, head_dim: int, *, causal: bool = False) -> Problem:
    return square(batch, 16, seqlen, head_dim, dtype="bfloat16", causal=causal)


COSTED: tuple[Problem, ...] = (
    _prefill(16, 1024, 64), _prefill(16, 1024, 128), _prefill(16, 2048, 64), _prefill(16, 2048, 128),
    _prefill(8, 4096, 64), _prefill(8, 4096, 128),
    _prefill(2, 8192, 64, causal=True), _prefill(2, 8192, 128, causal=True),
    _prefill(1, 16_384, 64, causal=True), _prefill(1, 16_384, 128, causal=True),
)  # fmt: skip
"""Prefills that are timed without `batch_invariant` and with it: their times in the same rounds say what it costs.

In bfloat16, which every build of FlashAttention-3 takes. The longest have half of the sweep's tokens, since the float64
reference of more would take longer than the timing."""
QUICK_COSTED = COSTED[2:3]
"""The one that a quick profile measures; its ordinary half is there anyhow."""


def problems(profile: str) -> list[Problem]:
    """The problems of a profile's workloads, and those beside them, each once."""
    chosen = QUICK if profile == "quick" else WORKLOADS
    return list(dict.fromkeys(p for w in chosen for p in (w.beside, w.problem) if p is not None))


def costed(profile: str) -> list[Problem]:
    """The problems of a profile that say what `batch_invariant` costs, each without it and with it."""
    chosen = QUICK_COSTED if profile == "quick" else COSTED
    return [p for one in chosen for p in (one, one.with_(batch_invariant=True))]


def ordinary(problem: Problem) -> Problem:
    """The same problem without `batch_invariant`."""
    return problem.with_(batch_invariant=False) if problem.batch_invariant else problem


def kind_of_lengths(problem: Problem) -> Lengths:
    """How long the sequences of a problem are where it is timed: as its workload says, otherwise mixed."""
    return next((w.lengths for w in WORKLOADS if w.problem == ordinary(problem)), "mixed")


def _joined() -> list[tuple[Problem, ...]]:
    """The workloads' problems in sets of those that are to be compared with each other."""
    sets: list[tuple[Problem, ...]] = []
    for workload in WORKLOADS:
        new = tuple(p for p in (workload.beside, workload.problem) if p is not None)
        if workload.beside is None:  # with the others of its shape, which cost nothing more to interleave
            plain = workload.problem.with_(softcap=None)
            new = (plain, workload.problem) if plain != workload.problem else new
        old = [one for one in sets if set(one) & set(new)]
        sets = [one for one in sets if one not in old]
        sets.append(tuple(dict.fromkeys(p for one in (*old, new) for p in one)))
    return sets


def grouped(chosen: Iterable[Problem]) -> list[list[Problem]]:
    """Problems in the order given, those together that are to share their rounds; a problem named twice is one.

    Besides what workloads hold against each other these are a problem without `batch_invariant` and with it.
    """
    there = {problem: ordinary(problem) for problem in chosen}
    partners: dict[Problem, Sequence[Problem]] = {p: one for one in _joined() for p in one}
    groups: list[list[Problem]] = []
    done: set[Problem] = set()
    for problem in there:
        if problem not in done:
            beside = partners.get(there[problem], (there[problem],))
            group = [problem, *(p for p in there if there[p] in beside and p != problem)]
            done.update(group)
            groups.append(group)
    return groups
