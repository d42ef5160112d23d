"""Bisection is silent on right backends, and finds each planted bug at the stage that made it.

A bug is planted by overriding one method of the cpu backend; the checker is told nothing of it.
"""

import functools
import math
import random

import pytest
import torch
from support.sampling import first

from flashcore import backends
from flashcore.backends import Availability
from flashcore.backends.cpu import CpuBackend
from flashcore.bisection import bisecting
from flashcore.bisection.bisecting import bisect, bisect_trial, judge
from flashcore.bisection.zoom import tile
from flashcore.errors import FlashCoreError, Unsupported
from flashcore.measure.check import check_attention
from flashcore.numerics import masking, reference
from flashcore.numerics.inputs import PATTERNS, make_inputs, make_masks
from flashcore.numerics.reference import STAGES, Trace
from flashcore.problem import Problem, square
from flashcore.records import Trial

FOUR_PAGES = square(2, 2, 128, 32, page_size=32)
GROUPED = FOUR_PAGES.with_(num_heads_q=4)
CAUSAL = FOUR_PAGES.with_(causal=True)
EMPTY_ROWS = CAUSAL.with_(seqlen_q=160)


def roles(result):
    return {row.stage: row.role for row in result.stages}


# ------------------------------------------------------------------------------------------------ silent when right


def random_problem(rng: random.Random) -> Problem:
    heads = rng.choice([1, 2])
    return Problem(
        batch=rng.choice([1, 2]), num_heads_kv=heads, num_heads_q=heads * rng.choice([1, 2, 3]),
        seqlen_q=rng.choice([1, 2, 17, 64, 129]), seqlen_k=rng.choice([1, 3, 31, 64, 127, 130, 257]),
        head_dim=rng.choice([1, 8, 40, 64, 128]), dtype=rng.choice(["float16", "bfloat16", "float32"]),
        causal=rng.random() < 0.5, page_size=rng.choice([16, 64, 100, 128]),
        softmax_scale=rng.choice([None, None, 1.0, -0.3, 0.0]),
    )  # fmt: skip


MASKED = {
    "window": GROUPED.with_(window_left=20, window_right=9), "cap": CAUSAL.with_(softcap=5.0, dtype="bfloat16"),
    "sink": EMPTY_ROWS.with_(sink=True, window_left=3), "right": GROUPED.with_(batch=6, lengths="right", sink=True),
    "left": CAUSAL.with_(batch=6, lengths="left", window_left=30),
    "ragged": GROUPED.with_(batch=6, lengths="ragged", causal=True, softcap=30.0, sink=True),
}  # fmt: skip


@pytest.mark.parametrize("pattern", ["normal", "large", "sunken"])
@pytest.mark.parametrize("name", MASKED)
def test_no_false_alarm_under_masks(name, pattern):
    problem = MASKED[name]
    result = bisect("cpu", problem, seed=3, pattern=pattern)
    assert result.passed and set(roles(result).values()) == {"clean"}, result.finding()
    assert result.problem == problem and Trial.model_validate_json(result.to_trial().model_dump_json())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sink", "right", "ragged"])
def test_chains_of_pages_and_a_sink_are_judged_together(name):
    """As a split kernel keeps them, in float32; 2 % of a sink too much in one row is found where it joins."""
    problem = MASKED[name].with_(sink=True)
    inputs, masks = make_inputs(problem), make_masks(problem)
    previous = reference.interleaved(len(reference.pages(problem, 32)), 2)
    trace = reference.trace(*inputs, problem, previous=previous, masks=masks).map(torch.Tensor.float)
    assert judge(trace, *inputs, problem, backend="split", masks=masks).passed
    more = masking.changed(masks, lambda t: t + 0.02 if t.is_floating_point() else t)
    wrong = reference.trace(*inputs, problem, previous=previous, masks=more).map(torch.Tensor.float)
    found = judge(wrong, *inputs, problem, backend="split", masks=masks)
    assert found.producers == ["out", "lse"]


