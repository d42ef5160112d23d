"""Whether the algorithm that a measurement names is the one that ran; cuBLASLt and the profiler are stand-ins."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import synthetic_survey as synthetic

from flashcore.errors import FlashCoreError
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Product
from flashcore.problem import square
from flashcore.surveys.cublaslt import labels, measuring
from flashcore.surveys.cublaslt.grid import (
    candidates_of,
    survey_grid,
)  # fmt: skip

QK = Product(2048, 128, 64, transpose_b=True)


def prove(run, stand_in, monkeypatch, runs):
    """Labels of the report's Q·Kᵀ after a survey, where launching an algorithm runs the kernel that `runs` gives."""
    case = survey_grid("quick")[:1]
    measuring.survey(run, case)
    import flashcore.gpu.profiling as profiling

    monkeypatch.setattr(labels, "launcher", lambda product, algorithm: algorithm)
    monkeypatch.setattr(profiling, "kernels_of", lambda calls: [[runs(a)] for a in calls])
    monkeypatch.setattr(
        cublaslt, "choose", lambda product, *, policy, workspace_bytes: (synthetic.offered(product)[1], "stand-in")
    )
    return labels.prove_labels(run, case)


def test_an_algorithm_that_runs_as_labelled_is_proven(run, stand_in, monkeypatch):
    trials = prove(run, stand_in, monkeypatch, synthetic.kernel_of)
    assert [t.status for t in trials] == ["ok"] * 3 and all(t.data["surveyed"] for t in trials)
    assert {t.data["policy"] for t in trials} == set(cublaslt.POLICIES)
    assert candidates_of(trials) == [], "a proof is no candidate"


def test_f14_another_candidate_running_under_the_label_is_found(run, stand_in, monkeypatch):
    """The planted fault: the bytes of candidate 2 under the attributes of candidate 1."""
    trials = prove(run, stand_in, monkeypatch, lambda a: synthetic.kernel_of(synthetic.algorithm(2)))
    assert [t.status for t in trials] == ["failed"] * 3
    assert "nvjet_sm90_hsh_128x64" in trials[0].reason and "nvjet_sm90_hsh_64x96" in trials[0].reason


class Planner:
    """A backend whose one product is the report's Q·Kᵀ, under the plan that it is given."""

    id = "planner"

    def plan(self, product, alpha, beta, device, room):
        return FakePlan(product, self.chosen)

    def run(self, q, k, v, problem):
        for _ in range(2):
            self.plan(QK, 1.0, 0.0, 0, 0)


class FakePlan:
    def __init__(self, product, algorithm):
        self.product, self.algorithm = product, algorithm


def labels_wrong(monkeypatch, stand_in, *, label, ran):
    """What `wrong_labels` says when the backend's label is candidate `label` and its bytes are candidate `ran`."""
    import flashcore.gpu.profiling as profiling

    offered = synthetic.offered(QK)
    backend = Planner()
    backend.chosen = replace(offered[label], raw=offered[ran].raw)
    by_bytes = {a.raw: synthetic.kernel_of(a) for a in offered}
    monkeypatch.setattr("flashcore.numerics.inputs.make_inputs", lambda problem, device: (None, None, None))
    monkeypatch.setattr(labels, "launcher", lambda product, algorithm, plan=None: algorithm.raw)
    monkeypatch.setattr(profiling, "kernels_of", lambda calls: [[by_bytes[raw]] for raw in calls])
    return labels.wrong_labels(backend, square(1, 2, 2048, 64))


def test_f14_a_backend_that_runs_other_bytes_than_it_names_is_found(stand_in, monkeypatch):
    assert labels_wrong(monkeypatch, stand_in, label=0, ran=0) == [], "the clean backend has to be silent"
    [wrong] = labels_wrong(monkeypatch, stand_in, label=1, ran=2)
    assert wrong.startswith("m=2048,n=128,k=64,Bᵀ") and "nvjet_sm90_hsh_128x64" in wrong and "64x96" in wrong


def test_a_profiler_that_saw_nothing_proves_nothing(stand_in, monkeypatch):
    import flashcore.gpu.profiling as profiling

    monkeypatch.setattr("flashcore.numerics.inputs.make_inputs", lambda problem, device: (None, None, None))
    monkeypatch.setattr(profiling, "kernels_of", lambda calls: [[] for _ in calls])
    backend = Planner()
    backend.chosen = synthetic.offered(QK)[0]
    with pytest.raises(FlashCoreError, match="saw no kernel for the product m=2048"):
        labels.wrong_labels(backend, square(1, 2, 2048, 64))
