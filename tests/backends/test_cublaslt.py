"""The cuBLASLt backends: bugs planted in them, and page tables on a GPU.

The loop itself runs without one in test_cublaslt_emulated.py.
"""

import dataclasses

import pytest
import torch

from flashcore import backends
from flashcore.backends.cublaslt import CublasLt
from flashcore.bisection.faults import catalogue
from flashcore.bisection.faults.planting import PLAIN
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Algorithm, Product
from flashcore.numerics import outputs as _outputs
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.reference import attention
from flashcore.problem import Problem, square

# ------------------------------------------------------------------------------------------------ planted bugs


def algorithm(rank: int, tile: str, workspace_bytes: int = 0) -> Algorithm:
    return Algorithm(
        rank=rank, algo_id=66, tile=tile, stages="STAGES_64xAUTO", split_k=1, reduction_scheme=0, cta_swizzling=0,
        custom_option=0, inner_shape="UNDEFINED", cluster_shape="SHAPE_2x4x1", workspace_bytes=workspace_bytes,
        waves_count=0.65, raw=f"{rank:02x}" * 64,
    )  # fmt: skip


def test_f4_turns_the_layout_of_k_in_the_tail_alone(monkeypatch):
    planned = []

    def stop(product, **_):
        planned.append(product.matrices()[1][1:3])
        raise StopIteration

    monkeypatch.setattr("flashcore.backends.cublaslt.choose", stop)
    planted = catalogue.get("F4").plant("cublaslt")
    for keys, transposed, told in ((60, True, (60, 64)), (20, True, (64, 20)), (20, False, (64, 20))):
        with pytest.raises(StopIteration):
            planted.plan(Product(100, keys, 64, transpose_b=transposed), 1.0, 0.0, 0, 0)
        assert planned.pop() == told


def test_f5_gives_four_bytes_for_the_stride_between_heads():
    q, k, v = make_inputs(PLAIN)
    planted = catalogue.get("F5").plant("cublaslt")
    assert [getattr(s, "nbytes", None) for s in planted.strides("k", k)] == [None, 4, None]
    assert planted.strides("k", k) == list(k.stride()[:3]) and planted.strides("v", v) == list(v.stride()[:3])


def test_f14_runs_another_tile_than_it_names_within_the_room_of_the_one_named(monkeypatch):
    offered = [algorithm(0, "64x48"), algorithm(1, "64x48"), algorithm(2, "128x64", 4096), algorithm(3, "128x96")]
    monkeypatch.setattr(cublaslt, "candidates", lambda product, **_: offered)
    monkeypatch.setattr(cublaslt, "Plan", lambda product, chosen, **more: (chosen, more))
    planted = catalogue.get("F14").plant("cublaslt-batched")
    chosen, more = planted.plan(Product(8, 8, 8), 0.5, 1.0, 0, 1 << 20)
    assert chosen.raw == offered[3].raw and dataclasses.replace(chosen, raw=offered[0].raw) == offered[0]
    assert more == {"alpha": 0.5, "beta": 1.0, "device": 0}


# ------------------------------------------------------------------------------------------------ on a GPU

VARIANTS = ["cublaslt", "cublaslt-batched", "cublaslt-graph", "cublaslt-loop"]


def selected(q, k, v, problem, tables):
    """float64 attention of each sequence over the keys of its pages; `tables` without an empty row."""
    results = []
    for b, pages in enumerate(tables):
        size = problem.page_size
        keys = torch.cat([torch.arange(p * size, min((p + 1) * size, problem.seqlen_k)) for p in pages]).to(q.device)
        one = problem.with_(batch=1, seqlen_k=len(keys), causal=False)
        if not problem.causal:
            results.append(attention(q[b : b + 1], k[b : b + 1, :, keys], v[b : b + 1, :, keys], one))
            continue
        group = problem.num_heads_q // problem.num_heads_kv
        k_here, v_here = (t[b, :, keys].double().repeat_interleave(group, dim=0) for t in (k, v))
        scores = q[b].double() @ k_here.transpose(-1, -2) * problem.scale
        last = torch.arange(problem.seqlen_q, device=q.device)[:, None] + problem.seqlen_k - problem.seqlen_q
        scores = scores.masked_fill(keys[None, :] > last, float("-inf"))
        out = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v_here
        results.append((out[None], torch.logsumexp(scores, dim=-1)[None]))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


