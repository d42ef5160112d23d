"""Backend `cublaslt-graph`: to which call a graph belongs, and which graphs are kept."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flashcore import backends
from flashcore.backends import cublaslt_graph
from flashcore.backends.cublaslt import CublasLt
from flashcore.backends.cublaslt_graph import CublasLtGraph
from flashcore.numerics import outputs as _outputs
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import square


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


def test_threads_capture_one_after_the_other_since_they_share_a_stream(monkeypatch):
    captured, most = [], []

    @contextlib.contextmanager
    def graph(made, **_):
        captured.append(made)
        time.sleep(0.05)
        most.append(len(captured))
        yield
        captured.remove(made)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(cublaslt_graph, "_capture_stream", lambda device: None)
    monkeypatch.setattr(CublasLt, "run", lambda self, q, k, v, problem: (q, q))
    q, k, v = make_inputs(square(1, 1, 16, 64))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: CublasLtGraph()._capture(q, k, v, square(1, 1, 16, 64)), range(2)))
    assert most == [1, 1]
