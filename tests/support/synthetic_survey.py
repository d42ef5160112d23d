"""SYNTHETIC survey records for tests: invented numbers in the shape of real ones. Nothing here was measured."""

from __future__ import annotations

from dataclasses import replace

from flashcore.errors import CublasLtError
from flashcore.gpu import cublaslt, device
from flashcore.gpu.cublaslt import Algorithm, Product
from flashcore.problem import PRESETS, Problem
from flashcore.records import Correctness, Timing, Trial
from flashcore.surveys.cublaslt import measuring
from flashcore.surveys.cublaslt.grid import SurveyCase, survey_grid
from flashcore.surveys.cublaslt.matmul_heuristics import Prediction
from flashcore.surveys.cublaslt.measuring import Measured, Roofs, trials_of

ROOFS = Roofs({"float16": 700.0, "bfloat16": 720.0}, 4.0)
ENVIRONMENT = {"id": "env-synthetic001", "gpu": "SYNTHETIC H200", "date": "2001-02-03T04:05:06+00:00",
               "before": {"cublaslt": 130100, "l2_bytes": 60 << 20}}  # fmt: skip
TILES = ("64x48", "128x64", "64x96", "128x128")


def algorithm(rank: int = 0, **changes) -> Algorithm:
    tile = TILES[rank % len(TILES)]
    one = Algorithm(
        rank=rank, algo_id=66, tile=f"TILE_{tile}", stages="STAGES_64xAUTO", split_k=1, reduction_scheme=0,
        cta_swizzling=0, custom_option=rank // len(TILES), inner_shape="UNDEFINED", cluster_shape="SHAPE_1x2x1",
        workspace_bytes=0, waves_count=0.969696, raw=f"{rank:02x}" * 64,
    )  # fmt: skip
    return replace(one, **changes)


def kernel_of(one: Algorithm) -> str:
    """The name that a kernel with this algorithm's tile would have."""
    return f"nvjet_sm90_hsh_{one.tile.removeprefix('TILE_')}_64x{8 + one.custom_option}_1x2_h_bz_NNT"


def offered(product: Product) -> list[Algorithm]:
    """Invented candidates: 4 for a usual product, one that is split where the sum is long, none for a 1x1 result."""
    if product.m == product.n == 1:
        raise CublasLtError("cublasLtMatmulAlgoGetHeuristic", "CUBLAS_STATUS_NOT_SUPPORTED", product.label())
    found = [algorithm(rank) for rank in range(4)]
    if product.k >= 2048:
        found += [algorithm(4 + i, split_k=2 << i, workspace_bytes=(1 << 20) << i) for i in range(2)]
    return found


def times_of(product: Product, found: list[Algorithm]) -> list[float | None]:
    """Invented times: the second candidate is the fastest; a split one is 30 % faster than that."""
    base = 2.0 + product.flops() / 200e6
    factors = [1.1, 1.0, 1.2, 1.3, 0.7, 0.75]
    return [base * factors[a.rank] for a in found]


def measured(case: SurveyCase) -> Measured:
    one = Measured(case)
    try:
        one.offered = offered(case.product)
        one.times_us = times_of(case.product, one.offered)
    except CublasLtError as error:
        one.error = str(error)
    tiny = min(case.product.m, case.product.n) < 16
    one.kernels = [["dot_kernel" if tiny else kernel_of(a), "splitKreduce_kernel"] for a in one.offered]
    if case.peer:
        one.peer_us, one.peer_kernels = 3.0 + case.product.flops() / 200e6, [kernel_of(algorithm(0))]
    return one


def survey_trials(profile: str = "full") -> list[Trial]:
    """A whole survey."""
    prediction = Prediction(tile="64x32x64", cluster="1x2", split_k=1, latency_us=10.85)
    return [trial for case in survey_grid(profile) for trial in trials_of(measured(case), ROOFS, prediction)]


def ceilings() -> list[Trial]:
    values = [("copy_bandwidth", 4.0, "TB/s"), ("l2_copy_bandwidth", 6.0, "TB/s"), ("matmul_fp16", 700.0, "TFLOPS"),
              ("graph_node", 0.8, "us")]  # fmt: skip
    return [Trial(kind="ceiling", data={"name": n, "value": v, "unit": u, "method": "SYNTHETIC"}) for n, v, u in values]


def timing(backend: str, latency_us: float, problem: Problem = PRESETS["report"]) -> Trial:
    found = Timing(method="graph_replay", latency_us=latency_us, samples_us=[latency_us] * 9, round="r1", l2="rotating",
                   tflops=problem.flops() / latency_us / 1e6)  # fmt: skip
    return Trial(kind="attention_timing", backend=backend, problem=problem, timing=found)


def attention_trials() -> list[Trial]:
    return [timing("cublaslt-loop", 36000.0), timing("cublaslt-batched", 5200.0), timing("cublaslt", 2600.0),
            timing("sdpa-cudnn", 600.0)]  # fmt: skip


def check(backend: str, **changes) -> Trial:
    fields = {"passed": True, "checked": 1_000_000, "num_bad": 0, "max_abs_error": 1e-4, "bound": 1e-3, **changes}
    status = "ok" if fields["passed"] else "failed"
    return Trial(kind="correctness", backend=backend, problem=PRESETS["tiny"], status=status,
                 correctness=Correctness(**fields))  # fmt: skip


def everything() -> list[Trial]:
    return [*ceilings(), *survey_trials(), *attention_trials(), check("cublaslt"), check("cublaslt-loop")]


def stand_in(monkeypatch) -> list[Product]:
    """Put in place, at the calls that need a GPU, a cuBLASLt of invented answers; gives the log of what was asked."""
    asked: list[Product] = []

    def candidates(product, *, asked=64, workspace_bytes=None, device=0):
        log.append(product)
        return offered(product)

    def name_kernels(found):
        for one in found:
            one.kernels = [[kernel_of(a)] for a in one.offered]
            one.peer_kernels = [kernel_of(algorithm(0))] if one.peer_us is not None else []

    log = asked
    monkeypatch.setattr(cublaslt, "library", lambda: None)
    monkeypatch.setattr(cublaslt, "candidates", candidates)
    monkeypatch.setattr(cublaslt, "measure", lambda product, offered, **_: times_of(product, offered))
    monkeypatch.setattr(measuring, "measure_peer", lambda product: 3.25)
    monkeypatch.setattr(measuring, "name_kernels", name_kernels)
    monkeypatch.setattr(measuring, "measure_roofs", lambda run, pool=None: ROOFS)
    monkeypatch.setattr(device, "gpu_name", lambda: "NVIDIA H200")
    return log
