"""Split-KV traces: several chains of pages, combined at the end, are judged as one chain is.

The backend here is the cpu backend with chains. Bugs are planted by overriding one of its methods; the checker is told
nothing of them.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from flashcore.backends._traces import TraceBuffers
from flashcore.backends.cpu import CpuBackend
from flashcore.bisection.bisecting import bisect, judge
from flashcore.bisection.zoom import zoom
from flashcore.errors import FlashCoreError
from flashcore.numerics import reference
from flashcore.numerics.inputs import PATTERNS, make_inputs
from flashcore.numerics.reference import STAGES, contiguous, interleaved
from flashcore.problem import Problem, square

SIX_PAGES = square(2, 2, 96, 32, page_size=16)
CAUSAL = SIX_PAGES.with_(causal=True)
EMPTY_ROWS = CAUSAL.with_(seqlen_q=128)
DTYPES = ("float16", "bfloat16", "float32")


class SplitCpu(CpuBackend):
    """The page loop of the cpu backend in chains, combined as a split-KV kernel does."""

    id = "split"

    def __init__(self, make_chains=lambda num_pages: interleaved(num_pages, 2)):
        self.make_chains = make_chains

    def previous(self, problem):
        return self.make_chains(len(reference.pages(problem, problem.page_size)))

    def continued(self, stage: str, page: int, before: int) -> int:
        """The page whose `stage` this page starts from, or -1."""
        return before

    def weights(self, row_max):
        """``[C, B, Hq, Sq]`` and the reference that they are taken against."""
        shared = row_max.amax(dim=0)
        return (row_max - reference.safe(shared)).exp(), shared

    def combine(self, row_max, row_sum, accum):
        """`out` and `lse` from what every chain holds after its last page; tensors ``[C, B, Hq, Sq, ...]``."""
        weights, shared = self.weights(row_max)
        total = (weights * row_sum).sum(dim=0)
        out = (weights[..., None] * accum).sum(dim=0) / total.masked_fill(total == 0, 1.0)[..., None]
        return out, shared + total.log()

    def _loop(self, q, k, v, problem, kept):
        dtype = q.dtype
        q, k, v = q.float(), self.kv_of_head(k, problem), self.kv_of_head(v, problem)
        zeros = q.new_zeros(q.shape[:-1])
        nothing = {"row_max": zeros - math.inf, "row_sum": zeros, "accum": self.initial_accum(q)}
        columns, chain = reference.pages(problem, problem.page_size), self.previous(problem)
        states: list[dict] = []
        for j, page in enumerate(columns):
            before = {}
            for stage, value in nothing.items():
                p = self.continued(stage, j, chain[j])
                before[stage] = value if p < 0 else states[p][stage]
            scores = self.scores(q, k[..., page, :], problem, page)
            row_max = self.row_max(scores, before["row_max"])
            rescale = self.rescale(before["row_max"], row_max)
            probs = self.probs(scores, row_max)
            row_sum = self.row_sum(before["row_sum"], rescale, probs)
            rounded = probs.to(dtype)
            accum = self.accum(before["accum"], rescale, rounded, self.page_of_v(v, columns, j))
            states.append({"row_max": row_max, "row_sum": row_sum, "accum": accum})
            if kept is not None:
                kept.append((scores, row_max, rescale, rounded, row_sum, accum))
        last = [states[p] for p in reference.ends(chain)]
        out, lse = self.combine(*(torch.stack([state[stage] for state in last]) for stage in nothing))
        return out.to(dtype), lse

    def trace(self, q, k, v, problem):
        return replace(super().trace(q, k, v, problem), previous=self.previous(problem))


def roles(result):
    return {row.stage: row.role for row in result.stages}


# ------------------------------------------------------------------------------------------------ silent when right


def random_split(rng: random.Random) -> tuple[SplitCpu, Problem]:
    heads, page_size = rng.choice([1, 2]), rng.choice([16, 32, 50])
    problem = Problem(
        batch=rng.choice([1, 2]), num_heads_kv=heads, num_heads_q=heads * rng.choice([1, 2]),
        seqlen_q=rng.choice([1, 2, 17, 64, 129]), seqlen_k=rng.choice([1, 3, 31, 64, 127, 130, 257]),
        head_dim=rng.choice([1, 8, 40, 64]), dtype=rng.choice(DTYPES), causal=rng.random() < 0.6, page_size=page_size,
        softmax_scale=rng.choice([None, None, 1.0, -0.3, 0.0]),
    )  # fmt: skip
    make, splits = rng.choice([interleaved, contiguous]), rng.choice([1, 2, 3, 4, 7])
    return SplitCpu(lambda num_pages: make(num_pages, splits)), problem


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(16))
def test_no_false_alarm(pattern, seed):
    backend, problem = random_split(random.Random(f"{pattern} split {seed}"))
    result = bisect(backend, problem, seed=seed, pattern=pattern)
    assert result.passed, (problem.label(), backend.previous(problem), result.finding())


@pytest.mark.slow
@pytest.mark.parametrize("problem", [CAUSAL, EMPTY_ROWS], ids=["causal", "empty rows"])
@pytest.mark.parametrize("make_chains", [
    lambda n: interleaved(n, 2), lambda n: interleaved(n, 6), lambda n: contiguous(n, 2), lambda n: contiguous(n, 4),
    lambda n: (-1, 0, -1, 1, 2, -1),
])  # fmt: skip
def test_the_error_of_right_maths_stays_under_half_of_every_bound(problem, make_chains):
    """Whole chains see no key of the first rows here. The bounds are twice an error model, and the model holds."""
    for pattern in PATTERNS:
        for dtype in DTYPES:
            result = bisect(SplitCpu(make_chains), problem.with_(dtype=dtype), pattern=pattern)
            assert result.passed, (pattern, dtype, result.finding())
            for row in result.stages:
                for judgement in (row.local, row.overall):
                    assert judgement.worst_error <= 0.501 * judgement.bound, (pattern, dtype, row.stage)


def test_the_reference_in_chains_is_clean():
    inputs = make_inputs(EMPTY_ROWS)
    for previous in (interleaved(6, 3), contiguous(6, 2), (-1, 0, 1, 2, 3, 4), None):
        trace = reference.trace(*inputs, EMPTY_ROWS, previous=previous)
        result = judge(trace, *inputs, EMPTY_ROWS, backend="reference")
        assert result.passed, result.finding()


class CombinesByLse(SplitCpu):
    """Each chain is divided by its own sum, and weighed by how its lse compares."""

    def combine(self, row_max, row_sum, accum):
        lse = row_max + row_sum.log()
        whole = lse.logsumexp(dim=0)
        parts = accum / row_sum.masked_fill(row_sum == 0, 1.0)[..., None]
        return ((lse - reference.safe(whole)).exp()[..., None] * parts).sum(dim=0), whole


class ZeroWhenIdle(SplitCpu):
    """A chain that sees no key of a row keeps 0 and not -inf as its reference, above or below the row's scores."""

    def row_max(self, scores, row_max):
        return reference.safe(super().row_max(scores, row_max))


