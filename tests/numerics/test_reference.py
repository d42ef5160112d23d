"""The reference against torch's own float64 attention, against itself page by page, and at its edges."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashcore.backends.others import masked
from flashcore.errors import FlashCoreError
from flashcore.numerics import masking, reference
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.numerics.masking import MaskTensors
from flashcore.numerics.reference import STAGES
from flashcore.problem import Problem, square

SHAPES = [
    square(2, 2, 64, 32),
    square(1, 2, 100, 16, causal=True),
    Problem(batch=1, num_heads_q=6, num_heads_kv=2, seqlen_q=33, seqlen_k=70, head_dim=8, causal=True),
    Problem(batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=1, seqlen_k=129, head_dim=24, softmax_scale=0.7),
    Problem(batch=1, num_heads_q=2, num_heads_kv=2, seqlen_q=9, seqlen_k=1, head_dim=8),
]
EMPTY_ROWS = Problem(batch=1, num_heads_q=2, num_heads_kv=2, seqlen_q=40, seqlen_k=24, head_dim=8, causal=True)


def by_torch(q, k, v, problem):
    """torch's float64 attention with the bottom-right mask written out."""
    mask = None
    if problem.causal:
        ones = torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.bool)
        mask = ones.tril(problem.seqlen_k - problem.seqlen_q)
    return torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, scale=problem.scale, enable_gqa=True
    )


@pytest.mark.parametrize("problem", SHAPES, ids=lambda p: p.label())
@pytest.mark.parametrize("chunk", [1 << 20, 50])
def test_attention_agrees_with_torch_whatever_the_chunk(problem, chunk, monkeypatch):
    monkeypatch.setitem(reference.CHUNK_SCORES, "cpu", chunk)
    inputs = make_inputs(problem, layout="bshd")
    out, lse = reference.attention(*inputs, problem)
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(out, by_torch(*inputs, problem), rtol=1e-12, atol=1e-12)
    near, near_lse = reference.attention_same_precision(*inputs, problem)
    assert near.dtype == torch.float16 and near_lse.dtype == torch.float32
    error = float((near - out).abs().max())
    assert error < 4e-3 and (error > 0 or problem.seqlen_k == 1), "one key is copied, anything else is rounded"


def test_lse_of_two_keys_by_hand():
    problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=1, seqlen_k=2, head_dim=1, softmax_scale=2.0)
    q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.5], [-0.5]]]])
    out, lse = reference.attention(q, k, torch.tensor([[[[3.0], [5.0]]]]), problem)
    assert float(lse) == pytest.approx(math.log(math.e + 1 / math.e), abs=1e-14)
    assert float(out) == pytest.approx((3 * math.e + 5 / math.e) / (math.e + 1 / math.e), abs=1e-14)


@pytest.mark.parametrize("compute", [reference.attention, reference.attention_same_precision])
def test_a_row_that_sees_no_key_gives_zero_and_minus_infinity(compute):
    out, lse = compute(*make_inputs(EMPTY_ROWS), EMPTY_ROWS)
    assert bool((out[:, :, :16] == 0).all()) and bool((lse[:, :, :16] == -math.inf).all())
    assert bool(lse[:, :, 16:].isfinite().all()) and bool(out.isfinite().all())


