"""Every kernel of ours against float64, on a GPU: the full matrix of shapes, dtypes, masks, layouts and inputs.

A kernel for a few query tokens takes part of the matrix, and gets fewer queries where a test has one problem for all.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from flashcore import backends
from flashcore.bisection.bisecting import bisect
from flashcore.measure.check import check_attention
from flashcore.numerics.inputs import PATTERNS, make_inputs
from flashcore.paging import PAGE_SIZES
from flashcore.problem import PRESETS, Problem, square

pytestmark = pytest.mark.gpu

KERNELS = [b.id for b in backends.all_backends() if b.role == "ours" and b.device == "cuda"]

LENGTHS = [
    (1, 1), (1, 333), (17, 31), (64, 64), (100, 257), (129, 128), (200, 63), (192, 64), (300, 300), (5, 77), (8, 1000),
    (7, 5),
]  # fmt: skip
"""(seqlen_q, seqlen_k): one row, tails on either side, more queries than keys (rows without keys when causal), and the
last few tokens of a sequence."""
HEADS = [(1, 2, 2), (2, 4, 2), (1, 6, 1), (2, 18, 2), (1, 5, 5)]
"""(batch, num_heads_q, num_heads_kv): five, so that they and the page sizes meet every dtype, head_dim and mask."""
FEW_TOKENS = 5
"""Query tokens for a backend that takes only a few."""


def matrix() -> list[Problem]:
    problems = []
    shapes = itertools.product(LENGTHS, (64, 128), ("float16", "bfloat16"), (False, True))
    for number, ((seqlen_q, seqlen_k), head_dim, dtype, causal) in enumerate(shapes):
        batch, heads_q, heads_kv = HEADS[number % len(HEADS)]
        problems.append(
            Problem(
                batch=batch, num_heads_q=heads_q, num_heads_kv=heads_kv, seqlen_q=seqlen_q, seqlen_k=seqlen_k,
                head_dim=head_dim, dtype=dtype, causal=causal, page_size=PAGE_SIZES[number // 3 % len(PAGE_SIZES)],
            )
        )  # fmt: skip
    return problems


def taken(backend: str) -> list[Problem]:
    """Those of the matrix that a backend takes."""
    found = [problem for problem in matrix() if backends.get(backend).why_not(problem) is None]
    assert len(found) >= 20
    return found


def suited(backend: str, problem: Problem) -> Problem:
    """The problem; where the backend takes only a few query tokens, with a few."""
    chosen = backends.get(backend)
    if chosen.why_not(problem) is not None:
        problem = problem.with_(seqlen_q=min(FEW_TOKENS, problem.seqlen_q))
    assert chosen.why_not(problem) is None
    return problem


def assert_right(trial):
    assert trial.status == "ok", f"{trial.backend} on {trial.problem.label()}: {trial.reason}"


@pytest.mark.parametrize("backend", KERNELS)
def test_full_matrix_of_shapes(backend):
    for seed, problem in enumerate(taken(backend)):
        layout = "bshd" if seed % 2 else "bhsd"
        assert_right(check_attention(backend, problem, seed=seed, layout=layout))


@pytest.mark.parametrize("backend", KERNELS)
def test_small_matrix(backend):
    """A few launches with every kind of tail: short enough to run under compute-sanitizer."""
    for number, problem in enumerate(taken(backend)[::7]):
        chosen = backends.get(backend)
        q, k, v = make_inputs(problem, seed=number, device="cuda", layout="bshd" if number % 2 else "bhsd")
        out, lse = chosen.run(q, k, v, problem)
        assert out.isfinite().all() and not lse.isnan().any()
        chosen.trace(q, k, v, problem)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_input_pattern(backend, pattern):
    for head_dim, dtype, causal in itertools.product((64, 128), ("float16", "bfloat16"), (False, True)):
        problem = Problem(
            batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=321, seqlen_k=517, head_dim=head_dim, dtype=dtype,
            causal=causal,
        )  # fmt: skip
        assert_right(check_attention(backend, suited(backend, problem), seed=3, pattern=pattern))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("scale", [0.0, -0.2, 1.0, 1e-4, 3.0])
def test_any_finite_scale(backend, scale):
    for head_dim in (64, 128):
        problem = suited(backend, square(1, 2, 200, head_dim, causal=True, softmax_scale=scale))
        assert_right(check_attention(backend, problem, seed=5))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_measured_workloads(backend):
    for problem in (PRESETS["report"], PRESETS["report-causal"], PRESETS["latency"], square(2, 16, 4096, 128)):
        assert_right(check_attention(backend, suited(backend, problem), seed=7))


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_without_a_key_give_zero_and_minus_infinity(backend):
    problem = Problem(batch=1, num_heads_q=2, num_heads_kv=2, seqlen_q=150, seqlen_k=70, head_dim=64, causal=True)
    if backends.get(backend).why_not(problem):
        problem = problem.with_(seqlen_q=8, seqlen_k=3)
    q, k, v = make_inputs(problem, seed=1, device="cuda")
    out, lse = backends.get(backend).run(q, k, v, problem)
    empty = problem.seqlen_q - problem.seqlen_k
    assert torch.all(out[:, :, :empty] == 0)
    assert torch.all(lse[:, :, :empty] == float("-inf"))
    assert torch.all(lse[:, :, empty:].isfinite())


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_that_start_at_odd_addresses(backend):
    problem = suited(backend, square(1, 2, 100, 64))
    rows = (problem.seqlen_q, problem.seqlen_k, problem.seqlen_k)
    wide = [torch.randn(1, 2, n, 67, device="cuda", dtype=torch.float16) for n in rows]
    shifted = [t[..., 1:65] for t in wide]
    got, _ = backends.get(backend).run(*shifted, problem)
    expected, _ = backends.get(backend).run(*(t.contiguous() for t in shifted), problem)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_bshd_views_go_in_and_come_out_without_a_copy(backend):
    problem = suited(backend, square(2, 4, 128, 64))
    q, k, v = make_inputs(problem, device="cuda", layout="bshd")
    out, _ = backends.get(backend).run(q, k, v, problem)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", KERNELS)
def test_same_inputs_give_the_same_bits(backend):
    problem = suited(backend, square(2, 4, 777, 64, causal=True))
    q, k, v = make_inputs(problem, seed=2, device="cuda")
    first = backends.get(backend).run(q, k, v, problem)
    for _ in range(5):
        again = backends.get(backend).run(q, k, v, problem)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("backend", sorted({*KERNELS} - {"cublaslt-paged"}))  # it reads the page table to the host
def test_runs_on_the_callers_stream_and_in_a_graph(backend):
    problem = suited(backend, square(1, 4, 256, 64))
    q, k, v = make_inputs(problem, seed=4, device="cuda")
    expected, _ = backends.get(backend).run(q, k, v, problem)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        backends.get(backend).run(q, k, v, problem)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured, _ = backends.get(backend).run(q, k, v, problem)
    captured.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.replay()
    stream.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_more_than_two_to_the_31_elements(backend):
    problem = suited(backend, square(1, 2, 64, 64))
    stride = 2**31 + 64  # elements from one head to the next
    if torch.cuda.mem_get_info()[0] < 3 * 2 * stride * 2:
        pytest.skip("the GPU has too little free memory for tensors this far apart")
    views = []
    for rows in (problem.seqlen_q, 64, 64):
        small = torch.randn(1, 2, rows, 64, device="cuda", dtype=torch.float16)
        far = torch.empty(stride + 64 * 64, device="cuda", dtype=torch.float16)
        view = far.as_strided(small.shape, (2 * stride, stride, 64, 1))
        view.copy_(small)
        views.append((view, small))
    got, _ = backends.get(backend).run(*(view for view, _ in views), problem)
    expected, _ = backends.get(backend).run(*(small for _, small in views), problem)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_trace_is_clean_and_agrees_with_the_production_kernel(backend):
    chosen = backends.get(backend)
    for number, problem in enumerate(taken(backend)[::5]):
        found = bisect(chosen, problem, seed=number)
        assert found.to_trial().status == "ok", f"{problem.label()}\n{found.table()}"
        q, k, v = make_inputs(problem, seed=number, device="cuda")
        out, lse = chosen.run(q, k, v, problem)
        trace = chosen.trace(q, k, v, problem)
        if backend != "decode":  # cuts its keys otherwise in a traced call; bisection has compared the results
            assert torch.equal(out, trace.out) and torch.equal(lse, trace.lse)