class WholeRowsMaximum(SplitCpu):
    """Every chain subtracts the maximum of the whole row, far above its own scores where those are low."""

    def trace(self, q, k, v, problem):
        return super().trace(self.noted(q, k, problem), k, v, problem)

    def run(self, q, k, v, problem):
        return super().run(self.noted(q, k, problem), k, v, problem)

    def noted(self, q, k, problem):
        scores = self.scores(q.float(), self.kv_of_head(k, problem), problem, slice(0, problem.seqlen_k))
        self.top = scores.amax(dim=-1)
        return q

    def row_max(self, scores, row_max):
        return self.top


class StaysBehind(SplitCpu):
    """Moves its reference only when the scores pass it by more than 3."""

    def row_max(self, scores, row_max):
        running = super().row_max(scores, row_max)
        return torch.where(running > row_max + 3.0, running, row_max)


class ReferenceNotReset(SplitCpu):
    """A chain begins with the reference of the page before it; what that rescales is zero."""

    def continued(self, stage, page, before):
        return page - 1 if stage == "row_max" and before < 0 else before


@pytest.mark.parametrize("legal", [CombinesByLse, ZeroWhenIdle, WholeRowsMaximum, StaysBehind, ReferenceNotReset])
@pytest.mark.parametrize("make_chains", [lambda n: interleaved(n, 3), lambda n: contiguous(n, 2)])
@pytest.mark.parametrize("problem", [CAUSAL, EMPTY_ROWS], ids=["causal", "empty rows"])
def test_other_references_and_other_ways_to_combine_are_legal(legal, make_chains, problem):
    for pattern in ("normal", "rising", "falling", "constant"):
        for dtype in DTYPES:
            result = bisect(legal(make_chains), problem.with_(dtype=dtype), pattern=pattern)
            assert result.passed, (pattern, dtype, result.finding())


