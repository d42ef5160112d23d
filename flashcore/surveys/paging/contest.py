"""Time several ways of one decode step in the same rounds: each is checked first, and one that is not there is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore import backends
from flashcore.decision import claims
from flashcore.errors import BackendUnavailable, FlashCoreError, Unsupported
from flashcore.gpu import device
from flashcore.measure.timing import Candidate
from flashcore.paged_ops import paged_problem_of
from flashcore.paging import PagedKV
from flashcore.problem import Problem
from flashcore.records import Timing
from flashcore.surveys.paging import peers
from flashcore.surveys.paging.expected import Expected, expect
from flashcore.surveys.paging.plan import Plan
from flashcore.surveys.paging.serving_facts import AS_ROWS, DENSE
from flashcore.surveys.paging.trials import Book, compact, over, ready, time_calls, worth

CHECKED = 8
"""Sequences of a batch whose results are held against float64; all results have to be finite."""
HEADROOM = 3.0
"""Free memory over the bytes of K and V: they lie there contiguous, in pages, and while they are copied."""

Call = Callable[[int], tuple[torch.Tensor, torch.Tensor | None]]


class Judge:
    """What a step has to give, on sequences from the shortest to the longest, and all of it finite."""

    def __init__(self, q: torch.Tensor, cache: PagedKV):
        order = torch.argsort(cache.lengths, stable=True)
        place = torch.linspace(0, cache.batch - 1, min(CHECKED, cache.batch), device=order.device).round().long()
        self.rows, self.q, self.cache = order[place], q, cache
        self._known: dict[tuple[bool, bool], Expected] = {}

    def expected(self, causal: bool, round_scores: bool) -> Expected:
        """The exact results of those sequences, worked out once."""
        if (causal, round_scores) not in self._known:
            self._known[causal, round_scores] = self._expect(causal, round_scores)
        return self._known[causal, round_scores]

    def _expect(self, causal: bool, round_scores: bool) -> Expected:
        cache, rows = self.cache, self.rows
        fewer = PagedKV(cache.k_pool, cache.v_pool, cache.page_table[rows], cache.lengths[rows],
                        max_length=cache.max_length, lengths_fit=cache.lengths_fit, holes=cache.holes)  # fmt: skip
        return expect(self.q[rows], fewer, causal=causal, round_scores=round_scores)

    def wrong(self, call: Call, backend: str, causal: bool) -> str | None:
        """What is wrong with the results of a backend's call on set 0, in a sentence."""
        out, lse = call(0)
        if not bool(out.isfinite().all()):
            return f"{int((~out.isfinite()).sum())} elements of out are not finite"
        wanted = self.expected(causal, backends.get(backend).rounds_scores)
        return wanted.judge(out[self.rows], None if lse is None else lse[self.rows])[1]


@dataclass(frozen=True)
class Way:
    """One way to take a step."""

    name: str
    backend: str
    problem: Problem
    make: Callable[[], Call]
    """What readies the call of a set's number; it raises where there is none."""
    judge: Judge
    """Of its results."""
    against: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Other ways that it is compared with, by what they are together: of each the fastest that is right."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Of its record."""


