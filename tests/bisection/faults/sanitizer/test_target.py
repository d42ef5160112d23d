"""What compute-sanitizer watches: both builds on each problem that the backend takes, planted or not."""

from __future__ import annotations

import copy

import pytest
import torch

from flashcore import backends
from flashcore.backends import AVAILABLE
from flashcore.bisection.faults import catalogue
from flashcore.bisection.faults.sanitizer import target
from flashcore.errors import UnknownName
from flashcore.numerics.inputs import make_inputs, make_masks


@pytest.fixture
def launched(monkeypatch):
    """A scalar backend that launches nothing, on a GPU that is not there; gives what it was asked for."""
    log = []

    def noted(how):
        return lambda self, q, k, v, problem: log.append((how, problem, self.source is not None))

    scalar = backends.get("scalar")
    methods = {"availability": lambda self: AVAILABLE, "run": noted("run"), "trace": noted("trace")}
    here = copy.copy(scalar)
    here.__class__ = type("Here", (type(scalar),), methods)
    real = backends.get
    monkeypatch.setattr(backends, "get", lambda name: here if name == "scalar" else real(name))
    monkeypatch.setattr("flashcore.numerics.inputs.make_inputs", lambda problem, device: (device, None, None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("waited"))
    return log


def test_the_production_and_the_traced_build_run_on_each_problem_and_are_waited_for(launched):
    target.main(["scalar"])
    asked = [(how, problem, False) for problem in target.PROBLEMS for how in ("run", "trace")]
    assert launched == [*asked, "waited"]


def test_masked_problems_are_for_backends_that_take_them(launched, monkeypatch):
    here, given = backends.get("scalar"), []

    def run(self, q, k, v, problem, masks=None):
        given.append((problem, masks))

    here.__class__ = type("Masked", (type(here),), {"run": run, "trace": run, "masks": backends.get("cpu").masks})
    made = make_inputs(target.PROBLEMS[0])
    monkeypatch.setattr("flashcore.numerics.inputs.make_inputs", lambda problem, device: made)
    monkeypatch.setattr("flashcore.numerics.inputs.make_masks", lambda problem, device: make_masks(problem))
    target.main(["scalar"])
    assert [p for p, _ in given] == [problem for problem in (*target.PROBLEMS, *target.MASKED) for _ in range(2)]
    assert given[0][1] is None and given[4][1].sink.shape == (2,) and given[4][1].cu_seqlens_q.shape == (7,)
    assert given[6][1].sink is None and given[6][1].seqlens_k.shape == (6,)


def test_a_planted_backend_runs_the_patched_source(launched):
    target.main(["scalar", "F9"])
    assert launched[-1] == "waited" and all(patched for _, _, patched in launched[:-1]) and len(launched) == 5


def test_the_problems_have_every_kind_of_tail():
    for problem in target.PROBLEMS:
        assert problem.seqlen_q % 64 and problem.seqlen_k % 64 and backends.get("scalar").why_not(problem) is None
        assert backends.get("wmma").why_not(problem) is None
    assert {p.head_dim for p in target.PROBLEMS} == {64, 128}
    assert {p.dtype for p in target.PROBLEMS} == {"float16", "bfloat16"}
    assert {p.causal for p in target.PROBLEMS} == {True, False}
    assert any(p.num_heads_q != p.num_heads_kv for p in target.PROBLEMS)


def test_a_name_that_does_not_exist_is_refused_before_anything_runs(launched):
    with pytest.raises(UnknownName, match="F99"):
        target.main(["scalar", "F99"])
    with pytest.raises(UnknownName, match="plant G37 in backend 'scalar'"):
        target.main(["scalar", "G37"])
    assert launched == [] and "scalar" not in catalogue.get("G37").plants
