"""How the cuBLASLt backends cut their work: every head and page once, and no page for rows that see none of it.

On a GPU also page tables, and the graphs that are kept. The loop itself runs without one in test_cublaslt_emulated.py.
"""

import dataclasses

import pytest
import torch

from flashcore import backends
from flashcore.backends import cublaslt_graph
from flashcore.backends._cublaslt_cut import Workspace
from flashcore.backends.cublaslt import CublasLt, CublasLtBatched, CublasLtLoop
from flashcore.backends.cublaslt_graph import CublasLtGraph
from flashcore.faults import catalogue
from flashcore.faults.planting import PLAIN
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Algorithm, Product
from flashcore.numerics import outputs as _outputs
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.reference import attention
from flashcore.problem import PRESETS, Problem, square

GROUPED = Problem(batch=3, num_heads_q=8, num_heads_kv=4, seqlen_q=32, seqlen_k=48, head_dim=64)


class Fixed(CublasLt):
    """Three query heads at a time, so that no GPU has to be asked for its L2 cache."""

    id = "fixed"
    heads_at_once = 6


def heads_of(backend, problem, layout):
    q, k, v = make_inputs(problem, layout=layout)
    found = []
    for span in backend.spans(problem, q, k, v, 64):
        first, count = backend.heads_of(span, problem)
        found += range(first, first + count)
    return found


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("backend", [Fixed(), CublasLtBatched(), CublasLtLoop()])
@pytest.mark.parametrize("problem", [GROUPED, square(1, 3, 16, 64), square(2, 4, 16, 64)])
def test_every_head_is_in_one_group_whatever_the_memory_order(backend, problem, layout):
    assert sorted(heads_of(backend, problem, layout)) == list(range(problem.batch * problem.num_heads_q))


def test_a_group_of_bshd_views_stays_inside_one_sequence():
    """Their heads are not at equal distances across sequences, so no strided batch covers two of them."""
    q, k, v = make_inputs(GROUPED, layout="bshd")
    assert [s.batch for s in CublasLtBatched().spans(GROUPED, q, k, v, 64)] == [0, 1, 2]
    q, k, v = make_inputs(GROUPED, layout="bhsd")
    assert len(list(CublasLtBatched().spans(GROUPED, q, k, v, 64))) == 1


def test_the_loop_takes_the_problems_page_and_one_head_at_a_time():
    assert CublasLtLoop().page_size(PRESETS["report"]) == 128
    assert CublasLtLoop().group_of(PRESETS["report"], torch.device("cpu"), 128) == 1
    assert CublasLtBatched().page_size(PRESETS["report"]) == 2048
    assert CublasLtBatched().page_size(square(1, 1, 333, 64)) == 336, "short rows: one page, a multiple of 16 bytes"
    assert CublasLtBatched().page_size(square(1, 1, 100_000, 64)) == 2048, "a row of a page fits a warp's registers"


SEES = [
    ((64, 64), 0, 0),
    ((64, 64), 32, 32),
    ((64, 96), 32, 0),
    ((64, 96), 64, 32),
    ((96, 64), 0, 32),
    ((16, 64), 63, 15),
]
"""(seqlen_q, seqlen_k), the page's first key, the first row that sees it."""


@pytest.mark.parametrize(("lengths", "key", "row"), SEES)
def test_the_first_row_of_a_page_is_the_first_that_sees_it(lengths, key, row):
    problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim=64)
    assert CublasLt().first_row(problem, key) == 0
    causal = problem.with_(causal=True)
    assert CublasLt().first_row(causal, key) == row
    visible = [min(causal.seqlen_k, max(0, r + 1 + causal.seqlen_k - causal.seqlen_q)) for r in range(causal.seqlen_q)]
    assert row == next((r for r, keys in enumerate(visible) if keys > key), causal.seqlen_q)


def test_what_sixteen_bits_cost_is_said():
    assert CublasLt.rounds_scores and CublasLtBatched.rounds_scores and not CublasLtLoop.rounds_scores
    assert CublasLt().scores_type(square(1, 1, 8, 64, dtype="bfloat16")) == "bfloat16"
    assert CublasLtLoop().scores_type(square(1, 1, 8, 64)) == "float32"


def workspace() -> Workspace:
    rows = torch.empty(1)
    return Workspace(rows, rows, rows, rows, rows, 8)


def test_two_lanes_never_share_an_algorithms_room():
    """Products of two lanes run at the same time, on streams that the allocator knows nothing of."""
    first, second = workspace(), workspace()
    assert first.room(0) == 0 and first.rooms == []
    kept = first.room(1000)
    assert first.room(500) == kept and first.room(1000) == kept, "one after the other, products share it"
    assert second.room(1000) != kept
    larger = first.room(5000)
    assert larger != kept and [t.numel() for t in first.rooms] == [1000, 5000], "what is in use is not given back"


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


# ------------------------------------------------------------------------------------------------ graphs


@pytest.fixture
def graphs(monkeypatch):
    """`cublaslt-graph` with captures that only say that they were made, and a call that gives its own number."""
    made = []

    def capture(self, q, k, v, problem):
        made.append(problem)
        out = torch.full(q.shape, float(len(made)), dtype=q.dtype)
        return cublaslt_graph._Captured(Replayed(), out, torch.zeros(q.shape[:3]))

    class Replayed:
        def replay(self):
            return None

    kept = type(cublaslt_graph._captured)()
    monkeypatch.setattr(cublaslt_graph, "_captured", kept)
    monkeypatch.setattr(CublasLtGraph, "_capture", capture)
    stream = type("Stream", (), {"cuda_stream": 0})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made, kept, stream


