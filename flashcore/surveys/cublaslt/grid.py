"""Say which matrix products a survey of cuBLASLt covers, and read a product back from a record."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flashcore.errors import InvalidProblem
from flashcore.gpu.cublaslt import Product
from flashcore.problem import check_profile
from flashcore.records import Trial

SEQLEN, HEAD_DIM, PAGE, HEADS = 2048, 64, 128, 256
"""The original status report's workload: its page's products are ``[2048, 64] x [64, 128]`` and back."""
ROW_HEADS = 4
"""Heads at once over a whole row of keys: their scores fit the L2 cache of an H100."""
DEFAULT_LIMIT_MB = 256
SMALL_SIDES = {"quick": (1, 8, 16, 64), "full": (1, 8, 16, 32, 64, 128)}
"""Sides of the products that look for the smallest one with a Tensor Core kernel; 1 to find where it ends."""
SMALL_DEPTHS = {"quick": (16,), "full": (16, 64)}
ODD_STRIDES = (8, 4, 2, 1)
"""Elements added to a row of K or V: rows then start at multiples of 16, 8, 4 and 2 bytes."""
LIMITS_MB = {"quick": (0,), "full": (0, 1, 4, 16, 64)}
BATCHES = {"quick": (1, 16, 256), "full": (1, 2, 4, 8, 16, 32, 64, 128, 256)}

DEEP = {"quick": ((128, 128, 8192),), "full": ((64, 64, 4096), (128, 128, 8192), (512, 512, 4096), (2048, 64, 2048))}
"""Few results and long sums: where a product is split over K, and what that asks of workspace and gives in time."""

Group = Literal["report", "row", "deep", "batch", "transpose", "output", "order", "alignment", "workspace", "smallest"]
GROUPS: tuple[str, ...] = (
    "report", "row", "deep", "batch", "transpose", "output", "order", "alignment", "workspace", "smallest"
)  # fmt: skip
_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
_SHORT = {name: short for short, name in _DTYPES.items()}
USUAL: dict[str, Any] = {
    "limit_mb": DEFAULT_LIMIT_MB, "algo_id": 66, "stages": "64xAUTO", "split_k": 1, "reduction_scheme": 0,
    "cta_swizzling": 0, "inner_shape": "UNDEFINED", "workspace_bytes": 0, "tensor_core": True,
}  # fmt: skip
"""What most candidates have in `data`, which their records leave out: it was a quarter of a survey's size."""


@dataclass(frozen=True)
class SurveyCase:
    """One question to cuBLASLt: a product, under a workspace limit."""

    id: str
    """Stable name; a survey that is resumed skips the cases whose records are there."""
    group: Group
    product: Product
    limit_mb: int = DEFAULT_LIMIT_MB
    """Workspace that a candidate may ask for."""
    asked: int = 64
    """Candidates asked for."""
    keep_all: bool = True
    """Whether every candidate becomes a record; otherwise the first, the fastest and the largest workspace."""
    peer: bool = False
    """Whether cuBLAS without Lt is measured beside it."""

    @property
    def limit_bytes(self) -> int:
        return self.limit_mb << 20


def survey_grid(profile: str) -> list[SurveyCase]:
    """The cases of a profile, those of the original status report first.

    Raises
    ------
    UnknownName
        `profile` is neither quick nor full.
    """
    check_profile(profile)
    qk = Product(SEQLEN, PAGE, HEAD_DIM, transpose_b=True)
    pv = Product(SEQLEN, HEAD_DIM, PAGE)
    qk_row = Product(SEQLEN, SEQLEN, HEAD_DIM, batch=ROW_HEADS, transpose_b=True)
    pv_row = Product(SEQLEN, HEAD_DIM, SEQLEN, batch=ROW_HEADS)
    cases = [
        SurveyCase("report-qk", "report", qk, peer=True),
        SurveyCase("report-pv", "report", pv, peer=True),
        SurveyCase("row-qk", "row", qk_row, peer=True),
        SurveyCase("row-pv", "row", pv_row, peer=True),
    ]
    cases += [SurveyCase(f"deep-{m}x{n}x{k}", "deep", Product(m, n, k)) for m, n, k in DEEP[profile]]
    for batch in BATCHES[profile]:
        cases += [
            SurveyCase(f"batch-qk-{batch}", "batch", _with(qk, batch=batch), keep_all=False, peer=batch == HEADS),
            SurveyCase(f"batch-pv-{batch}", "batch", _with(pv, batch=batch), keep_all=False, peer=batch == HEADS),
        ]
    for name, product in (("page", qk), ("row", qk_row), ("batched", _with(qk, batch=HEADS))):
        # K as it lies, [n, k], against a K that was transposed beforehand, [k, n]: one result
        cases += [
            SurveyCase(f"transpose-{name}-transposed", "transpose", product, keep_all=False),
            SurveyCase(f"transpose-{name}-beforehand", "transpose", _with(product, transpose_b=False), keep_all=False),
        ]
    outputs = [("qk-f32", _with(qk, out_dtype="float32")), ("row-qk-f32", _with(qk_row, out_dtype="float32"))]
    if profile == "full":
        outputs += [("pv-f32", _with(pv, out_dtype="float32")), ("row-pv-f32", _with(pv_row, out_dtype="float32"))]
        for name, product in (("qk", qk), ("pv", pv)):
            outputs.append((f"{name}-bf16", _with(product, dtype="bfloat16", out_dtype="bfloat16")))
    cases += [SurveyCase(f"output-{name}", "output", product, keep_all=False) for name, product in outputs]
    named = (("qk", qk), ("pv", pv), ("row-qk", qk_row), ("row-pv", pv_row))
    for name, product in named[: 2 if profile == "quick" else 4]:
        cases.append(SurveyCase(f"order-{name}", "order", _with(product, order="row"), keep_all=False))
        for limit in LIMITS_MB[profile]:
            cases.append(SurveyCase(f"workspace-{name}-{limit}", "workspace", product, limit_mb=limit, keep_all=False))
    for extra in ODD_STRIDES if profile == "full" else ODD_STRIDES[::3]:
        for name, product, width in (("qk", qk, HEAD_DIM), ("pv", pv, HEAD_DIM)):
            strided = _with(product, row_b=width + extra)
            cases.append(SurveyCase(f"alignment-{name}-{extra}", "alignment", strided, keep_all=False))
    for k in SMALL_DEPTHS[profile]:
        for m in SMALL_SIDES[profile]:
            for n in SMALL_SIDES[profile]:
                product = Product(m, n, k)
                cases.append(SurveyCase(f"smallest-{m}x{n}x{k}", "smallest", product, asked=8, keep_all=False))
    return cases


