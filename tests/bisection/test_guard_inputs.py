"""Inputs that show two bugs which others let pass: a guard of the wrong dtype, and an empty chain that counts."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.sampling import sampled

from flashcore import backends
from flashcore.backends.cpu import CpuBackend
from flashcore.bisection import bisect
from flashcore.bisection.faults import catalogue
from flashcore.measure import check
from flashcore.measure.check import check_attention
from flashcore.numerics import reference
from flashcore.numerics.inputs import LAYOUTS, PATTERNS, make_inputs
from flashcore.problem import Problem, square

PLAIN = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=100, seqlen_k=200, head_dim=64, page_size=64)
HALVES = square(1, 2, 100, 64, causal=True, page_size=50)
"""Two chains of one page each: the rows of the first half see no key of the second."""
GUARD = {"float16": 32768.0, "bfloat16": 2.0**64}
"""Of kernels/include/online_softmax.cuh: what the sum of a page's probs has to stay below."""
LATER_SCALES = (None, -0.125, 1.0)


class Stale(CpuBackend):
    """The page loop with a reference that goes stale, as the Hopper kernel has it."""

    id = "stale"

    def __init__(self, guard: float):
        self.guard = guard

    def row_max(self, scores, row_max):
        top = scores.amax(dim=-1)
        stale = torch.where(row_max == -math.inf, top, row_max)
        fits = (scores - reference.safe(stale)[..., None]).exp().sum(dim=-1) < self.guard
        return torch.where(fits, stale, row_max.maximum(top))


class TwoChains(CpuBackend):
    """Pages in two chains, added up at the end; `empty` is the reference of a chain that saw no key of a row."""

    id = "two-chains"

    def __init__(self, empty: float):
        self.empty = empty

    def _loop(self, q, k, v, problem, kept):
        dtype, q = q.dtype, q.float()
        k, v = self.kv_of_head(k, problem), self.kv_of_head(v, problem)
        columns = reference.pages(problem, problem.page_size)
        states = [(q.new_full(q.shape[:-1], -math.inf), q.new_zeros(q.shape[:-1]), q.new_zeros(q.shape))] * 2
        for j, page in enumerate(columns):
            before, row_sum, accum = states[-2]
            scores = self.scores(q, k[..., page, :], problem, page)
            row_max = self.row_max(scores, before)
            rescale, probs = self.rescale(before, row_max), self.probs(scores, row_max)
            row_sum, rounded = self.row_sum(row_sum, rescale, probs), probs.to(dtype)
            accum = self.accum(accum, rescale, rounded, self.page_of_v(v, columns, j))
            states.append((row_max, row_sum, accum))
            if kept is not None:
                kept.append((scores, row_max, rescale, rounded, row_sum, accum))
        row_max, row_sum, accum = (torch.stack(parts) for parts in zip(*states[-2:], strict=True))
        counted = torch.where(row_sum == 0, self.empty, row_max)
        shared = counted.amax(dim=0)
        weights = torch.where(row_sum == 0, 0.0, (row_max - reference.safe(shared)).exp())
        weights = weights.masked_fill(weights < 2.0**-126, 0.0)  # as a GPU flushes them
        total = (weights * row_sum).sum(dim=0)
        out = (weights[..., None] * accum).sum(dim=0) / total.masked_fill(total == 0, 1.0)[..., None]
        return out.to(dtype), shared + total.log()

    def trace(self, q, k, v, problem):
        pages = len(reference.pages(problem, problem.page_size))
        return replace(super().trace(q, k, v, problem), previous=reference.interleaved(pages, 2))


@pytest.mark.parametrize(("pattern", "dtype"), sampled(itertools.product(PATTERNS, ["float16", "bfloat16"])))
@pytest.mark.slow
def test_a_stale_reference_with_the_guard_of_its_dtype_is_right(pattern, dtype):
    for scale in LATER_SCALES:
        found = bisect(Stale(GUARD[dtype]), PLAIN.with_(dtype=dtype, softmax_scale=scale), pattern=pattern)
        assert found.passed, (scale, found.finding())


@pytest.mark.parametrize("scale", LATER_SCALES)
@pytest.mark.parametrize("seqlen", [130, 200, 520])
def test_the_guard_of_the_other_dtype_is_seen_where_scores_climb(seqlen, scale):
    problem = PLAIN.with_(seqlen_k=seqlen, softmax_scale=scale)
    found = bisect(Stale(GUARD["bfloat16"]), problem, pattern="steep")
    assert found.producers[0] == "row_max", found.finding()
    assert check_attention(Stale(GUARD["bfloat16"]), problem, pattern="steep").status == "failed"