@pytest.mark.parametrize("lengths", ["right", "left", "ragged"])
def test_a_wrong_value_is_placed_by_the_real_rows_of_its_sequence(lengths):
    problem = GROUPED.with_(batch=3, lengths=lengths)
    inputs, masks = make_inputs(problem), make_masks(problem)
    trace = backends.get("cpu").trace(*inputs, problem, masks)
    trace.scores[1, 2, 4, 70] += 1.0  # sequence 1 has all keys, and some queries
    found = judge(trace, *inputs, problem, backend="spoilt", masks=masks)
    place = {"stage": "scores", "page": 2, "batch": 1, "head": 2, "row": 4, "column": 70}
    first = found.first_row[1].first_bad
    assert first.items() >= place.items() and first["got"] == pytest.approx(first["expected"] + 1, abs=1e-3)
    down, across = found.window["at"]
    assert found.window["got"][down][across] == pytest.approx(first["got"], rel=1e-4)
    assert tile(trace, *inputs, problem, first, is_local=True, masks=masks)["stage"] == "scores"


def test_production_under_lengths_is_compared_with_its_trace_row_by_row():
    class Late(CpuBackend):
        id = "late"

        def run(self, q, k, v, problem, masks=None):
            out, lse = super().run(q, k, v, problem, masks)
            out[0, 1, -2] += 0.5
            return out, lse

    found = bisect(Late(), GROUPED.with_(batch=1, lengths="left"))
    assert not found.passed and found.producers == [] and found.production.num_bad
    assert found.production.first_bad["row"] == 126 and found.production.first_bad["head"] == 1


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", first(range(12), 6))
def test_no_false_alarm(pattern, seed):
    rng = random.Random(f"{pattern}{seed}")
    problem = random_problem(rng)
    result = bisect("cpu", problem, seed=seed, pattern=pattern)
    assert result.passed, (problem.label(), result.finding())
    assert set(roles(result).values()) == {"clean"} and result.producers == []


@pytest.mark.parametrize("pattern", ["normal", "large"])
def test_no_false_alarm_on_the_reference_itself(pattern):
    assert bisect("reference", CAUSAL, pattern=pattern, device="cpu").passed


def test_coverage_is_complete_whatever_the_chunk(monkeypatch):
    whole = bisect("cpu", GROUPED)
    assert whole.coverage == {"batches": 2, "heads": 4, "pages": 4, "page_size": 32, "complete": True,
                              "elements": 8 * 128 * (2 * 128 + 4 * (3 + 32) + 32 + 1)}  # fmt: skip
    monkeypatch.setattr("flashcore.bisection.bisecting.CHUNK_ELEMENTS", {"cpu": 1})
    pieces = bisect("cpu", GROUPED)
    assert pieces.coverage == whole.coverage and pieces.passed


# --------------------------------------------------------------------------------------- traces that differ, legally


def test_a_trace_may_use_its_own_page_size_and_keep_probs_in_float32():
    problem = FOUR_PAGES.with_(page_size=128)
    q, k, v = make_inputs(problem)
    tiles = backends.get("cpu").trace(q, k, v, problem.with_(page_size=48))
    wide = Trace(48, **{stage: getattr(tiles, stage).float() for stage in STAGES})
    result = judge(wide, q, k, v, problem, backend="tiles")
    assert result.passed and result.coverage["pages"] == 3 and result.coverage["page_size"] == 48


# -------------------------------------------------------------------------------------------------- planted bugs


class ScaledTwice(CpuBackend):
    def scores(self, q, k, problem, page):
        return super().scores(q, k, problem, page) * problem.scale


class CausalIgnored(CpuBackend):
    def scores(self, q, k, problem, page):
        return super().scores(q, k, problem.with_(causal=False), page)