def _with(product: Product, **changes) -> Product:
    """The product with some fields changed and its strides packed, but for those among `changes`."""
    fields = {
        "m": product.m, "n": product.n, "k": product.k, "batch": product.batch, "transpose_b": product.transpose_b,
        "dtype": product.dtype, "out_dtype": product.out_dtype, "order": product.order,
    }  # fmt: skip
    return Product(**{**fields, **changes})


def write_product(product: Product) -> str:
    """A product in one short text that `read_product` reads back, such as ``2048x128x64 b4 T f16>f32 row ldb=72``."""
    parts = [f"{product.m}x{product.n}x{product.k}"]
    parts += [f"b{product.batch}"] if product.batch != 1 else []
    parts += ["T"] if product.transpose_b else []
    parts.append(f"{_SHORT[product.dtype]}>{_SHORT[product.out_dtype]}")
    parts += ["row"] if product.order == "row" else []
    packed = product.k if product.transpose_b else product.n
    parts += [f"ldb={product.row_b}"] if product.row_b != packed else []
    return " ".join(parts)


def read_product(text: str) -> Product:
    """The product behind the text that a record holds.

    Raises
    ------
    InvalidProblem
        The text is no product's.
    """
    found = re.fullmatch(
        r"(\d+)x(\d+)x(\d+)(?: b(\d+))?( T)? (f16|bf16|f32)>(f16|bf16|f32)( row)?(?: ldb=(\d+))?", text
    )
    if not found:
        raise InvalidProblem(f"'{text}' is no matrix product; one looks like '2048x128x64 b4 T f16>f32'.")
    m, n, k, batch, transposed, dtype, out_dtype, row, stride = found.groups()
    return Product(
        int(m), int(n), int(k), batch=int(batch or 1), transpose_b=bool(transposed), dtype=_DTYPES[dtype],
        out_dtype=_DTYPES[out_dtype], order="row" if row else "column", row_b=int(stride or 0),
    )  # fmt: skip


def product_of(trial: Trial) -> Product | None:
    """The product that a `gemm_candidate` trial is about; None when it names none that can be read."""
    try:
        return read_product(str(trial.data.get("product")))
    except InvalidProblem:
        return None


def candidates_of(trials: Sequence[Trial], *, case: str | None = None) -> list[Trial]:
    """The measured candidates of cuBLASLt among `trials`, each once (the last record of a case and rank counts).

    Parameters
    ----------
    case
        Only those of this case, by its id.
    """
    found: dict[tuple, Trial] = {}
    for trial in trials:
        if trial.kind != "gemm_candidate" or trial.backend != "cublaslt" or trial.data.get("group") not in GROUPS:
            continue
        if case is None or trial.variant == case:
            found[trial.variant, trial.data.get("rank")] = trial
    return [whole(t) for t in found.values() if measured_us(t) is not None]


def lean(data: dict[str, Any]) -> dict[str, Any]:
    """The `data` of a candidate as it is written: without what is `USUAL`."""
    return {k: v for k, v in data.items() if k not in USUAL or v != USUAL[k] or type(v) is not type(USUAL[k])}


def whole(trial: Trial) -> Trial:
    """A candidate of cuBLASLt with what its record left out; records that left out nothing are taken as they are."""
    candidate = trial.kind == "gemm_candidate" and trial.backend == "cublaslt" and trial.data.get("rank") is not None
    return trial.model_copy(update={"data": {**USUAL, **trial.data}}) if candidate else trial


def peers_of(trials: Sequence[Trial]) -> dict[str, Trial]:
    """cuBLAS without Lt, by the id of the case it was measured beside."""
    return {
        t.variant: t
        for t in trials
        if t.kind == "gemm_candidate" and t.backend == "cublas" and t.variant and measured_us(t) is not None
    }


def measured_us(trial: Trial) -> float | None:
    """Median device time of a candidate in µs; None when it failed or has none."""
    if trial.status != "ok" or trial.timing is None or not trial.timing.latency_us > 0:
        return None
    return trial.timing.latency_us
