"""The host side of the cuBLASLt backends against float64 without a GPU: products and page_softmax.cu are emulated.

What runs here is the backend's own loop: how heads, pages and rows are cut, every address, stride, alpha and beta. The
emulation reads and writes memory at the addresses that cuBLASLt and the kernel would get.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from support.emulated_cublaslt import Emulated
from support.sampling import sampled

from flashcore import backends
from flashcore.backends._page_tables import END
from flashcore.backends.cublaslt import CublasLt, CublasLtBatched, CublasLtLoop
from flashcore.bisection.bisecting import bisect, judge
from flashcore.bisection.faults import catalogue
from flashcore.bisection.faults.planting import PLAIN
from flashcore.errors import CublasLtError, PageTableError, Unsupported
from flashcore.measure.check import check_attention
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.problem import Problem

pytestmark = pytest.mark.usefixtures("emulated")


class Resident(Emulated, CublasLt):
    pages_of = 64


class Batched(Emulated, CublasLtBatched):
    heads_at_once = None
    pages_of = 64


class Loop(Emulated, CublasLtLoop):
    heads_at_once = 1
    rounds_scores = False


BACKENDS = [Resident(), Batched(), Loop()]


@pytest.mark.parametrize(
    ("backend", "causal", "lengths"),  # each backend with all lengths, with a mask and without
    sampled(
        itertools.product(BACKENDS, [False, True], [(100, 200), (1, 333), (200, 77), (64, 64)]),
        kind=lambda case: case[0].id,
    ),
    ids=lambda value: getattr(value, "id", None),
)
def test_the_host_side_is_right_and_every_stage_of_it(backend, causal, lengths):
    problem = PLAIN.with_(seqlen_q=lengths[0], seqlen_k=lengths[1], causal=causal)
    for layout in ("bhsd", "bshd"):
        checked = check_attention(backend, problem, layout=layout, device="cpu")
        assert checked.status == "ok", checked.reason
    found = bisect(backend, problem, device="cpu")
    assert found.passed, f"{found.finding()}\n{found.table()}"


def test_expanded_views_are_read_as_what_they_show():
    """Heads, sequences or rows that are one in memory: a stride of 0 is not a packed matrix."""
    problem = PLAIN.with_(seqlen_q=50)
    shape = (2, 2, 200, 64)
    for one in ((2, 1, 200, 64), (1, 2, 200, 64), (1, 1, 200, 64), (2, 2, 1, 64)):
        q, _, _ = make_inputs(problem, seed=4)
        k, v = (torch.randn(one).half().expand(shape) for _ in range(2))
        for backend in BACKENDS:
            out, lse = backend.run(q, k, v, problem)
            wanted, wanted_lse = reference.attention(q, k, v, problem)
            assert torch.allclose(out.double(), wanted, atol=4e-3), one
            assert torch.allclose(lse.double(), wanted_lse, atol=4e-3), one


HOST_SIDE = ["F3", "F11", "F12", "G5", "G6", "G8", "G16"]


@pytest.mark.parametrize("name", HOST_SIDE)
def test_a_wrong_host_side_argument_is_found_at_its_stage(name):
    """F11 reads past the end of K here as it does there, so K lies inside a larger piece of memory."""
    fault = catalogue.get(name)
    for backend in ("cublaslt", "cublaslt-batched"):
        methods = dict(fault.plants[backend].methods)
        clean = clean_class(backend, methods["pages_of"])
        assert bisected(clean, fault.problem).passed, "the clean run has to be silent"
        found = bisected(type("Planted", (clean,), methods), fault.problem)
        assert found.producers[:1] == [fault.stage], f"{name} in {backend}: {found.finding()}"


@functools.cache
def clean_class(backend: str, pages_of: int | None) -> type:
    return type("Clean", (Emulated, type(backends.get(backend))), {"pages_of": pages_of})


@functools.cache
def bisected(kind: type, problem: Problem):
    """The bisection of a backend of this class; bugs of one problem share what is right beside them."""
    backend = kind()
    q, k, v = make_inputs(problem, seed=0)
    room = torch.randn(4 * k.numel(), dtype=torch.float16)
    k = room[: k.numel()].view(k.shape).copy_(k)
    with poisoned_outputs():
        trace = backend.trace(q, k, v, problem)
        out, lse = backend.run(q, k, v, problem)
    return judge(trace, q, k, v, problem, backend=backend.id, out=out, lse=lse)


def test_what_is_refused_carries_the_stage_it_happened_at():
    class Refusing(Resident):
        wrong = "float16"

        def plan(self, product, alpha, beta, device, room):
            if product.out_dtype == self.wrong:
                raise CublasLtError("cublasLtMatmulAlgoGetHeuristic", "CUBLAS_STATUS_INVALID_VALUE", product.label())
            return super().plan(product, alpha, beta, device, room)

    backend = Refusing()
    for wrong, stage in (("float16", "scores"), ("float32", "accum")):
        backend.wrong = wrong
        with pytest.raises(CublasLtError, match="m=100") as caught:
            backend.run(*make_inputs(PLAIN), PLAIN)
        assert caught.value.stage == stage


# ------------------------------------------------------------------------------------------------ page tables

PAGED = Problem(batch=3, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=200, head_dim=64, page_size=32)
"""Seven pages, the last one of 8 keys."""


def expected(q, k, v, problem, tables):
    """float64 attention over the keys of the listed pages alone, at their own positions."""
    group = problem.num_heads_q // problem.num_heads_kv
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * problem.scale
    column = torch.arange(problem.seqlen_k)
    listed = torch.stack([torch.isin(column // problem.page_size, torch.tensor(t, dtype=torch.long)) for t in tables])
    sees = listed[:, None, None, :].expand_as(scores).clone()
    if problem.causal:
        row = torch.arange(problem.seqlen_q)[:, None] + problem.seqlen_k - problem.seqlen_q
        sees &= column[None, :] <= row
    scores = scores.masked_fill(~sees, -math.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v, torch.logsumexp(scores, dim=-1)


TABLES = {
    "every page": [[0, 1, 2, 3, 4, 5, 6]] * 3,
    "order and gaps": [[5, 2, 3]] * 3,
    "the short page first": [[6, 0]] * 3,
    "a row of its own for each sequence": [[4, 1, 0], [3], [6, 5, 2, 0]],
    "a sequence without pages": [[2, 3], [], [1]],
    "no pages at all": [[]] * 3,
}


@pytest.mark.parametrize(
    ("backend", "causal", "what"),  # each backend with all tables, with a mask and without
    sampled(itertools.product(BACKENDS, [False, True], TABLES), kind=lambda case: case[0].id),
    ids=lambda value: getattr(value, "id", None),
)
def test_a_page_table_selects_keys_and_leaves_them_where_they_are(backend, causal, what):
    tables = TABLES[what]
    problem = PAGED.with_(causal=causal)
    width = max(map(len, tables)) + 1
    rows = torch.tensor([t + [END] + [99] * (width - len(t) - 1) for t in tables], dtype=torch.int32)
    for layout in ("bhsd", "bshd"):
        q, k, v = make_inputs(problem, seed=1, layout=layout)
        out, lse = backend.run(q, k, v, problem, page_table=rows)
        wanted, wanted_lse = expected(q, k, v, problem, tables)
        assert torch.allclose(out.double(), wanted, atol=4e-3)
        assert torch.allclose(lse.double(), wanted_lse, atol=4e-3)
        if len(set(map(tuple, tables))) == 1:
            shared, _ = backend.run(q, k, v, problem, page_table=tables[0])
            assert torch.equal(out, shared), "a list is the same table for every sequence"


def test_a_page_named_twice_counts_twice():
    backend = Resident()
    q, k, v = make_inputs(PAGED, seed=2)
    out, lse = backend.run(q, k, v, PAGED, page_table=[1, 1])
    once, once_lse = backend.run(q, k, v, PAGED, page_table=[1])
    assert torch.allclose(out, once, atol=2e-3)
    assert torch.allclose(lse, once_lse + math.log(2), atol=1e-3)


@pytest.mark.parametrize("tables", [[[5, 2, 3]] * 3, [[4, 6], [1, 6], [0, 6]]])
def test_a_sparse_trace_is_that_of_the_keys_side_by_side(tables):
    q, k, v = make_inputs(PAGED, seed=3)
    rows = torch.tensor(tables, dtype=torch.int32)
    keys = [torch.cat([torch.arange(200)[p * 32 : (p + 1) * 32] for p in t]) for t in tables]
    beside = [torch.stack([t[b, :, keys[b]] for b in range(3)]) for t in (k, v)]
    dense = PAGED.with_(seqlen_k=len(keys[0]))
    for backend in BACKENDS:
        trace = backend.trace(q, k, v, PAGED, page_table=rows)
        out, lse = backend.run(q, k, v, PAGED, page_table=rows)
        found = judge(trace, q, *beside, dense, backend=backend.id, out=out, lse=lse)
        assert found.passed and found.coverage["pages"] == len(tables[0]), found.finding()


@pytest.mark.parametrize(
    ("table", "changes", "error", "words"),
    [
        ([7], {}, PageTableError, "page 7 for sequence 0, place 0; 200 keys make 7 pages of 32, so give 0 to 6"),
        ([0, -2], {}, PageTableError, "page -2 for sequence 0, place 1"),
        (torch.tensor([[0], [1], [9]]), {}, PageTableError, "page 9 for sequence 2"),
        (torch.tensor([0, 1]), {}, PageTableError, r"\[batch, max_pages\] with batch 3; this one is torch.int64 \[2\]"),
        (torch.zeros(2, 4, dtype=torch.int32), {}, PageTableError, r"batch 3; .* \[2, 4\]"),
        (torch.zeros(3, 1), {}, PageTableError, "torch.float32"),
        ([0.5], {}, PageTableError, "this one is a list"),
        ([0], {"page_size": 4096}, Unsupported, "hold 2048 keys at most"),
    ],
)
def test_a_wrong_table_is_one_sentence(table, changes, error, words):
    problem = PAGED.with_(**changes)
    with pytest.raises(error, match=words):
        Resident().run(*make_inputs(problem), problem, page_table=table)


def test_what_a_sparse_trace_cannot_hold_is_said():
    q, k, v = make_inputs(PAGED)
    for table, causal in (([6, 0], False), ([0], True), ([], False)):
        with pytest.raises(Unsupported, match="only the last may be a short one"):
            Resident().trace(q, k, v, PAGED.with_(causal=causal), page_table=table)
    with pytest.raises(Unsupported, match="as many keys in each"):
        Resident().trace(q, k, v, PAGED, page_table=torch.tensor([[0, 1], [2, END], [3, 4]]))
