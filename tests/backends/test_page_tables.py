"""Tables of pages: read in order, checked, and cut into calls."""

from __future__ import annotations

import pytest
import torch

from flashcore import backends
from flashcore.errors import PageTableError
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import square


@pytest.mark.gpu
def test_a_table_on_the_gpu_cannot_be_captured_and_one_on_the_host_can():
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