def test_a_graph_belongs_to_addresses_strides_stream_and_problem(graphs):
    made, kept, stream = graphs
    backend, problem = CublasLtGraph(), square(1, 2, 16, 64)
    q, k, v = make_inputs(problem)

    def call(*tensors, of=backend, like=problem):
        return int(of.run(*(tensors or (q, k, v)), like)[0].flatten()[0])

    assert call() == 1 and call() == 1 and len(made) == 1
    assert call(q.clone(), k, v) == 2, "other addresses"
    assert call(q, k, v.transpose(1, 2).contiguous().transpose(1, 2)) == 3, "other addresses and strides"
    assert call(like=problem.with_(causal=True)) == 4
    stream.cuda_stream = 1
    assert call() == 5, "replays on two streams would write to one pair of outputs"
    stream.cuda_stream = 0
    with _outputs.poisoned_outputs():
        assert call() == 6, "a graph that does not poison its outputs would hide what is never written"
    assert call(of=CublasLtGraph()) == 7, "a backend with a bug planted in it is another one"
    assert call() == 1 and len(kept) == 7


def test_two_calls_never_hand_out_one_result(graphs):
    backend, problem = CublasLtGraph(), square(1, 2, 16, 64)
    q, k, v = make_inputs(problem)
    first, again = backend.run(q, k, v, problem), backend.run(q, k, v, problem)
    assert len({t.data_ptr() for t in (*first, *again)}) == 4


def test_the_graph_used_longest_ago_goes_first(graphs):
    made, kept, _ = graphs
    backend, problem = CublasLtGraph(), square(1, 2, 16, 64)
    q, k, v = make_inputs(problem)
    others = [q.clone() for _ in range(cublaslt_graph.KEPT)]
    backend.run(q, k, v, problem)
    for number, other in enumerate(others):
        backend.run(other, k, v, problem)
        if number < cublaslt_graph.KEPT - 1:
            backend.run(q, k, v, problem)
    assert len(kept) == cublaslt_graph.KEPT and len(made) == 1 + cublaslt_graph.KEPT
    backend.run(q, k, v, problem)
    assert len(made) == 1 + cublaslt_graph.KEPT, "it was used last, so another one had to go"
    backend.run(others[0], k, v, problem)
    assert len(made) == 2 + cublaslt_graph.KEPT


def test_inside_a_capture_of_the_callers_and_with_a_table_the_call_is_that_of_cublaslt(graphs, monkeypatch):
    made, _, _ = graphs
    plain = []
    monkeypatch.setattr(CublasLt, "run", lambda self, q, k, v, problem, page_table=None: plain.append(page_table))
    backend, problem = CublasLtGraph(), square(1, 2, 16, 64)
    q, k, v = make_inputs(problem)
    backend.run(q, k, v, problem, page_table=[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    backend.run(q, k, v, problem)
    assert plain == [[0], None] and made == []


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
def test_a_table_on_the_gpu_cannot_be_captured_and_one_on_the_host_can():
    from flashcore.errors import PageTableError

    problem = square(2, 2, 256, 64, page_size=64)
    q, k, v = make_inputs(problem, device="cuda")
    chosen = backends.get("cublaslt")
    expected, _ = chosen.run(q, k, v, problem, page_table=[3, 1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = chosen.run(q, k, v, problem, page_table=[3, 1])
        with pytest.raises(PageTableError, match="give the table as a CPU tensor or a list"):
            chosen.run(q, k, v, problem, page_table=torch.zeros(2, 1, dtype=torch.int32, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


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
def test_a_replayed_graph_reads_what_lies_at_its_addresses_now():
    problem = square(2, 4, 512, 64, causal=True)
    q, k, v = make_inputs(problem, seed=1, device="cuda")
    graph, plain = CublasLtGraph(), backends.get("cublaslt")
    first, first_lse = graph.run(q, k, v, problem)
    kept = first.clone()
    assert torch.equal(first, plain.run(q, k, v, problem)[0])
    other = make_inputs(problem, seed=2, device="cuda")
    for mine, new in zip((q, k, v), other, strict=True):
        mine.copy_(new)
    second, second_lse = graph.run(q, k, v, problem)
    expected, expected_lse = plain.run(q, k, v, problem)
    assert torch.equal(second, expected) and torch.equal(second_lse, expected_lse)
    assert torch.equal(first, kept) and not torch.equal(first, second), "the first result is still the caller's"


@pytest.mark.gpu
def test_more_calls_than_graphs_are_kept_and_all_of_them_right():
    problem = square(1, 2, 200, 64)
    graph, plain = CublasLtGraph(), backends.get("cublaslt")
    sets = [make_inputs(problem, seed=seed, device="cuda") for seed in range(cublaslt_graph.KEPT + 2)]
    results = [graph.run(*tensors, problem) for _ in range(2) for tensors in sets]
    for (out, lse), tensors in zip(results, sets * 2, strict=True):
        expected, expected_lse = plain.run(*tensors, problem)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    mine = [key for key in cublaslt_graph._captured if key[0] is graph]
    assert 0 < len(mine) <= cublaslt_graph.KEPT


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
