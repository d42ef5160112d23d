"""The bounds: right maths stays under half of each, and whatever is legal passes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.sampling import sampled

from flashcore import backends
from flashcore.backends.cpu import CpuBackend
from flashcore.bisection.bisecting import bisect, judge
from flashcore.measure.check import check_attention
from flashcore.numerics.inputs import PATTERNS, make_inputs
from flashcore.numerics.reference import STAGES, Trace
from flashcore.problem import square

FOUR_PAGES = square(2, 2, 128, 32, page_size=32)
CAUSAL = FOUR_PAGES.with_(causal=True)
EMPTY_ROWS = CAUSAL.with_(seqlen_q=160)


def roles(result):
    return {row.stage: row.role for row in result.stages}


class KeyByKey(CpuBackend):
    """Adds to the running sums one key at a time, as a kernel without Tensor Cores does."""

    id = "key-by-key"

    def row_sum(self, row_sum, rescale, probs):
        total = rescale * row_sum
        for key in range(probs.shape[-1]):
            total = total + probs[..., key]
        return total

    def accum(self, accum, rescale, probs, v):
        total = rescale[..., None] * accum
        for key in range(probs.shape[-1]):
            total = total + probs[..., key, None].float() * v[..., key, :][..., None, :]
        return total


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    sampled(itertools.product(["normal", "falling", "outlier"], ["float16", "bfloat16", "float32"])),
)
def test_no_false_alarm_when_small_terms_are_rounded_away_one_by_one(pattern, dtype):
    problem = square(1, 1, 640, 64, dtype=dtype).with_(seqlen_q=40, page_size=32)
    for seed in range(3):
        result = bisect(KeyByKey(), problem, seed=seed, pattern=pattern)
        assert result.passed, result.finding()


class RoundedScores(CpuBackend):
    """Stores its scores in 16 bits between the two products, as an unfused path does."""

    id = "rounded-scores"
    rounds_scores = True

    def scores(self, q, k, problem, page):
        return super().scores(q, k, problem, page).to(getattr(torch, problem.dtype)).float()

    def trace(self, q, k, v, problem):
        trace = super().trace(q, k, v, problem)
        return replace(trace, scores=trace.scores.to(q.dtype))


@pytest.mark.parametrize(("pattern", "dtype"), sampled(itertools.product(PATTERNS, ["float16", "bfloat16"])))
def test_no_false_alarm_when_scores_are_stored_in_16_bits(pattern, dtype):
    for seed, scale in enumerate([None, -0.3, 1.0]):
        problem = square(1, 2, 200, 64, dtype=dtype, causal=seed == 1, softmax_scale=scale).with_(page_size=64)
        if pattern == "large" and dtype == "float16" and scale == 1.0:
            continue  # scores pass 65504: what the kernel then stores is Inf, and that is its fault
        result = bisect(RoundedScores(), problem, seed=seed, pattern=pattern)
        assert result.passed, result.finding()
        checked = check_attention(RoundedScores(), problem, seed=seed, pattern=pattern)
        assert checked.status == "ok", checked.reason


@pytest.mark.slow
def test_the_error_of_right_maths_stays_under_half_of_every_bound():
    """The bounds are twice an error model, and the model holds: so the factor two is real headroom."""
    for pattern in PATTERNS:
        for dtype in ("float16", "bfloat16", "float32"):
            result = bisect("cpu", CAUSAL.with_(dtype=dtype), pattern=pattern)
            for row in result.stages:
                for judgement in (row.local, row.overall):
                    assert judgement.worst_error <= 0.501 * judgement.bound, (pattern, dtype, row.stage)


def retraced(problem, change, pattern="normal"):
    """Judge the cpu backend's trace after `change` of its tensors."""
    q, k, v = make_inputs(problem, pattern=pattern)
    trace = backends.get("cpu").trace(q, k, v, problem)
    values = {stage: getattr(trace, stage).clone() for stage in STAGES}
    change(values)
    return judge(Trace(trace.page_size, **values), q, k, v, problem, backend="changed")


def test_skipped_masked_pages_are_no_ops():
    """A causal kernel that skips masked pages may leave rescale 1 there, and before a row's first key."""

    def skip(values):
        first = values["row_max"] == -math.inf
        values["rescale"][first] = 1.0

    assert retraced(EMPTY_ROWS, skip).passed


def test_rescale_before_the_first_visible_page_is_free_but_not_nan():
    def any_value(values):
        values["rescale"][:, :, 0] = 123.0

    def nan(values):
        values["rescale"][1, 0, 0, 7] = math.nan

    assert retraced(CAUSAL, any_value).passed
    result = retraced(CAUSAL, nan)
    assert roles(result)["rescale"] == "producer"
    assert result.stages[2].local.first_bad["row"] == 7 and result.stages[2].local.first_bad["kind"] == "NaN"


@pytest.mark.parametrize("shift", [-4.0, 2.0, "final", "stale"])
def test_any_reference_that_keeps_probs_finite_is_legal(shift):
    """Shifted, the maximum of the whole row from page 0 on, or a stale one: row_max is judged by what follows."""

    class Shifted(CpuBackend):
        id = "shifted"

        def scores(self, q, k, problem, page):
            self.whole = super().scores(q, self.all_k, problem, slice(0, problem.seqlen_k)).amax(dim=-1)
            return super().scores(q, k, problem, page)

        def kv_of_head(self, tensor, problem):
            kept = super().kv_of_head(tensor, problem)
            self.all_k = kept if getattr(self, "turn", 0) % 2 == 0 else self.all_k
            self.turn = getattr(self, "turn", 0) + 1
            return kept

        def row_max(self, scores, row_max):
            running = super().row_max(scores, row_max)
            if shift == "final":
                return self.whole
            if shift == "stale":
                return torch.where(running > row_max + 3.0, running, row_max)
            return torch.where(row_max == -math.inf, running + shift, torch.maximum(row_max, running + shift))

    result = bisect(Shifted(), FOUR_PAGES)
    assert result.passed, result.finding()
