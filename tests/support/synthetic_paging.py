"""SYNTHETIC paging records for tests: invented numbers in the shape of real ones. Nothing here was measured."""

from __future__ import annotations

from typing import Any

from flashcore.problem import Problem
from flashcore.records import Timing, Trial
from flashcore.surveys.paging.plan import plan_for
from support import synthetic_records as synthetic

READ_TBS = 4.6
FULL = plan_for("full", True)


def trial(what: str, backend: str | None = None, **fields) -> Trial:
    data = {"what": what, **fields.pop("data", {})}
    return Trial(kind="paging", backend=backend, environment=synthetic.ENV_ID, data=data,
                 source_hash=next(iter(synthetic.HASHES.values())) if backend in ("decode", "hopper-paged") else None,
                 **fields)  # fmt: skip


def timing(us: float, *, round_: str = "r1", method: str = "graph_replay") -> Timing:
    return Timing(method=method, latency_us=us, samples_us=[us * f for f in (1, 0.99, 1.01, 1, 1)], round=round_,
                  l2="rotating", quartiles_us=[us * 0.995, us * 1.005], n=30)  # fmt: skip


def memory() -> list[Trial]:
    cases = [("shared_prefix", 70.3, "dense"), ("mixed_lengths", 47.1, "padded"), ("no_sharing", -0.8, "dense")]
    return [
        trial("memory", data={
            "case": case, "saved_percent": saved, "baseline": baseline, "baseline_bytes": 1 << 30,
            "resident_bytes": round((1 - saved / 100) * (1 << 30)), "overhead_bytes": 5 << 20, "sequences": 16,
            "definition": f"bytes of resident K and V pages of 128 tokens, one layer: SYNTHETIC {case}",
        })
        for case, saved, baseline in cases
    ]  # fmt: skip


def decode_of(problem: Problem) -> list[Trial]:
    """A shape whose step over all pages is a little faster than dense cuDNN and near the floor."""
    kv = 2 * problem.batch * problem.num_heads_kv * problem.seqlen_k * problem.head_dim * 2
    floor = kv / READ_TBS / 1e6
    every = 1.02 * floor

    def one(variant: str, backend: str, us: float, **data: Any) -> Trial:
        share = data.get("pages_share", 1.0)
        data = {"floor_us": share * floor, "of_floor": share * floor / us, "kv_bytes": round(share * kv), **data}
        return trial("decode", backend, variant=variant, problem=problem, timing=timing(us), data=data)

    found = [one("all pages", "decode", every, policy="none", share=1.0, of_dense=1.0, over_peer=1.04)]
    for share in FULL.shares:
        for policy, extra in (("top_k", 0.06), ("sink_window", 0.03)):
            us = (share + extra) * every
            found.append(one(f"{policy} {100 * share:g} %", "decode", us, policy=policy, share=share, pages_share=share,
                             of_dense=share + extra, over_peer=1.04 / (share + extra)))  # fmt: skip
    return [*found, one("dense", "sdpa-cudnn", 1.04 * every, policy="dense", share=1.0)]


def accuracy() -> list[Trial]:
    mass = {"peaked": (0.93, 0.28), "diffuse": (0.35, 0.32), "drifting": (0.96, 0.95), "needle": (0.93, 0.04),
            "needle, spread thin": (0.6, 0.03)}  # fmt: skip
    found = []
    for pattern, means in mass.items():
        for share in FULL.accuracy_shares:
            for policy, mean in zip(("top_k", "sink_window"), means, strict=True):
                lost = 128 if mean < 0.1 else 40 if pattern == "needle, spread thin" else 0
                found.append(trial("accuracy", data={
                    "pattern": pattern, "policy": policy, "share": share, "pages": 256, "keys": 32768,
                    "pages_share": share, "mass_mean": mean, "mass_least": 0.8 * mean, "error_mean": 1 - mean,
                    "error_largest": 1.1 * (1 - mean), "queries": 128, "lost": lost,
                }))  # fmt: skip
    return found


def tokens() -> list[Trial]:
    found = []
    for model in FULL.models:
        for batch in FULL.batches:
            problem = model.problem(batch)
            us = 8.0 + problem.bytes() / READ_TBS / 1e6
            rate = batch / (model.layers * us) * 1e6
            found.append(trial("tokens", "decode", variant=model.name, problem=problem, timing=timing(us), data={
                "shape": model.name, "layers": model.layers, "batch": batch, "tokens_per_s": rate,
                "stated": batch == model.stated_batch, "sparse_share": 0.3, "sparse_policy": "top_k",
                "sparse_us": 0.4 * us, "sparse_tokens_per_s": 2.5 * rate,
                "definition": f"attention only, batch {batch}, {model.words()}: batch / (layers x time of one layer)",
            }))  # fmt: skip
    return found


SHEET_TBS = 4.8


def way(what: str, variant: str, backend: str, problem: Problem, us: float, size: int, **data: Any) -> Trial:
    """One way of a decode step that read so many bytes."""
    data = {"kv_bytes": size, "sheet_tbs": SHEET_TBS, "tbs": size / us / 1e6, **data}
    return trial(what, backend, variant=variant, problem=problem, timing=timing(us), data=data)


