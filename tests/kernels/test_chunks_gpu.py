"""The batch-invariant kernels on a GPU: right, stage by stage, and bit by bit the same however a row is computed."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.bisection import bisect
from flashcore.measure import check
from flashcore.paging import PagedKV
from flashcore.problem import Problem

pytestmark = pytest.mark.gpu
OURS = ("hopper", "hopper-paged", "decode")
LONG = Problem(
    batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=200, seqlen_k=4500, head_dim=128, causal=True, batch_invariant=True
)


def suited(name: str, problem: Problem) -> Problem:
    return backends.get(name).suits(problem) if name == "decode" else problem


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("problem", check.invariant_problems("full", gpu=False), ids=lambda p: p.label())
@pytest.mark.parametrize("pattern", ["normal", "rising", "sunken"])
def test_right_against_float64(name, problem, pattern):
    problem = suited(name, problem)
    if (reason := backends.get(name).why_not(problem)) is not None:
        assert problem.masks, reason
        pytest.skip(reason)
    trial = check.check_attention(backends.get(name), problem, device="cuda", pattern=pattern)
    assert trial.status == "ok", trial.reason


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("masks", [{}, {"window_left": 2500, "sink": True}], ids=["plain", "masks"])
def test_every_stage_is_right_over_several_chunks(name, head_dim, masks):
    found = bisect(name, suited(name, LONG.with_(head_dim=head_dim, page_size=64, **masks)))
    assert found.passed, found


def paged(k: torch.Tensor, v: torch.Tensor, page: int) -> PagedKV:
    """One sequence, ``[heads, keys, head_dim]`` each, in pages that lie backwards in their pool; NaN elsewhere."""
    heads, keys, width = k.shape
    pages = -(-keys // page)
    pools = []
    for rows in (k, v):
        padded = torch.full((heads, pages * page, width), float("nan"), dtype=k.dtype, device=k.device)
        padded[:, :keys] = rows
        pools.append(padded.view(heads, pages, page, width).transpose(0, 1).flip(0).contiguous())
    table = torch.arange(pages - 1, -1, -1, dtype=torch.int32, device=k.device)[None]
    return PagedKV(*pools, table, torch.tensor([keys], dtype=torch.int32, device=k.device))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tiny", [False, True], ids=["usual", "subnormal"])
def test_a_row_has_the_same_bits_in_a_prefill_a_later_chunk_a_batch_and_a_step(head_dim, dtype, tiny):
    generator = torch.Generator("cuda").manual_seed(head_dim)
    problem = LONG.with_(batch=1, seqlen_q=4500, head_dim=head_dim, dtype=dtype)
    kind = {"generator": generator, "device": "cuda"}
    q, k, v = (torch.randn(1, heads, 4500, head_dim, **kind) for heads in (4, 2, 2))
    k *= torch.linspace(0.1, 4, 4500, device="cuda")[
        :, None
    ]  # references are raised, within chunks and from one to the next
    if tiny:  # sums of such values are below the smallest normal number of float32
        v *= 1e-38 if dtype == "bfloat16" else 1e-7
        v[..., ::3] = 0
    q, k, v = (tensor.to(getattr(torch, dtype)) for tensor in (q, k, v))
    hopper, decode = backends.get("hopper"), backends.get("decode")
    out, lse = hopper.run(q, k, v, problem)
    assert out.isfinite().all()

    def same(found, rows, name):
        for got, want in zip(found, (out[:, :, rows], lse[:, :, rows]), strict=True):
            bits = torch.int32 if got.dtype == torch.float32 else torch.int16
            assert torch.equal(got.contiguous().view(bits), want.contiguous().view(bits)), name

    for cut in (1, 700, 2048, 4499):
        later = slice(cut, None)
        same(hopper.run(q[:, :, later], k, v, problem.with_(seqlen_q=4500 - cut)), later, f"from {cut} on")
    others = torch.randn_like(k)
    twice = [torch.cat([one, other]) for one, other in ((q, q.flip(2)), (k, others), (v, others))]
    found = hopper.run(*twice, problem.with_(batch=2))
    same((found[0][:1], found[1][:1]), slice(None), "in a batch")
    for page in (16, 128):
        for end, tokens in ((4500, 1), (4097, 3), (2049, 8), (64, 1)):
            cache = paged(k[0, :, :end], v[0, :, :end], page)
            step = problem.with_(seqlen_q=tokens, seqlen_k=end, page_size=page)
            rows = slice(end - tokens, end)
            same(decode.run_paged(q[:, :, rows], cache, step), rows, f"{tokens} tokens at {end}, pages of {page}")


def test_captured_calls_and_two_streams_keep_their_sums_apart():
    problem = LONG.with_(seqlen_q=4500, batch=1)
    q, k, v = (torch.randn(1, heads, 4500, 128, device="cuda", dtype=torch.float16) for heads in (4, 2, 2))
    run = backends.get("hopper").run
    want, _ = run(q, k, v, problem)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run(q, k, v, problem)[0])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured, _ = run(q, k, v, problem)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in (*found, captured))