def test_coverage_is_complete_whatever_the_chunk(monkeypatch):
    whole = bisect(SplitCpu(), CAUSAL)
    monkeypatch.setattr("flashcore.bisection.bisecting.CHUNK_ELEMENTS", {"cpu": 1})
    pieces = bisect(SplitCpu(), CAUSAL)
    assert pieces.coverage == whole.coverage and whole.coverage["complete"] and pieces.passed
    assert whole.coverage["elements"] == 4 * 96 * (2 * 96 + 6 * (3 + 32) + 32 + 1)


# --------------------------------------------------------------------------------------- planted: combining the chains


class WeightsForgotten(SplitCpu):
    def weights(self, row_max):
        _, shared = super().weights(row_max)
        return torch.ones_like(row_max), shared


class WeightsOfOtherChains(SplitCpu):
    def weights(self, row_max):
        weights, shared = super().weights(row_max)
        return weights.roll(1, dims=0), shared


class ChainDropped(SplitCpu):
    def combine(self, row_max, row_sum, accum):
        return super().combine(row_max[:-1], row_sum[:-1], accum[:-1])


class ChainTwice(SplitCpu):
    def combine(self, *chains):
        return super().combine(*(torch.cat([stage, stage[:1]]) for stage in chains))


class FirstChainsMaximum(SplitCpu):
    """Weighs against the first chain: NaN where it saw no key, infinite where another lies far above it."""

    def weights(self, row_max):
        return (row_max - row_max[0]).exp(), row_max[0]


class SumNotWeighted(SplitCpu):
    def combine(self, row_max, row_sum, accum):
        weights, shared = self.weights(row_max)
        total = row_sum.sum(dim=0)
        out = (weights[..., None] * accum).sum(dim=0) / total.masked_fill(total == 0, 1.0)[..., None]
        return out, shared + total.log()


class AccumNotWeighted(SplitCpu):
    def combine(self, row_max, row_sum, accum):
        out, lse = super().combine(row_max, row_sum, accum)
        total = (lse - super().weights(row_max)[1]).exp()
        return accum.sum(dim=0) / total[..., None], lse


class LseOfFirstChain(SplitCpu):
    def combine(self, row_max, row_sum, accum):
        return super().combine(row_max, row_sum, accum)[0], row_max[0] + row_sum[0].log()


class IdleChainUnguarded(SplitCpu):
    """-inf - (-inf) where no chain saw a key."""

    def weights(self, row_max):
        shared = row_max.amax(dim=0)
        return (row_max - shared).exp(), shared


THIRDS = [lambda n: interleaved(n, 3), lambda n: contiguous(n, 2)]
# bug, problem, pattern, stages that must be producers
COMBINING = [
    (WeightsForgotten, SIX_PAGES, "normal", {"out", "lse"}),
    (WeightsForgotten, CAUSAL, "rising", {"out", "lse"}),
    (WeightsOfOtherChains, SIX_PAGES, "normal", {"out", "lse"}),
    (ChainDropped, SIX_PAGES, "normal", {"out", "lse"}),
    (ChainDropped, CAUSAL, "normal", {"out", "lse"}),
    (ChainTwice, SIX_PAGES, "normal", {"out", "lse"}),
    (FirstChainsMaximum, EMPTY_ROWS, "normal", {"out", "lse"}),
    (FirstChainsMaximum, SIX_PAGES, "large", {"out", "lse"}),
    (SumNotWeighted, SIX_PAGES, "normal", {"out", "lse"}),
    (AccumNotWeighted, SIX_PAGES, "normal", {"out"}),
    (LseOfFirstChain, SIX_PAGES, "normal", {"lse"}),
    (IdleChainUnguarded, EMPTY_ROWS, "normal", {"out", "lse"}),
]