TABLES = [
    [[4, 1, 7, 2]] * 3,
    [[9, 0, 5], [3], [8, 7, 6, 5, 4, 3, 2, 1, 0]],
]
"""Order and gaps; then rows of their own, one of them with the short last page first."""


@pytest.mark.gpu
@pytest.mark.parametrize("backend", VARIANTS)
@pytest.mark.parametrize("tables", TABLES, ids=["shared", "per sequence"])
def test_a_page_table_selects_keys_on_a_gpu(backend, tables):
    chosen = backends.get(backend)
    for dtype, bound in (("float16", 4e-3), ("bfloat16", 3e-2)):
        for causal, layout in ((False, "bhsd"), (True, "bshd")):
            problem = Problem(batch=3, num_heads_q=4, num_heads_kv=2, seqlen_q=300, seqlen_k=600, head_dim=64,
                              dtype=dtype, causal=causal, page_size=64)  # fmt: skip
            q, k, v = make_inputs(problem, seed=1, device="cuda", layout=layout)
            rows = torch.full((3, 11), -1, dtype=torch.int32, device="cuda")
            for b, pages in enumerate(tables):
                rows[b, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            with _outputs.poisoned_outputs():
                out, lse = chosen.run(q, k, v, problem, page_table=rows)
            wanted, wanted_lse = selected(q, k, v, problem, tables)
            assert torch.allclose(out.double(), wanted, atol=bound, rtol=bound), (out.double() - wanted).abs().max()
            assert torch.allclose(lse.double(), wanted_lse, atol=bound, rtol=bound)
            everything = list(range(10))
            out, lse = chosen.run(q, k, v, problem, page_table=everything)
            wanted, _ = attention(q, k, v, problem)
            assert torch.allclose(out.double(), wanted, atol=bound, rtol=bound), "every page is the dense problem"


@pytest.mark.gpu
def test_a_sparse_trace_is_that_of_the_keys_side_by_side_on_a_gpu():
    from flashcore.bisection.bisecting import judge

    problem = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=100, seqlen_k=300, head_dim=64, page_size=64)
    tables = torch.tensor([[3, 0, 4], [2, 1, 4]], dtype=torch.int32, device="cuda")
    keys = [torch.cat([torch.arange(300)[p * 64 : (p + 1) * 64] for p in row]) for row in tables.tolist()]
    for name in VARIANTS:
        chosen = backends.get(name)
        q, k, v = make_inputs(problem, seed=2, device="cuda")
        with _outputs.poisoned_outputs():
            trace = chosen.trace(q, k, v, problem, page_table=tables)
            out, lse = chosen.run(q, k, v, problem, page_table=tables)
        beside = [torch.stack([t[b, :, keys[b].cuda()] for b in range(2)]) for t in (k, v)]
        found = judge(trace, q, *beside, problem.with_(seqlen_k=172), backend=name, out=out, lse=lse)
        assert found.passed, f"{name}: {found.finding()}"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", VARIANTS)
def test_expanded_views_are_read_as_what_they_show_on_a_gpu(backend):
    problem = square(2, 2, 200, 64)
    for one in ((2, 1, 200, 64), (1, 2, 200, 64), (2, 2, 1, 64)):
        q, _, _ = make_inputs(problem, seed=4, device="cuda")
        k, v = (torch.randn(one, device="cuda").half().expand(2, 2, 200, 64) for _ in range(2))
        wanted, wanted_lse = attention(q, k, v, problem)
        for _ in range(2):
            out, lse = backends.get(backend).run(q, k, v, problem)
            assert torch.allclose(out.double(), wanted, atol=4e-3), one
            assert torch.allclose(lse.double(), wanted_lse, atol=4e-3), one


@pytest.mark.gpu
def test_products_that_split_k_give_the_same_bits_on_every_lane():
    """Algorithms that ask for room of their own, in groups that run at the same time: shared room would show."""
    problem = Problem(batch=4, num_heads_q=8, num_heads_kv=8, seqlen_q=64, seqlen_k=4096, head_dim=64)
    backend = CublasLt()
    backend.policy, backend.heads_at_once, backend.lanes = "largest-workspace", 2, 2
    alone = CublasLt()
    alone.policy, alone.heads_at_once, alone.lanes = "largest-workspace", 2, 1
    q, k, v = make_inputs(problem, device="cuda")
    expected, _ = alone.run(q, k, v, problem)
    for _ in range(20):
        assert torch.equal(backend.run(q, k, v, problem)[0], expected)
    wanted, _ = attention(q, k, v, problem)
    assert torch.allclose(expected.double(), wanted, atol=2e-3)
