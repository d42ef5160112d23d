"""The survey: its grid, its records, how it resumes, and how a wrong label is found; cuBLASLt itself is a stand-in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import synthetic_survey as synthetic

from flashcore.errors import CublasLtError, FlashCoreError, InvalidProblem, ToolMissing, UnknownName
from flashcore.gpu import cublaslt
from flashcore.gpu.cublaslt import Product
from flashcore.problem import square
from flashcore.survey import facts, kernel_names, labels, matmul_heuristics, measuring
from flashcore.survey.grid import (
    GROUPS,
    USUAL,
    candidates_of,
    lean,
    measured_us,
    peers_of,
    product_of,
    read_product,
    survey_grid,
    whole,
    write_product,
)  # fmt: skip

QK = Product(2048, 128, 64, transpose_b=True)


@pytest.fixture(name="stand_in")
def _stand_in(monkeypatch):
    """A cuBLASLt whose answers are invented, at the calls that need a GPU; gives the log of what was asked."""
    return synthetic.stand_in(monkeypatch)


# --- the grid ------------------------------------------------------------------------------------------------------


def test_the_grid_begins_with_the_reports_products_and_covers_every_question():
    for profile in ("quick", "full"):
        cases = survey_grid(profile)
        assert [c.id for c in cases[:2]] == ["report-qk", "report-pv"]
        assert cases[0].product == QK and cases[1].product == Product(2048, 64, 128)
        assert len({c.id for c in cases}) == len(cases)
        assert {c.group for c in cases} == set(GROUPS)
        assert all(c.limit_mb <= 256 for c in cases)
    full = survey_grid("full")
    assert {c.product.batch for c in full} >= {1, 256} and {c.limit_mb for c in full} >= {0, 256}
    assert {c.product.order for c in full} == {"row", "column"}
    assert {c.product.out_dtype for c in full} == {"float16", "bfloat16", "float32"}
    odd = {c.product.row_b - 64 for c in full if c.group == "alignment"}
    assert odd == {1, 2, 4, 8}, "rows of K and V that start at 2, 4, 8 and 16 bytes"
    assert len(survey_grid("quick")) < len(full) / 2


def test_an_unknown_profile_is_an_error():
    with pytest.raises(UnknownName, match="quick, full"):
        survey_grid("fast")


def test_a_product_is_read_back_from_its_text():
    for case in survey_grid("full"):
        assert read_product(write_product(case.product)) == case.product
    assert write_product(QK) == "2048x128x64 T f16>f16"
    with pytest.raises(InvalidProblem, match="no matrix product"):
        read_product("2048x128 f16")


# --- measuring -----------------------------------------------------------------------------------------------------


def test_every_candidate_of_the_reports_cases_is_a_record_with_every_attribute(run, stand_in):
    trials = measuring.survey(run, survey_grid("quick")[:2])
    qk = [t for t in trials if t.variant == "report-qk" and t.backend == "cublaslt"]
    assert [t.data["rank"] for t in qk] == [0, 1, 2, 3] and run.trials() == trials
    wanted = {
        "algo_id", "tile", "stages", "split_k", "reduction_scheme", "cta_swizzling", "custom_option", "inner_shape",
        "cluster_shape", "workspace_bytes", "waves_count", "rank", "kernel", "tensor_core", "compute_share",
        "memory_share", "product", "limit_mb",
    }  # fmt: skip
    assert all(wanted <= set(whole(t).data) for t in qk)
    first = whole(qk[0])
    latency_us = synthetic.times_of(QK, synthetic.offered(QK))[0]
    assert measured_us(first) == pytest.approx(latency_us, rel=1e-3) and first.timing.method == "graph_replay"
    assert first.timing.tflops == pytest.approx(QK.flops() / latency_us / 1e6, rel=1e-3)
    assert first.data["compute_share"] == pytest.approx(first.timing.tflops / 700.0, rel=1e-2)
    assert first.data["memory_share"] == pytest.approx(QK.bytes() / latency_us / 1e6 / 4.0, rel=1e-2)
    assert first.data["tile"] == "64x48" and first.data["tensor_core"] is True
    assert first.data["case"]["offered"] == 4 and product_of(first) == QK
    assert measured_us(peers_of(trials)["report-qk"]) == 3.25


def test_an_interrupted_survey_goes_on_where_it_was(run, stand_in, monkeypatch):
    cases = survey_grid("quick")[:6]
    monkeypatch.setattr(measuring, "CASES_A_PASS", 2)
    measuring.survey(run, cases[:4])
    complete = run.records_path.read_text().splitlines(keepends=True)
    run.records_path.write_text("".join(complete[:-1]))  # the last case lost a record, as when the process is killed
    stand_in.clear()
    said = []
    measuring.survey(run, cases, progress=said.append)
    assert stand_in == [c.product for c in cases[3:]]
    assert said[0] == "3 of 6 cases are in the records already" and said[1].startswith("1 of 3: row-pv")
    found = candidates_of(run.trials())
    assert len(found) == len({(t.variant, t.data["rank"]) for t in found}), "a case measured twice counts once"
    stand_in.clear()
    assert measuring.survey(run, cases) == [] and stand_in == []
    measuring.survey(run, cases[:1], resume=False)
    assert stand_in == [cases[0].product]


def test_what_fails_is_a_record_and_the_survey_goes_on(run, stand_in, monkeypatch):
    cases = [c for c in survey_grid("quick") if c.id in ("smallest-1x1x16", "report-qk", "smallest-8x8x16")]

    def measure(product, offered, **_):
        return [None if a.rank == 1 else 2.0 + a.rank for a in offered]

    monkeypatch.setattr(cublaslt, "measure", measure)
    monkeypatch.setattr(
        measuring, "measure_peer", lambda p: (_ for _ in ()).throw(ToolMissing("cuBLAS", "pip install"))
    )
    trials = measuring.survey(run, cases)
    refused = next(t for t in trials if t.variant == "smallest-1x1x16")
    assert refused.status == "error" and "CUBLAS_STATUS_NOT_SUPPORTED" in refused.reason
    assert product_of(refused) == Product(1, 1, 16)
    failed = next(t for t in trials if t.variant == "report-qk" and t.data.get("rank") == 1)
    assert failed.status == "error" and failed.reason and failed.timing is None
    peer = next(t for t in trials if t.backend == "cublas")
    assert peer.status == "error" and "cuBLAS" in peer.reason
    assert {t.variant for t in candidates_of(trials)} == {"report-qk", "smallest-8x8x16"}
    assert measuring.finished_cases(trials) == {c.id for c in cases}, "a failure is not measured again"


def test_an_exploratory_case_keeps_the_first_the_fastest_and_the_largest_workspace():
    case = next(c for c in survey_grid("full") if c.id == "batch-qk-4")
    one = synthetic.measured(case)
    one.offered[3] = replace(one.offered[3], workspace_bytes=4096)
    assert [t.data["rank"] for t in measuring.trials_of(one, None)] == [0, 1, 3]


def test_the_records_stay_small():
    trials = synthetic.survey_trials("full")
    lines = [t.model_dump_json() for t in trials]
    assert max(map(len, lines)) < 1000 and sum(map(len, lines)) < 270_000
    predicted = [t for t in trials if "prediction" in t.data.get("case", {})]
    assert {t.data["group"] for t in predicted} == {"report", "row", "deep"}


def test_what_most_candidates_have_is_left_out_of_a_record_and_put_back_by_readers():
    trials = synthetic.survey_trials("full")
    small = [t for t in trials if t.backend == "cublaslt" and t.data.get("rank") is not None]
    assert not any(t.data.get(k) == v for t in small for k, v in USUAL.items())
    old = [whole(t) for t in trials]  # as records were before: every attribute in each line
    assert all(set(USUAL) <= set(t.data) for t in old if t in candidates_of(old))
    assert candidates_of(trials) == candidates_of(old)
    assert facts.small_grid(trials) == facts.small_grid(old)
    assert facts.regrets(trials) == facts.regrets(old)
    assert lean({"split_k": 1, "workspace_bytes": 64, "tensor_core": None, "cta_swizzling": False}) == {
        "workspace_bytes": 64, "tensor_core": None, "cta_swizzling": False,
    }  # fmt: skip
    peer = next(t for t in trials if t.backend == "cublas")
    assert whole(peer) is peer


def test_without_cublaslt_a_survey_says_what_to_install(run, monkeypatch):
    def missing():
        raise ToolMissing("cuBLASLt (through nvmath-python)", "pip install 'flashcore[gpu]'")

    monkeypatch.setattr(cublaslt, "library", missing)
    with pytest.raises(ToolMissing, match="cuBLASLt"):
        measuring.survey(run, survey_grid("quick"))
    assert run.trials() == []


# --- the kernel that runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("nvjet_sm90_hsh_64x48_64x16_1x2_h_bz_NNT", True),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", True),
        ("ampere_fp16_s16816gemm_fp16_64x64_ldg8_f2f_stages_64x5_tn", True),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_nn_align8>", True),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x32x8_stage3_warpsize2x2x1_ffma_aligna4", False),
        ("void gemmSN_NN_kernel<float, 128, 2, 4, 8>", False),
        ("void gemvNSP_kernel<__half, __half, __half, float, 1, 32, 4, 1024>", False),
        ("void dot_kernel<float, 128, 0>", False),
        ("ampere_sgemm_32x128_tn", False),
        ("a_kernel_nobody_has_seen", None),
        (None, None),
    ],
)
def test_tensor_cores_are_read_from_the_kernels_own_name(name, uses):
    assert kernel_names.uses_tensor_cores(name) is uses


def test_the_kernel_that_multiplies_is_told_from_its_helpers():
    assert kernel_names.main_kernel(["Memset (Device)", "nvjet_hsh_64x8", "cublasLt::splitKreduce_kernel<32>"]) == (
        "nvjet_hsh_64x8"
    )
    assert kernel_names.main_kernel([]) is None
    assert kernel_names.short("void dot_kernel<float, 128>(cublasDotParams<float>)") == "dot_kernel<float, 128>"


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


def test_f14_is_found_by_the_tile_alone():
    ran = "nvjet_sm90_hsh_64x96_64x8_1x2_h_bz_NNT"
    assert kernel_names.label_problem("64x96", ran) is None and kernel_names.label_problem("TILE_96x64", ran) is None
    assert "computes 64x96" in kernel_names.label_problem("128x64", ran)
    assert "no kernel was seen" in kernel_names.label_problem("128x64", None)
    assert kernel_names.label_problem("UNDEFINED", "dot_kernel<float>") is None
    assert kernel_names.label_agrees("dot_kernel<float>", "128x64") is None


def test_one_kernel_under_two_tiles_is_a_contradiction():
    assert kernel_names.contradictions([("64x96", "a"), ("128x64", "b"), ("64x96", "a"), ("64x64", None)]) == []
    assert kernel_names.contradictions([("64x96", "a"), ("128x64", "a")]) == ["a ran under the labels 64x96 and 128x64"]


# --- the second opinion, and the peer --------------------------------------------------------------------------------


def test_matmul_heuristics_predicts_on_the_cpu_for_a_known_gpu():
    pytest.importorskip("nvMatmulHeuristics")
    found = matmul_heuristics.predict(QK, "NVIDIA H200")
    assert found.split_k >= 1 and found.latency_us > 0
    assert len([int(side) for side in found.tile.split("x")]) == 3
    assert matmul_heuristics.predict(QK, None) is None and matmul_heuristics.predict(QK, "Another GPU") is None


def test_cublas_is_called_with_the_transposed_product(monkeypatch):
    from flashcore.survey import cublas

    class Library:
        cuBLASError = RuntimeError
        calls: list = []

        def set_stream(self, *arguments):
            self.calls.append("stream")

        def set_workspace(self, *arguments):
            self.calls.append("workspace")

        def gemm_strided_batched_ex(self, *arguments):
            self.calls.append(arguments)

    library = Library()
    monkeypatch.setattr(cublas, "_library", lambda: (library, 7))
    product = Product(2048, 128, 64, batch=3, transpose_b=True, out_dtype="float32", row_b=72)
    cublas.Call(product).run(1, 2, 3, stream=4, workspace=5, workspace_bytes=6)
    assert library.calls[:2] == ["stream", "workspace"], "setting the stream resets the workspace"
    handle, first, second, m, n, k, _, b, _, ldb, next_b, a, _, lda, _, _, d, kind, ldd, _, batch, _, _ = library.calls[
        2
    ]
    assert (handle, first, second, m, n, k) == (7, cublaslt.OP_T, cublaslt.OP_N, 128, 2048, 64)
    assert (b, ldb, next_b, a, lda, d, ldd, batch, kind) == (2, 72, 128 * 72, 1, 64, 3, 128, 3, 0)

    def refuse(*arguments):
        raise RuntimeError("CUBLAS_STATUS_INVALID_VALUE")

    monkeypatch.setattr(library, "gemm_strided_batched_ex", refuse)
    with pytest.raises(CublasLtError, match="cublasGemmStridedBatchedEx gave CUBLAS_STATUS_INVALID_VALUE"):
        cublas.Call(product).run(1, 2, 3, stream=4, workspace=5, workspace_bytes=6)