@pytest.mark.parametrize("case", COMBINING, ids=lambda case: f"{case[0].__name__}-{case[2]}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make_chains", THIRDS)
def test_a_bug_where_chains_are_combined_is_found_in_the_results(case, dtype, make_chains):
    bug, problem, pattern, producers = case
    problem = problem.with_(dtype=dtype)
    assert bisect(SplitCpu(make_chains), problem, pattern=pattern).passed, "the clean run has to be silent"
    result = bisect(bug(make_chains), problem, pattern=pattern)
    assert not result.passed and set(result.producers) == producers, result.finding()
    assert set(roles(result).values()) <= {"clean", "producer"}


# ------------------------------------------------------------------------------------------ planted: inside of a chain


class Continues(SplitCpu):
    """From its third page on, takes these stages from the page just before, which belongs to another chain."""

    stages: tuple[str, ...] = ()

    def continued(self, stage, page, before):
        return page - 1 if stage in self.stages and page >= 3 else before


class NotReset(SplitCpu):
    """A chain begins with the sums of the page before it."""

    def continued(self, stage, page, before):
        return page - 1 if before < 0 else before


@pytest.mark.parametrize(("stages", "producers"), [
    (("row_max",), {"rescale"}), (("row_sum",), {"row_sum"}), (("accum",), {"accum"}),
    (("row_max", "row_sum", "accum"), {"rescale", "row_sum", "accum"}),
])  # fmt: skip
def test_a_page_that_continues_another_chain_is_found_at_its_stage(stages, producers):
    backend = Continues(lambda n: interleaved(n, 3))
    backend.stages = stages
    result = bisect(backend, SIX_PAGES)
    assert set(result.producers) == producers, result.finding()
    first = next(row for row in result.stages if row.role == "producer").local.first_bad
    assert first.items() >= {"page": 3, "batch": 0, "head": 0, "row": 0}.items()
    assert roles(result)["lse"] in (("clean",) if stages == ("accum",) else ("propagator",))


def test_a_chain_that_begins_with_the_sums_of_another_is_found():
    """Contiguous chains, and pages that run on: right as one chain, wrong as the two that are then combined."""
    result = bisect(NotReset(lambda n: contiguous(n, 3)), SIX_PAGES)
    assert result.producers == ["row_sum", "accum"] and roles(result)["out"] == "propagator"
    first = next(row for row in result.stages if row.role == "producer").local.first_bad
    assert first["page"] == 3
    as_one = bisect(NotReset(lambda n: (-1, *range(n - 1))), SIX_PAGES)
    assert as_one.passed