def contest(
    book: Book, what: str, ways: Sequence[Way], *, plan: Plan, sets: int, data: Mapping[str, Any]
) -> dict[str, Timing]:  # fmt: skip
    """Check every way, time those that are there, and write a record of each.

    Parameters
    ----------
    sets
        Of buffers, over which the calls rotate.
    data
        Of every record. It holds ``kv_bytes``, which a way may say otherwise.

    Returns
    -------
    dict
        By name, the timings of those whose results are right. A record of such a way says ``tbs``, what it read of K
        and V in TB/s, and for each of `Way.against` how many times as fast it is (``over_...``, with quartiles), and
        than which.
    """
    calls: dict[str, Call] = {}
    wrong: dict[str, str | None] = {}
    for way in ways:
        try:
            calls[way.name] = way.make()
            wrong[way.name] = way.judge.wrong(calls[way.name], way.backend, way.problem.causal)
        except Exception as error:
            calls.pop(way.name, None)
            _failed(book, what, way, error, data)
    there = [way for way in ways if way.name in calls]
    if not there:
        return {}
    candidates = [Candidate(way.name, calls[way.name], problem=way.problem) for way in there]
    rounds = max(3, plan.rounds // 2)
    timings = time_calls(candidates, ways[0].problem, gpu=plan.gpu, sets=sets, rounds=rounds)
    good = {name: t for name, t in timings.items() if isinstance(t, Timing) and not wrong[name]}
    for way in there:
        timing = timings[way.name]
        if isinstance(timing, Exception):
            _failed(book, what, way, timing, data)
            continue
        found = dict(data) | dict(way.data)
        found["tbs"] = found["kv_bytes"] / timing.latency_us / 1e6
        found |= _beside(way, good) if way.name in good else {}
        status, reason = worth(wrong[way.name])
        kept = compact(timing).model_copy(update={"samples_us": []})
        book.write(what, backend=way.backend, variant=way.name, problem=way.problem, data=found, timing=kept,
                   status=status, reason=reason)  # fmt: skip
    return good


def _beside(way: Way, good: Mapping[str, Timing]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side, names in way.against.items():
        best = min((n for n in names if n in good), key=lambda n: good[n].latency_us, default=None)
        if best is not None:
            ratio, quartiles = over(good[way.name], good[best])
            found |= {side: best, f"over_{side}": ratio, f"over_{side}_quartiles": quartiles}
    return found


def _failed(book: Book, what: str, way: Way, error: Exception, data: Mapping[str, Any]) -> None:
    """A record of a way that did not finish; of a backend that is not here one for all that is measured."""
    if isinstance(error, BackendUnavailable):
        if not any((t.status, t.backend, t.data["what"]) == ("unavailable", way.backend, what) for t in book.trials):
            book.failed(what, error, backend=way.backend)
        return
    book.failed(what, error, backend=way.backend, variant=way.name, problem=way.problem, data=dict(data) | way.data)


# ------------------------------------------------------------------------------------------------ the ways there are


def pages_way(
    name: str, backend: str, qs: torch.Tensor, caches: Sequence[PagedKV], problem: Problem, judge: Judge,
    against: Mapping[str, Sequence[str]], **data: Any,
) -> Way:  # fmt: skip
    """Ours over all pages. Whether its bits may depend on the batch is what `problem` says, whatever the environment
    says to `paged_attention`; so the backend is called below that, and a replayed graph takes as long either way."""

    def make() -> Call:
        found = ready(backend, problem)
        asked = [
            paged_problem_of(q, cache, problem.causal).with_(batch_invariant=problem.batch_invariant)
            for q, cache in zip(qs, caches, strict=True)
        ]
        return lambda i: found.run_paged(qs[i], caches[i], asked[i])

    return Way(name, backend, problem, make, judge, against, data)


def dense_ways(
    backend: str, qs: torch.Tensor, dense: Sequence[tuple[torch.Tensor, torch.Tensor]], problem: Problem, judge: Judge
) -> list[Way]:
    """Attention over contiguous K and V; with groups of query heads also as rows of one head, as a caller would who
    knows that it is faster."""

    def whole() -> Call:
        found = ready(backend, problem, paged=False)
        return lambda i: (found.run(qs[i], *dense[i], problem)[0], None)

    group = problem.num_heads_q // problem.num_heads_kv
    packed = problem.with_(num_heads_q=problem.num_heads_kv, seqlen_q=group)

    def rows() -> Call:
        found = ready(backend, packed, paged=False)

        def call(i: int) -> tuple[torch.Tensor, None]:
            q = qs[i].view(problem.batch, problem.num_heads_kv, group, -1)
            return found.run(q, *dense[i], packed)[0].reshape(qs[i].shape), None

        return call

    ways = [Way(DENSE, backend, problem, whole, judge)]
    return [*ways, Way(AS_ROWS, backend, problem, rows, judge)] if group > 1 and problem.seqlen_q == 1 else ways


def peer_way(
    variant: str, qs: torch.Tensor, caches: Sequence[PagedKV], problem: Problem, judge: Judge, *,
    name: str = "", prefix: int = 0,
) -> Way:  # fmt: skip
    """FlashInfer over the same pages."""

    def make() -> Call:
        return peers.planned(variant, list(qs), caches, problem, prefix=prefix)

    return Way(name or variant, peers.NAME, problem, make, judge)


# ------------------------------------------------------------------------------------------------ room, and the sheet


def check_room(backend: str, plan: Plan, kv_bytes: int, times: float = HEADROOM) -> None:
    """Raise `Unsupported` where this GPU has too little memory free for K and V of so many bytes."""
    if not plan.gpu:
        return
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], times * kv_bytes
    if free < needed:
        raise Unsupported(backend, f"it takes {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free")


def sheet_data(plan: Plan) -> dict[str, float]:
    """What the memory of this GPU reads a second by its data sheet, as a record holds it; empty where none is known."""
    if not plan.gpu:
        return {}
    try:
        sheets = claims.load_claims().gpus
    except FlashCoreError:  # said by 'flashcore claims'; a timing needs no data sheet
        return {}
    sheet = next((one for one in sheets if one.is_named(device.gpu_name())), None)
    return {"sheet_tbs": sheet.memory_tb_s} if sheet else {}