class CausalOffByOne(CpuBackend):
    def scores(self, q, k, problem, page):
        scores = super().scores(q, k, problem.with_(causal=False), page)
        row, column = torch.arange(problem.seqlen_q), torch.arange(page.start, page.stop)
        return scores.masked_fill(column > row[:, None] + 1 + problem.seqlen_k - problem.seqlen_q, -math.inf)


class WrongHeadOfGroup(CpuBackend):
    def kv_of_head(self, tensor, problem):
        return tensor.float().repeat(1, problem.num_heads_q // problem.num_heads_kv, 1, 1)


class GarbageRescaled(CpuBackend):
    """Page 0 multiplies an uninitialised accumulator by 0; the garbage holds a NaN."""

    def initial_accum(self, q):
        accum = super().initial_accum(q)
        accum[1, 1, 5, 3] = math.nan
        return accum


class SumNotRescaled(CpuBackend):
    def row_sum(self, row_sum, rescale, probs):
        return row_sum + probs.sum(dim=-1)


class AccumNotRescaled(CpuBackend):
    def accum(self, accum, rescale, probs, v):
        return accum + probs.float() @ v


class WrongPageOfV(CpuBackend):
    def page_of_v(self, v, pages, j):
        return super().page_of_v(v, pages, j - 1 if j == 2 else j)


class RescaleUpsideDown(CpuBackend):
    def rescale(self, before, row_max):
        return super().rescale(before, row_max).reciprocal().nan_to_num(posinf=0.0)


class BaseTwo(CpuBackend):
    def probs(self, scores, row_max):
        return (scores - reference.safe(row_max)[..., None]).exp2()


class EmptyRowNan(CpuBackend):
    """-inf - (-inf) where a row has seen no key yet."""

    def probs(self, scores, row_max):
        return (scores - row_max[..., None]).exp()


class Launders(CpuBackend):
    """scores overflow to Inf, as unscaled float16 does, and a guard clamps what follows from it."""

    def scores(self, q, k, problem, page):
        scores = super().scores(q, k, problem, page)
        if page.start == 32:
            scores[0, 1, 9, 4] = math.inf
        return scores

    def row_max(self, scores, row_max):
        return super().row_max(scores.clamp(max=60000.0), row_max)

    def probs(self, scores, row_max):
        return super().probs(scores, row_max).clamp(max=1.0)


class MaxOfUnscaled(CpuBackend):
    """The reference is taken before the scale: far above the scores, so float16 probs vanish."""

    def row_max(self, scores, row_max):
        return row_max.maximum(scores.amax(dim=-1) + 40.0)


class MaxForgotten(CpuBackend):
    def row_max(self, scores, row_max):
        return torch.zeros_like(row_max)


class NotDivided(CpuBackend):
    def finish(self, accum, row_sum, row_max):
        _, lse = super().finish(accum, row_sum, row_max)
        return accum, lse


class LseOfBaseTwo(CpuBackend):
    def finish(self, accum, row_sum, row_max):
        out, _ = super().finish(accum, row_sum, row_max)
        return out, row_max + row_sum.log2()


class LateTail(CpuBackend):
    """Only the last column of the last page of the last head is wrong: what looking at page 0, head 0 never sees."""

    def scores(self, q, k, problem, page):
        scores = super().scores(q, k, problem, page)
        if page.stop == problem.seqlen_k:
            scores[-1, -1, -1, -1] += 0.01
        return scores


# bug, problem, pattern, stages that must be producers, stages that must be propagators, part of the first coordinate
BUGS = [
    (ScaledTwice, FOUR_PAGES, "normal", {"scores"}, {"probs", "row_sum", "accum", "out", "lse"}, {"page": 0, "row": 0}),
    (CausalIgnored, CAUSAL, "normal", {"scores"}, {"probs", "out", "lse"}, {"row": 0, "column": 1, "page": 0}),
    (CausalOffByOne, CAUSAL, "normal", {"scores"}, {"probs", "out"}, {"row": 0, "column": 1}),
    (WrongHeadOfGroup, GROUPED, "normal", {"scores", "accum"}, {"probs", "out", "lse"}, {"batch": 0, "head": 1}),
    (GarbageRescaled, FOUR_PAGES, "normal", {"accum"}, {"out"},
     {"page": 0, "batch": 1, "head": 1, "row": 5, "column": 3}),
    (SumNotRescaled, FOUR_PAGES, "normal", {"row_sum"}, {"out", "lse"}, {"page": 1}),
    (AccumNotRescaled, FOUR_PAGES, "normal", {"accum"}, {"out"}, {"page": 1}),
    (WrongPageOfV, FOUR_PAGES, "normal", {"accum"}, {"out"}, {"page": 2, "batch": 0, "head": 0, "row": 0}),
    (RescaleUpsideDown, FOUR_PAGES, "rising", {"rescale"}, {"row_sum", "accum", "out", "lse"}, {"page": 1}),
    (BaseTwo, FOUR_PAGES, "normal", {"probs"}, {"row_sum", "accum", "out", "lse"}, {"page": 0}),
    (EmptyRowNan, EMPTY_ROWS, "normal", {"probs"}, {"row_sum", "accum", "out", "lse"}, {"page": 0, "row": 0}),
    (Launders, FOUR_PAGES, "normal", {"scores", "probs"}, {"out", "lse"},
     {"page": 1, "head": 1, "row": 9, "column": 36}),
    (MaxOfUnscaled, FOUR_PAGES, "normal", {"row_max"}, set(), {"page": 0}),
    (MaxForgotten, FOUR_PAGES, "large", {"row_max"}, set(), {"page": 0}),
    (NotDivided, FOUR_PAGES, "normal", {"out"}, set(), {"batch": 0, "head": 0, "row": 0}),
    (LseOfBaseTwo, FOUR_PAGES, "normal", {"lse"}, set(), {"row": 0}),
    (LateTail, GROUPED, "normal", {"scores"}, set(), {"page": 3, "batch": 1, "head": 3, "row": 127, "column": 127}),
]  # fmt: skip


@functools.cache
def clean_run(problem: Problem, pattern: str, chunk: int):
    """What is right, beside which several bugs are planted; the chunk is the one that is set."""
    return bisect("cpu", problem, pattern=pattern)


@pytest.mark.parametrize("case", BUGS, ids=lambda case: case[0].__name__)
@pytest.mark.parametrize("chunk", [1 << 20, 1])
def test_a_planted_bug_is_found_where_it_was_made(case, chunk, monkeypatch):
    bug, problem, pattern, producers, propagators, place = case
    monkeypatch.setattr("flashcore.bisection.bisecting.CHUNK_ELEMENTS", {"cpu": chunk})
    assert clean_run(problem, pattern, chunk).passed, "the clean run has to be silent"
    backend = bug()
    backend.id = "planted"
    result = bisect(backend, problem, pattern=pattern)
    assert not result.passed
    assert set(result.producers) == producers, result.finding()
    found = roles(result)
    assert propagators <= {stage for stage, role in found.items() if role == "propagator"}, found
    for stage in STAGES[: STAGES.index(min(producers, key=STAGES.index))]:
        assert found[stage] == "clean", f"{stage} comes before the bug"
    first = next(row for row in result.stages if row.role == "producer").local.first_bad
    assert first.items() >= place.items(), first
    assert first["got"] != first["expected"]


def test_progress_is_told_head_by_head(monkeypatch):
    monkeypatch.setitem(bisecting.CHUNK_ELEMENTS, "cpu", 1)
    told = []
    assert bisect("cpu", square(1, 3, 16, 16), progress=lambda *said: told.append(said)).passed
    assert [said[1:] for said in told] == [(0, 3), (1, 3), (2, 3)] and "stages of cpu" in told[0][0]


def test_two_bugs_at_once_are_both_found():
    class Both(ScaledTwice, AccumNotRescaled):
        id = "both"

    assert bisect(Both(), FOUR_PAGES).producers == ["scores", "accum"]


def test_a_finding_names_stage_place_and_both_values():
    class Planted(LateTail):
        id = "planted"

    text = bisect(Planted(), GROUPED).finding()
    assert text.startswith("scores goes wrong first: 1 of 131072 values, wrong at page 3, batch 1, head 3, row 127")
    assert "got " in text and "expected " in text


def test_production_that_differs_from_its_traced_build_fails():
    class Different(CpuBackend):
        id = "different"

        def run(self, q, k, v, problem):
            out, lse = super().run(q, k, v, problem)
            out[1, 0, 3, 2] = math.nan
            return out, lse

    result = bisect(Different(), FOUR_PAGES)
    assert result.producers == [] and not result.passed
    assert "production gives another result" in result.finding() and "row 3" in result.finding()
    assert check_attention(Different(), FOUR_PAGES).status == "failed"


# ------------------------------------------------------------------------------------------------ records and errors


def test_the_record_and_the_table():
    class Planted(WrongPageOfV):
        id = "planted"

    trial = bisect(Planted(), FOUR_PAGES).to_trial()
    again = Trial.model_validate_json(trial.model_dump_json())
    assert (again.kind, again.status, again.backend) == ("bisection", "failed", "planted")
    assert [row["stage"] for row in again.data["stages"]] == list(STAGES)
    accum = next(row for row in again.data["stages"] if row["stage"] == "accum")
    assert accum["role"] == "producer" and accum["local"]["first_bad"]["page"] == 2
    assert again.data["coverage"]["complete"] is True and again.data["producers"] == ["accum"]
    table = bisect(Planted(), FOUR_PAGES).table()
    assert list(table["stage"]) == list(STAGES)
    row = table.set_index("stage").loc["accum"]
    assert row["role"] == "producer" and row["from own inputs"].startswith("FAIL (") and "page 2" in row["first bad"]
    assert table.set_index("stage").loc["scores", "from own inputs"] == "PASS"


def test_a_nan_survives_the_record():
    class Planted(GarbageRescaled):
        id = "planted"

    again = Trial.model_validate_json(bisect(Planted(), FOUR_PAGES).to_trial().model_dump_json())
    accum = next(row for row in again.data["stages"] if row["stage"] == "accum")
    assert accum["local"]["num_nan"] == 1 and accum["local"]["first_bad"]["kind"] == "NaN"
    assert accum["local"]["passed"] is False and accum["global"]["passed"] is False


def test_backends_without_stages_and_wrong_traces():
    with pytest.raises(Unsupported, match="cannot be bisected"):
        bisect("sdpa-math", FOUR_PAGES)
    assert bisect_trial("sdpa-math", FOUR_PAGES).status == "unsupported"
    assert bisect_trial("cpu", FOUR_PAGES).status == "ok"

    class Short(CpuBackend):
        id = "short"

        def trace(self, q, k, v, problem):
            trace = super().trace(q, k, v, problem)
            return Trace(**(vars(trace) | {"row_sum": trace.row_sum[:, :, :1]}))

    with pytest.raises(FlashCoreError, match=r"'short' traced row_sum with shape \(2, 2, 1, 128\).*\(2, 2, 4, 128\)"):
        bisect(Short(), FOUR_PAGES)
    assert bisect_trial(Short(), FOUR_PAGES).status == "error"

    class Gone(CpuBackend):
        id = "gone"

        def availability(self):
            return Availability(False, "no such thing", "wait")

    assert bisect_trial(Gone(), FOUR_PAGES).status == "unavailable"


@pytest.mark.gpu
def test_every_traceable_backend_on_the_gpu_is_clean():
    for backend in backends.select("all", device="cuda"):
        if backend.traceable and backend.availability().ok:
            for problem in (square(1, 2, 256, 64), square(2, 4, 200, 128, causal=True)):
                if backend.why_not(problem) is None:
                    result = bisect(backend, problem, device="cuda")
                    assert result.passed, (backend.id, result.finding())