@pytest.mark.parametrize("problem", [*SHAPES, EMPTY_ROWS], ids=lambda p: p.label())
@pytest.mark.parametrize("page_size", [7, 64, 500])
@pytest.mark.parametrize("pattern", ["normal", "rising", "large"])
def test_the_page_loop_ends_where_whole_attention_does(problem, page_size, pattern):
    inputs = make_inputs(problem, pattern=pattern)
    out, lse = reference.attention(*inputs, problem)
    trace = reference.trace(*inputs, problem, page_size=page_size)
    torch.testing.assert_close(trace.out, out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(trace.lse, lse, rtol=1e-12, atol=1e-12)
    num_pages = -(-problem.seqlen_k // page_size)
    b, h, sq = problem.batch, problem.num_heads_q, problem.seqlen_q
    assert trace.row_max.shape == trace.rescale.shape == trace.row_sum.shape == (b, h, num_pages, sq)
    assert trace.accum.shape == (b, h, num_pages, sq, problem.head_dim)
    assert bool((trace.rescale[:, :, 0] == 0).all()), "nothing precedes page 0"
    assert not any(bool(getattr(trace, stage).isnan().any()) for stage in STAGES)


def test_stages_from_a_right_trace_give_that_trace_again():
    problem = SHAPES[2].with_(page_size=16)
    inputs = make_inputs(problem)
    trace = reference.trace(*inputs, problem)
    again = reference.stages_from(trace, *inputs, problem)
    for stage in STAGES:
        torch.testing.assert_close(getattr(again, stage), getattr(trace, stage), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", range(len(STAGES)))
def test_stages_from_a_spoilt_stage_ignores_that_stage_and_uses_it_downstream(index):
    """The stage itself is computed from what came before; only its direct consumers see the spoilt value."""
    consumers = {
        "scores": {"row_max", "probs"}, "row_max": {"rescale", "probs", "lse"}, "rescale": {"row_sum", "accum"},
        "probs": {"row_sum", "accum"}, "row_sum": {"row_sum", "out", "lse"}, "accum": {"accum", "out"},
        "out": set(), "lse": set(),
    }  # fmt: skip
    name = STAGES[index]
    problem = square(1, 2, 48, 8, page_size=16)
    inputs = make_inputs(problem)
    clean = reference.trace(*inputs, problem)
    values = {stage: getattr(clean, stage) for stage in STAGES}
    spoilt = reference.Trace(16, **(values | {name: values[name] * 1.25}))
    found = reference.stages_from(spoilt, *inputs, problem)
    changed = {s for s in STAGES if not torch.allclose(getattr(found, s), values[s], rtol=1e-9, atol=1e-9)}
    assert changed == consumers[name]


# ------------------------------------------------------------------------------------------------ chains of pages


def test_the_chains_of_split_kernels_by_hand():
    assert reference.interleaved(5, 2) == (-1, -1, 0, 1, 2)
    assert reference.interleaved(2, 4) == (-1, -1) and reference.interleaved(3, 1) == (-1, 0, 1)
    assert reference.contiguous(5, 2) == (-1, 0, -1, 2, -1) and reference.contiguous(3, 8) == (-1, 0, 1)
    assert reference.links(None, 3) == (-1, 0, 1)
    chain = reference.links((-1, 0, -1, 1, 2), 5)
    assert reference.chains(chain) == [[0, 1, 3], [2, 4]] and reference.ends(chain) == [3, 4]


@pytest.mark.parametrize(
    ("previous", "words"),
    [
        ((0, 0), "page 0 continue page 0; it has to be an earlier page"),
        ((-1, 2, 0), "page 1 continue page 2; it has to be an earlier page"),
        ((-2,), "page 0 continue page -2"),
        ((-1, 0, 0), "page 2 continue page 0, which page 1 continues already"),
    ],
)
def test_chains_that_cannot_be_are_an_error(previous, words):
    problem = square(1, 1, 16 * len(previous), 8, page_size=16)
    stages = {stage: getattr(reference.trace(*make_inputs(problem), problem), stage) for stage in STAGES}
    with pytest.raises(FlashCoreError, match=words):
        reference.Trace(16, **stages, previous=previous)
    with pytest.raises(FlashCoreError, match=words):
        reference.trace(*make_inputs(problem), problem, previous=previous)


def test_chains_over_another_number_of_pages_are_an_error():
    problem = square(1, 1, 48, 8, page_size=16)
    with pytest.raises(FlashCoreError, match="each of 2 pages continues; there are 3 pages"):
        reference.trace(*make_inputs(problem), problem, previous=(-1, 0))


CHAINS = [
    lambda pages: reference.interleaved(pages, 2),
    lambda pages: reference.interleaved(pages, 5),
    lambda pages: reference.contiguous(pages, 2),
    lambda pages: reference.contiguous(pages, 1),
]


@pytest.mark.parametrize("problem", [*SHAPES, EMPTY_ROWS], ids=lambda p: p.label())
@pytest.mark.parametrize("make_chains", CHAINS)
@pytest.mark.parametrize("pattern", ["normal", "rising", "large"])
def test_chains_combined_end_where_whole_attention_does(problem, make_chains, pattern):
    inputs = make_inputs(problem, pattern=pattern)
    out, lse = reference.attention(*inputs, problem)
    previous = make_chains(-(-problem.seqlen_k // 7))
    trace = reference.trace(*inputs, problem, page_size=7, previous=previous)
    assert trace.previous == previous
    torch.testing.assert_close(trace.out, out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(trace.lse, lse, rtol=1e-12, atol=1e-12)
    starts = [page for page, before in enumerate(previous) if before < 0]
    assert bool((trace.rescale[:, :, starts] == 0).all()), "nothing precedes the first page of a chain"
    assert not any(bool(getattr(trace, stage).isnan().any()) for stage in STAGES)
    again = reference.stages_from(trace, *inputs, problem)
    assert again.previous == previous
    for stage in STAGES:
        torch.testing.assert_close(getattr(again, stage), getattr(trace, stage), rtol=1e-12, atol=1e-12)


def test_one_chain_written_out_is_the_ordinary_trace_to_the_bit():
    problem = SHAPES[2].with_(page_size=16)
    inputs = make_inputs(problem)
    plain = reference.trace(*inputs, problem)
    written = reference.trace(*inputs, problem, previous=(-1, 0, 1, 2, 3))
    assert plain.previous is None
    for stage in STAGES:
        assert torch.equal(getattr(plain, stage), getattr(written, stage))


def test_a_chain_is_the_ordinary_loop_over_its_own_pages():
    """Two chains of two pages: the stages of each are those of a problem that has only these keys."""
    problem = square(1, 2, 64, 8, page_size=16)
    q, k, v = make_inputs(problem)
    whole = reference.trace(q, k, v, problem, previous=reference.contiguous(4, 2))
    half = problem.with_(seqlen_k=32)
    for part in (0, 1):
        keys, two = slice(32 * part, 32 * part + 32), slice(2 * part, 2 * part + 2)
        alone = reference.trace(q, k[:, :, keys], v[:, :, keys], half)
        for stage in ("row_max", "rescale", "row_sum", "accum"):
            torch.testing.assert_close(getattr(whole, stage)[:, :, two], getattr(alone, stage), rtol=1e-12, atol=1e-12)


def test_the_combined_results_depend_on_the_reference_of_each_chain():
    """With one chain `out` needs no reference; with several it is what they are weighed by."""
    problem = square(1, 2, 48, 8, page_size=16)
    inputs = make_inputs(problem)
    clean = reference.trace(*inputs, problem, previous=reference.interleaved(3, 2))
    spoilt = clean.row_max.clone()
    spoilt[:, :, 1] += 0.5
    values = {stage: getattr(clean, stage) for stage in STAGES} | {"row_max": spoilt}
    found = reference.stages_from(reference.Trace(16, **values, previous=clean.previous), *inputs, problem)
    changed = {s for s in STAGES if not torch.allclose(getattr(found, s), getattr(clean, s), rtol=1e-9, atol=1e-9)}
    assert changed == {"probs", "out", "lse"}, "page 1 is a chain alone, so no rescale follows from its reference"


# ------------------------------------------------------------------------------------------------ masks


def by_other_code(q, k, v, problem, masks):
    """`out` and `lse` by `backends.others.masked`, which shares no line with the reference; one sequence at a time."""
    out, lse = q.new_zeros(q.shape), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    counts = [[n] * problem.batch for n in (problem.seqlen_q, problem.seqlen_k)]
    for b in range(problem.batch):
        index, (rows, keys) = b, (slice(0, counts[0][b]), slice(0, counts[1][b]))
        if problem.lengths == "ragged":
            index = 0
            rows, keys = (slice(*cu[b : b + 2].tolist()) for cu in (masks.cu_seqlens_q, masks.cu_seqlens_k))
        elif problem.lengths:
            num_q, num_k = int(masks.seqlens_q[b]), int(masks.seqlens_k[b])
            rows, keys = slice(0, num_q), slice(0, num_k)
            if problem.lengths == "left":
                rows = slice(problem.seqlen_q - num_q, problem.seqlen_q)
                keys = slice(problem.seqlen_k - num_k, problem.seqlen_k)
        if rows.start == rows.stop:
            continue
        sink = None if not problem.sink else masks.sink.double()
        described = masked.Masking(
            causal=problem.causal, window_left=problem.window_left, window_right=problem.window_right,
            softcap=problem.softcap or 0.0, sink=sink,
        )  # fmt: skip
        if keys.start == keys.stop:
            if sink is not None:
                lse[index, :, rows] = sink[:, None]
            continue
        one = slice(index, index + 1)
        found = masked.attention(q[one, :, rows], k[one, :, keys], v[one, :, keys], described, problem.scale)
        out[one, :, rows], lse[one, :, rows] = found
    return out, lse


@st.composite
def masked_problems(draw):
    """Small problems under every mask: windows that hide all, one row, empty sequences, more queries than keys."""
    size = st.sampled_from([1, 2, 5, 9, 16])
    causal = draw(st.booleans())
    limit = st.sampled_from([-1, -1, 0, 1, 3, 40])
    return Problem(
        batch=draw(st.integers(1, 7)), num_heads_q=4, num_heads_kv=draw(st.sampled_from([1, 2, 4])),
        seqlen_q=draw(size), seqlen_k=draw(size), head_dim=3, dtype="float32", causal=causal, window_left=draw(limit),
        window_right=-1 if causal else draw(limit), softcap=draw(st.sampled_from([None, None, 0.5, 30.0])),
        sink=draw(st.booleans()), lengths=draw(st.sampled_from(["", "right", "left", "ragged"])),
        page_size=draw(st.sampled_from([1, 4, 64])), softmax_scale=draw(st.sampled_from([None, -0.7, 3.0])),
    )  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(masked_problems(), st.integers(0, 5), st.sampled_from(["normal", "large", "rising", "sunken"]))
@pytest.mark.slow
def test_masks_mean_the_same_to_other_code_and_to_the_page_loop(problem, seed, pattern):
    """Padding holds NaN here, and 0 for the other code."""
    q, k, v = make_inputs(problem, seed=seed, pattern=pattern, layout="apart")
    masks = make_masks(problem, seed=seed)
    out, lse = reference.attention(q, k, v, problem, masks)
    expected, expected_lse = by_other_code(*(t.double().nan_to_num(nan=0.0) for t in (q, k, v)), problem, masks)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)
    previous = [None, reference.interleaved(-(-problem.seqlen_k // problem.page_size), 2)][seed % 2]
    trace = reference.trace(q, k, v, problem, previous=previous, masks=masks)
    aligned = masking.aligned_results(out, lse, problem, masks)
    assert trace.out.shape[0] == problem.batch and trace.row_max.shape[3] == problem.seqlen_q
    torch.testing.assert_close(trace.out, aligned[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(trace.lse, aligned[1], rtol=1e-9, atol=1e-9)
    again = reference.stages_from(trace, q, k, v, problem, masks)
    for stage in STAGES:
        torch.testing.assert_close(getattr(again, stage), getattr(trace, stage), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [1 << 20, 40])
def test_a_chunk_reads_only_the_keys_that_its_rows_may_see(chunk, monkeypatch):
    """Keys far left of every window hold NaN, and rows whose window holds no key give zeros."""
    monkeypatch.setitem(reference.CHUNK_SCORES, "cpu", chunk)
    problem = Problem(batch=1, num_heads_q=2, num_heads_kv=1, seqlen_q=6, seqlen_k=30, head_dim=4, causal=True,
                      window_left=3)  # fmt: skip
    q, k, v = make_inputs(problem)
    expected = by_other_code(q.double(), k.double(), v.double(), problem, None)
    k[:, :, :21], v[:, :, :21] = math.nan, math.nan
    for got, right in zip(reference.attention(q, k, v, problem), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    assert reference.seen_columns(problem, slice(2, 4)) == slice(23, 28)
    hidden = problem.with_(seqlen_q=30, seqlen_k=5)
    out, lse = reference.attention(*make_inputs(hidden), hidden)
    assert not out[:, :, :25].any() and bool((lse[:, :, :25] == -math.inf).all())
    assert reference.seen_columns(hidden, slice(0, 10)) == slice(0, 0)


def test_a_softcap_comes_before_the_mask_and_a_sink_takes_its_part_by_hand():
    """Scores 2 and -2 capped at 1 are tanh(2) and -tanh(2); the third key is hidden; the sink scores 0.5."""
    problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=1, seqlen_k=3, head_dim=1, softmax_scale=2.0,
                      window_left=1, softcap=1.0, sink=True, dtype="float32")  # fmt: skip
    q, k, v = (torch.tensor(rows).view(1, 1, -1, 1) for rows in ([1.0], [9.0, 1.0, -1.0], [7.0, 3.0, 5.0]))
    masks = MaskTensors(sink=torch.tensor([0.5]))
    up, down, sink = math.exp(math.tanh(2)), math.exp(-math.tanh(2)), math.exp(0.5)
    out, lse = reference.attention(q, k, v, problem, masks)
    assert float(out) == pytest.approx((3 * up + 5 * down) / (up + down + sink), abs=1e-14)
    assert float(lse) == pytest.approx(math.log(up + down + sink), abs=1e-14)
    trace = reference.trace(q, k, v, problem, masks=masks)
    assert trace.scores.flatten().tolist() == pytest.approx([-math.inf, math.tanh(2), -math.tanh(2)])
    assert float(trace.row_sum) == pytest.approx(1 + down / up), "a sink enters out and lse alone"
    near, near_lse = reference.attention_same_precision(q, k, v, problem, masks)
    assert float(near) == pytest.approx(float(out), rel=1e-6) and float(near_lse) == pytest.approx(float(lse), rel=1e-6)


@pytest.mark.parametrize("sink", [-1e4, 1e4, -math.inf])
def test_a_sink_far_from_the_scores_overflows_nothing(sink):
    problem = square(1, 2, 4, 8, causal=True, sink=True).with_(seqlen_k=3)
    inputs, masks = make_inputs(problem), MaskTensors(sink=torch.tensor([sink, 0.0]))
    plain, plain_lse = reference.attention(*inputs, problem.with_(sink=False))
    for compute in (reference.attention, reference.attention_same_precision):
        out, lse = compute(*inputs, problem, masks)
        assert not out.isnan().any() and bool((lse[:, 0, 0] == sink).all()), "row 0 sees no key"
        torch.testing.assert_close(out[:, 0].double(), plain[:, 0] if sink < 0 else 0 * plain[:, 0], rtol=0, atol=1e-3)
        wanted = plain_lse[:, 0, 1:] if sink < 0 else torch.full_like(plain_lse[:, 0, 1:], sink)
        torch.testing.assert_close(lse[:, 0, 1:].double(), wanted, rtol=1e-6, atol=1e-6)


def test_grouped_heads_share_consecutive_heads():
    problem = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=1, seqlen_k=1, head_dim=1)
    assert reference.kv_head_index(problem, "cpu").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.gpu
def test_the_report_workload_fits_on_the_gpu_and_is_quick():
    problem = square(16, 16, 2048, 64)
    inputs = make_inputs(problem, device="cuda")
    reference.attention(*inputs, problem)
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    reference.attention(*inputs, problem)
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) < 2000
    assert torch.cuda.max_memory_allocated() < 40e9
