"""Split-KV traces: several chains of pages, combined at the end, are judged as one chain is.

The backend here is the cpu backend with chains. Bugs are planted by overriding one of its methods; the checker is told
nothing of them.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from support.sampling import first, sampled
from support.split_traces import CAUSAL, DTYPES, EMPTY_ROWS, SIX_PAGES, THIRDS, Continues, SplitCpu

from flashcore.bisection.bisecting import bisect, judge
from flashcore.errors import FlashCoreError
from flashcore.numerics import reference
from flashcore.numerics.inputs import PATTERNS, make_inputs
from flashcore.numerics.reference import contiguous, interleaved
from flashcore.problem import Problem

PROBLEMS = {"causal": CAUSAL, "empty rows": EMPTY_ROWS}
EVERY_CHAINS = {
    "two, interleaved": lambda n: interleaved(n, 2),
    "six, interleaved": lambda n: interleaved(n, 6),
    "two, contiguous": lambda n: contiguous(n, 2),
    "four, contiguous": lambda n: contiguous(n, 4),
    "of odd lengths": lambda n: (-1, 0, -1, 1, 2, -1),
}


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
@pytest.mark.parametrize("seed", first(range(16), 4))
def test_no_false_alarm(pattern, seed):
    backend, problem = random_split(random.Random(f"{pattern} split {seed}"))
    result = bisect(backend, problem, seed=seed, pattern=pattern)
    assert result.passed, (problem.label(), backend.previous(problem), result.finding())


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "chains"), sampled(itertools.product(PROBLEMS, EVERY_CHAINS)))
def test_the_error_of_right_maths_stays_under_half_of_every_bound(problem, chains):
    """Whole chains see no key of the first rows here. The bounds are twice an error model, and the model holds."""
    for pattern in PATTERNS:
        for dtype in DTYPES:
            result = bisect(SplitCpu(EVERY_CHAINS[chains]), PROBLEMS[problem].with_(dtype=dtype), pattern=pattern)
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


LEGAL = (CombinesByLse, ZeroWhenIdle, WholeRowsMaximum, StaysBehind, ReferenceNotReset)
CHAINS = {"interleaved": lambda n: interleaved(n, 3), "contiguous": lambda n: contiguous(n, 2)}


@pytest.mark.parametrize(
    ("legal", "chains", "problem"),
    # Each way with both chains and both problems.
    sampled(itertools.product(LEGAL, CHAINS, PROBLEMS), kind=lambda case: case[0]),
)
@pytest.mark.slow
def test_other_references_and_other_ways_to_combine_are_legal(legal, chains, problem):
    make_chains, problem = CHAINS[chains], PROBLEMS[problem]
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


@functools.cache
def clean_run(make_chains, problem: Problem, pattern: str):
    """What is right, beside which several bugs are planted."""
    return bisect(SplitCpu(make_chains), problem, pattern=pattern)


@pytest.mark.parametrize(
    ("case", "dtype", "make_chains"),  # each bug with all types and all chains
    sampled(itertools.product(COMBINING, DTYPES, THIRDS), kind=lambda one: COMBINING.index(one[0])),
    ids=lambda value: f"{value[0].__name__}-{value[2]}" if isinstance(value, tuple) else None,
)
def test_a_bug_where_chains_are_combined_is_found_in_the_results(case, dtype, make_chains):
    bug, problem, pattern, producers = case
    problem = problem.with_(dtype=dtype)
    assert clean_run(make_chains, problem, pattern).passed, "the clean run has to be silent"
    result = bisect(bug(make_chains), problem, pattern=pattern)
    assert not result.passed and set(result.producers) == producers, result.finding()
    assert set(roles(result).values()) <= {"clean", "producer"}


# ------------------------------------------------------------------------------------------ planted: inside of a chain


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


def test_chains_of_another_number_of_pages_are_an_error():
    class Short(SplitCpu):
        def trace(self, q, k, v, problem):
            return replace(super().trace(q, k, v, problem), previous=(-1, -1, 0))

    with pytest.raises(FlashCoreError, match="'split' traced chains of 3 pages; .* has 6 pages of 16 keys"):
        bisect(Short(), SIX_PAGES)