def beside(dense: float, flashinfer: float, **more: float) -> dict[str, Any]:
    """How many times as fast a way is as others."""
    found: dict[str, Any] = {"dense": "dense", "flashinfer": "FlashInfer, tensor cores"}
    for side, ratio in {"dense": dense, "flashinfer": flashinfer, **more}.items():
        found |= {f"over_{side}": ratio, f"over_{side}_quartiles": [0.99 * ratio, 1.01 * ratio]}
    return found


def serving(models: int = 3) -> list[Trial]:
    """Three models: 3 % faster than dense cuDNN and 5 % than FlashInfer; the invariant mode takes a tenth more."""
    found = []
    for model in FULL.served[:models]:
        for batch in FULL.served_batches:
            problem = model.problem(batch).with_(dtype="bfloat16")
            size = 2 * batch * model.num_heads_kv * model.context * model.head_dim * 2
            us = 8.0 + size / (0.95 * READ_TBS) / 1e6
            data = {"shape": model.name, "layers": model.layers, "batch": batch, "card": model.card}
            asked = problem.with_(batch_invariant=True)
            for name, backend, one, ratio, more in (
                ("all pages", "decode", problem, 1.0, beside(1.03, 1.05)),
                ("batch-invariant", "decode", asked, 1.1, beside(0.936, 0.955, ordinary=1 / 1.1)),
                ("dense", "sdpa-cudnn", problem, 1.03, {}),
                ("FlashInfer, tensor cores", "flashinfer", problem, 1.05, {}),
                ("FlashInfer, CUDA cores", "flashinfer", problem, 1.09, {}),
            ):
                found.append(way("serving", name, backend, one, ratio * us, size, **data, **more))
    return found


def shapes() -> list[Trial]:
    """Five shapes in two dtypes at three page sizes, of which pages of 16 are a little slower than dense cuDNN."""
    found = []
    for problem in (one.with_(dtype=dtype) for one in FULL.shapes for dtype in FULL.dtypes):
        size = 2 * problem.batch * problem.num_heads_kv * problem.seqlen_k * problem.head_dim * 2
        us, data = 5.0 + size / (0.95 * READ_TBS) / 1e6, {"case": "plain"}
        found.append(way("shapes", "dense", "sdpa-cudnn", problem, us, size, **data))
        for page in FULL.pages:
            ratio, paged = 0.98 if page == 16 else 1.02, problem.with_(page_size=page)
            found.append(way("shapes", f"page {page}", "decode", paged, us / ratio, size, **data,
                             **beside(ratio, 1.06 * ratio)))  # fmt: skip
            for name in ("tensor", "CUDA"):
                found.append(way("shapes", f"FlashInfer, {name} cores, page {page}", "flashinfer", paged, 1.06 * us,
                                 size, **data))  # fmt: skip
    return [*found, *further()]


def further() -> list[Trial]:
    """What serving has beside plain steps: unlike lengths, a few query tokens, a shared prefix."""
    one, size = FULL.further.problem, 1 << 30
    found = [way("shapes", "all pages", "decode", one.with_(seqlen_k=15_987), 500.0, 2 * size, case="mixed lengths",
                 shortest=112, tokens=500_000, over_flashinfer=1.07, flashinfer="FlashInfer, CUDA cores")]  # fmt: skip
    found.append(way("shapes", "1 query token", "decode", one, 240.0, size, case="query tokens", over_dense=1.01))
    for tokens in FULL.further.tokens:
        problem = one.with_(seqlen_q=tokens, causal=True)
        found.append(
            way(
                "shapes",
                f"{tokens} query tokens",
                "decode",
                problem,
                240.0 + 6 * tokens,
                size,
                case="query tokens",
                over_one=240 / (240 + 6 * tokens),
                over_dense=0.9,
                over_flashinfer=1.2,
            )
        )
    found.append(way("shapes", "prefix shared", "decode", one, 60.0, size // 5, case="shared prefix", prefix=3584,
                     over_apart=4.0, over_flashinfer=0.97, flashinfer="FlashInfer, cascade"))  # fmt: skip
    return [*found, way("shapes", "nothing shared", "decode", one, 240.0, size, case="shared prefix", prefix=3584)]


def correctness() -> list[Trial]:
    data = {"right": 12, "wrong": 0, "unsupported": 0, "elements": 123_456, "worst_share_of_bound": 0.4}
    groups = ("page sizes", "policies", "prefill")
    return [
        trial("correctness", backend, data={**data, "group": group})
        for backend in ("decode", "hopper-paged", "reference") for group in groups
    ]  # fmt: skip


def other_times() -> list[Trial]:
    found = []
    for problem in FULL.prefill:
        found.append(
            trial(
                "prefill",
                "hopper-paged",
                variant="paged",
                problem=problem,
                timing=timing(570.0),
                data={"over_dense": 0.97, "over_dense_quartiles": [0.965, 0.975], "dense": "hopper"},
            )
        )
        found.append(trial("prefill", "hopper", variant="dense", problem=problem, timing=timing(553.0)))
    append = {"sequences": 64, "latency_us": 4.2, "key_bounds": True}
    return [*found, trial("append", problem=FULL.append, timing=timing(4.2), data=append)]  # fmt: skip


def everything() -> list[Trial]:
    """A whole survey on a GPU."""
    decode = [t for problem in FULL.decode for t in decode_of(problem)]
    return [*correctness(), *memory(), *decode, *other_times(), *accuracy(), *tokens(), *serving(), *shapes()]