class IdleFarAbove(SplitCpu):
    """A chain that sees no key of a row leaves a huge reference, against which the other chains vanish."""

    def row_max(self, scores, row_max):
        running = super().row_max(scores, row_max)
        return running.masked_fill(running == -math.inf, 1000.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_of_an_idle_chain_may_not_drown_the_others(dtype):
    result = bisect(IdleFarAbove(lambda n: contiguous(n, 2)), CAUSAL.with_(dtype=dtype))
    assert result.producers == ["row_max"], result.finding()
    first = result.stages[1].local.first_bad
    assert first.items() >= {"page": 3, "row": 0, "got": 1000.0}.items(), "the last page of the first idle chain"


class ShiftedUp(SplitCpu):
    """A reference 40 above a chain's scores: in float16 its probs vanish."""

    def row_max(self, scores, row_max):
        return row_max.maximum(scores.amax(dim=-1) + 40.0)


def test_a_reference_that_loses_a_chain_is_found():
    assert bisect(ShiftedUp(), SIX_PAGES).producers == ["row_max"]


class OneIsLost(ShiftedUp):
    """As `ShiftedUp`, but in the second of two chains alone, whose keys weigh as much as those of the first."""

    turn = 0

    def row_max(self, scores, row_max):
        self.turn += 1
        return (ShiftedUp if self.turn % 2 == 0 else SplitCpu).row_max(self, scores, row_max)


def test_a_reference_that_loses_one_chain_of_two_is_found_in_that_chain():
    result = bisect(OneIsLost(), SIX_PAGES)
    assert result.producers == ["row_max"]
    assert result.stages[1].local.first_bad["page"] == 1


def test_the_window_shows_the_chain_that_was_traced():
    backend = Continues(lambda n: interleaved(n, 3))
    backend.stages = ("accum",)
    result = bisect(backend, SIX_PAGES)
    first = result.stages[STAGES.index("accum")].local.first_bad
    down, across = result.window["at"]
    assert result.window["page"] == first["page"] == 3
    assert result.window["got"][down][across] == pytest.approx(first["got"], rel=1e-4)
    assert result.window["expected"][down][across] == pytest.approx(first["expected"], rel=1e-4)


def test_the_window_from_the_start_follows_the_chains_too():
    inputs = make_inputs(SIX_PAGES)
    trace = SplitCpu().trace(*inputs, SIX_PAGES)
    truth = reference.trace(*inputs, SIX_PAGES, previous=trace.previous)
    element = {"stage": "row_sum", "page": 4, "batch": 1, "head": 0, "row": 7}
    window = zoom(trace, *inputs, SIX_PAGES, element, is_local=False)
    down, across = window["at"]
    assert window["expected"][down][across] == pytest.approx(float(truth.row_sum[1, 0, 4, 7]), rel=1e-3)


def test_chains_of_another_number_of_pages_are_an_error():
    class Short(SplitCpu):
        def trace(self, q, k, v, problem):
            return replace(super().trace(q, k, v, problem), previous=(-1, -1, 0))

    with pytest.raises(FlashCoreError, match="'split' traced chains of 3 pages; .* has 6 pages of 16 keys"):
        bisect(Short(), SIX_PAGES)


# -------------------------------------------------------------------------------------- what a kernel rightly skips


def stored_by_a_kernel(trace, problem, tile_m: int) -> TraceBuffers:
    """Buffers as a causal kernel leaves them: a tile of rows stores no page that none of its rows sees."""
    buffers = TraceBuffers.make(problem, problem.page_size, tile_m, trace.scores.device)
    for first in range(0, problem.seqlen_q, tile_m):
        rows = slice(first, min(first + tile_m, problem.seqlen_q))
        for j, page in enumerate(reference.pages(problem, problem.page_size)):
            if page.start >= rows.stop + problem.seqlen_k - problem.seqlen_q:
                continue
            for stage in ("scores", "probs"):
                getattr(buffers, stage)[:, :, rows, page] = getattr(trace, stage)[:, :, rows, page].float()
            for stage in ("row_max", "rescale", "row_sum", "accum"):
                getattr(buffers, stage)[:, :, j, rows] = getattr(trace, stage)[:, :, j, rows]
    return buffers


@pytest.mark.parametrize("problem", [CAUSAL, EMPTY_ROWS.with_(seqlen_k=90)], ids=["causal", "empty rows"])
@pytest.mark.parametrize("make_chains", [*THIRDS, lambda n: interleaved(n, 6), lambda n: (-1, *range(n - 1))])
def test_skipped_pages_carry_over_from_the_page_that_they_continue(problem, make_chains):
    inputs = make_inputs(problem)
    backend = SplitCpu(make_chains)
    trace, previous = backend.trace(*inputs, problem), backend.previous(problem)
    read = stored_by_a_kernel(trace, problem, 16).trace(problem, 16, trace.out, trace.lse, previous)
    assert read.previous == previous
    result = judge(read, *inputs, problem, backend="stored", out=trace.out, lse=trace.lse)
    assert result.passed, result.finding()
    if len(reference.ends(previous)) == 1:
        return
    unaware = stored_by_a_kernel(trace, problem, 16).trace(problem, 16, trace.out, trace.lse)
    assert not judge(unaware, *inputs, problem, backend="stored").passed


def test_a_page_skipped_wrongly_is_found():
    inputs = make_inputs(CAUSAL)
    trace = SplitCpu().trace(*inputs, CAUSAL)
    buffers = stored_by_a_kernel(trace, CAUSAL, 16)
    never = TraceBuffers.make(CAUSAL, 16, 16, trace.scores.device)
    for stage in ("row_max", "rescale", "row_sum", "accum"):
        getattr(buffers, stage)[:, :, 2] = getattr(never, stage)[:, :, 2]
    read = buffers.trace(CAUSAL, 16, trace.out, trace.lse, trace.previous)
    result = judge(read, *inputs, CAUSAL, backend="stored")
    first = next(row for row in result.stages if row.role == "producer")
    assert first.stage == "row_max" and first.local.first_bad.items() >= {"page": 2, "row": 32, "kind": "NaN"}.items()