@pytest.mark.slow
def test_other_inputs_let_the_guard_of_the_other_dtype_pass():
    """Why `steep` is there. Under `large` some rows show it by chance, and none where a warp raises all its rows."""
    for pattern in ("normal", "uniform", "constant", "alternating", "tiny", "falling"):
        assert bisect(Stale(GUARD["bfloat16"]), PLAIN, pattern=pattern).passed, pattern


@pytest.mark.parametrize("pattern", PATTERNS)
def test_chains_that_see_no_key_of_a_row_are_right_when_they_do_not_count(pattern):
    found = bisect(TwoChains(-math.inf), HALVES, pattern=pattern)
    assert found.passed, found.finding()


@pytest.mark.parametrize("scale", LATER_SCALES)
def test_an_empty_chain_that_counts_with_0_is_seen_where_scores_lie_far_below(scale):
    problem = HALVES.with_(softmax_scale=scale)
    found = bisect(TwoChains(0.0), problem, pattern="sunken")
    assert found.producers[0] == "out", found.finding()
    assert check_attention(TwoChains(0.0), problem, pattern="sunken").status == "failed"
    assert bisect(TwoChains(0.0), HALVES, pattern="normal").passed, "which other inputs let pass"


@pytest.mark.parametrize("scale", [None, -0.3, 1.0, -2.0])
def test_levels_are_what_they_say_whatever_the_sign_of_the_scale(scale):
    problem = square(1, 1, 512, 64, softmax_scale=scale)

    def scores(pattern):
        q, k, _ = make_inputs(problem, pattern=pattern)
        return problem.scale * (q.float() @ k.float().mT)

    rising, falling, steep = scores("rising"), scores("falling"), scores("steep")
    assert float(rising[..., -128:].mean() - rising[..., :128].mean()) > 5
    assert float(falling[..., -128:].mean() - falling[..., :128].mean()) < -5
    assert 40 < float(steep[..., -64:].mean() - steep[..., :64].mean()) < 80
    assert float(scores("sunken").amax()) < -90


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tensors_lie_apart(dtype):
    problem = PLAIN.with_(seqlen_q=200, num_heads_q=2, dtype=dtype)
    together, apart = make_inputs(problem), make_inputs(problem, layout="apart")
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert len({t.stride() for t in apart}) == 3 and "apart" in LAYOUTS
    assert all(step * t.element_size() % 16 == 0 for t in apart for step in t.stride()[:3])
    assert inspect.signature(bisect).parameters["layout"].default == "apart"


def test_v_by_the_strides_of_k_is_found_where_they_lie_apart():
    planted = catalogue.get("G50").plant("cpu")
    assert bisect(planted, PLAIN).producers[0] == "accum"
    assert bisect(planted, PLAIN, layout="bhsd").passed, "which inputs that lie alike let pass"


def test_the_quick_matrix_has_scales_of_every_kind():
    problems = check.check_problems("quick", gpu=False)
    for takes in (lambda p: p.seqlen_q <= 8, lambda p: p.seqlen_q > 8):
        some = [p for p in problems if takes(p)]
        assert any(p.scale < 0 for p in some)
        q, k, _ = make_inputs(max(some, key=lambda p: p.scale))
        assert float((max(p.scale for p in some) * q.float() @ k.float().mT.repeat_interleave(
            q.shape[1] // k.shape[1], dim=1)).abs().max()) > 100  # fmt: skip


def test_every_backend_of_ours_takes_a_scale_below_zero():
    for backend in backends.all_backends():
        if backend.role == "ours":
            taken = backend.suits(PLAIN)
            assert backend.why_not(taken) is None
            assert backend.why_not(taken.with_(softmax_scale=-0.5)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["steep", "sunken"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["hopper", "hopper-unsplit", "hopper-paged", "decode", "decode-paired", "wmma",
                                  "scalar", "cublaslt", "cublaslt-paged"])  # fmt: skip
def test_our_kernels_are_right_on_the_inputs_that_guards_are_for(name, dtype, pattern):
    backend = backends.get(name)
    for scale in LATER_SCALES:
        for causal in (False, True):
            problem = backend.suits(PLAIN.with_(dtype=dtype, softmax_scale=scale, causal=causal))
            found = bisect(backend, problem, pattern=pattern)
            assert found.passed, (problem.label(), found.finding())
            trial = check_attention(backend, problem.with_(seqlen_k=1100), pattern=pattern)
            assert trial.status == "ok", trial.reason


@pytest.mark.gpu
@pytest.mark.parametrize("problem", check.check_problems("quick", gpu=True)[-4:], ids=lambda p: p.label())
def test_our_kernels_are_right_at_scales_of_every_kind(problem):
    for backend in backends.all_backends():
        if backend.role == "ours" and backend.device == "cuda" and backend.why_not(problem) is None:
            trial = check_attention(backend, problem)
            assert trial.status == "ok", (backend.id, trial.reason)
