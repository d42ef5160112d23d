"""SYNTHETIC records for tests: invented numbers in the shape of real ones. Nothing here was measured."""

from __future__ import annotations

import json
import random
from pathlib import Path

from flashcore.gpu.build import source_hashes
from flashcore.problem import PRESETS, Problem, square
from flashcore.records import Correctness, RunFolder, Timing, Trial

ENV_ID = "env-synthetic001"
HASHES = source_hashes()
"""The kernels as they are now, so that synthetic evidence is fresh."""
KERNEL_OF = {"scalar": "attention_scalar", "wmma": "attention_wmma"}
NOTEBOOKS = ["01_environment", "02_correctness_bisection", "04_tflops_sweep"]
SPEED = {"scalar": 2.4, "wmma": 131.0, "sdpa-math": 21.0, "sdpa-flash": 298.0, "sdpa-cudnn": 465.0}
"""TFLOPS at the report's workload of the run that says NO-GO."""
FAST = {**SPEED, "wmma": 512.0}
"""The same with a kernel of ours that meets every target."""


def environment(gpu: str | None = "SYNTHETIC H200", **changes) -> dict:
    before = {
        "gpu": gpu, "sm_count": 132 if gpu else None, "driver": "580.00", "torch": "2.13.0", "nvrtc": "13.0",
        "python": "3.11.9", "platform": "Linux", "cpu": "SYNTHETIC CPU", "sm_clock_mhz": 1980, "temperature_c": 41,
        "power_w": 121, "l2_bytes": 60 * 2**20, "memory_bytes": 139 * 2**30, "throttle_reasons": [],
    }  # fmt: skip
    return {
        "schema_version": 1, "id": ENV_ID, "gpu": gpu, "date": "2001-02-03T04:05:06+00:00", "before": before,
        "after": {**before, "temperature_c": 63, "power_w": 402}, "git": {"commit": "0" * 40, "dirty": False},
        "kernels": dict(HASHES), "flashcore": "0.0.0",
        "parameters": {"profile": "full", "backends": "all", "problems": "default", "seed": 0, "notebooks": NOTEBOOKS},
        **changes,
    }  # fmt: skip


def source_hash(backend: str) -> str | None:
    return HASHES.get(KERNEL_OF.get(backend, ""))


def correctness(backend: str, problem: Problem, *, status: str = "ok", **changes) -> Trial:
    wrong = status == "failed"
    checked = problem.batch * problem.num_heads_q * problem.seqlen_q * (problem.head_dim + 1)
    found = Correctness(
        passed=not wrong, checked=checked, num_bad=17 if wrong else 0, 
        max_abs_error=0.75 if wrong else 2.1e-4, bound=9.4e-4,
        lse_max_abs_error=3e-6,
        first_bad={"batch": 0, "head": 3, "row": 17, "column": 5, "got": 0.5, "expected": -0.25} if wrong else None,
    )  # fmt: skip
    fields = {
        "kind": "correctness", "backend": backend, "problem": problem, "status": status, "correctness": found,
        "source_hash": source_hash(backend), "environment": ENV_ID,
        "reason": "17 elements are wrong" if wrong else None,
    }  # fmt: skip
    return Trial(**{**fields, **changes})


def timing(backend: str, problem: Problem, latency_us: float, *, round_: str, samples: int = 30, **changes) -> Trial:
    rng = random.Random(f"{backend} {problem.label()}")
    taken = sorted(latency_us * rng.gauss(1.0, 0.004) for _ in range(samples))
    median = taken[len(taken) // 2] if taken else latency_us
    rng.shuffle(taken)
    l2 = "warm" if problem.flops() < 5e9 else "rotating"
    timing = Timing(
        method="graph_replay", latency_us=median, samples_us=taken,
        tflops=problem.flops() / median / 1e6, round=round_,
        l2=l2,
        launch_us=21.4,
    )  # fmt: skip
    fields = {
        "kind": "attention_timing", "backend": backend, "problem": problem, "timing": timing,
        "source_hash": source_hash(backend), "environment": ENV_ID,
    }  # fmt: skip
    return Trial(**{**fields, **changes})


def problems() -> list[Problem]:
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    swept = [
        square(min(16, 32768 // s), 16, s, d, causal=causal)
        for d in (64, 128)
        for causal in (False, True)
        for s in lengths
    ]
    return [*swept, PRESETS["latency"], square(1, 16, 1024, 64)]


def latency_of(backend: str, problem: Problem, speed: dict[str, float]) -> float:
    if problem.flops() < 5e9:
        small = {"scalar": 96.0, "wmma": 14.2, "sdpa-math": 61.0, "sdpa-flash": 10.6, "sdpa-cudnn": 9.4}
        return (4.4 if speed[backend] > 500 else small[backend]) * problem.flops() / PRESETS["latency"].flops()
    rate = speed[backend] * (0.55 + 0.45 * min(1.0, problem.seqlen_q / 2048)) * (1 + 0.2 * (problem.head_dim == 128))
    return problem.flops() / (rate * (0.85 if problem.causal else 1.0)) / 1e6


def gpu_trials(speed: dict[str, float] = SPEED) -> list[Trial]:
    """A whole run on a GPU: ceilings, builds, checks, timings, and the record of each notebook."""
    ceilings = [
        ("copy_bandwidth", 4.28, "TB/s", "device to device, bytes read and written"),
        ("matmul_fp16", 758.0, "TFLOPS", "8192 × 8192 × 8192, random data"),
        ("launch_overhead", 2.2, "us", "host time of one launch"),
    ]
    trials = [
        Trial(kind="ceiling", environment=ENV_ID, data={"name": n, "value": v, "unit": u, "method": m})
        for n, v, u, m in ceilings
    ]
    for kernel, digest in HASHES.items():
        for head_dim in (64, 128):
            data = {
                "kernel": kernel, "head_dim": head_dim, "dtype": "float16", "trace": False, "registers": 168,
                "spill_bytes": 0, "shared_bytes": 40960, "arch": "sm_90a", "compile_seconds": 1.2, "cached": False,
                "tensor_instructions": {"HMMA": 128} if "wmma" in kernel else {}, "nvrtc_version": "13.0",
            }  # fmt: skip
            trials.append(Trial(kind="build", environment=ENV_ID, source_hash=digest, data=data))
    tiny = PRESETS["tiny"]
    trials += [correctness("cpu", tiny), correctness("reference", tiny)]
    for number, problem in enumerate(problems()):
        trials += [correctness(backend, problem) for backend in speed]
        trials += [timing(b, problem, latency_of(b, problem, speed), round_=f"round-{number}") for b in speed]
    trials.append(
        Trial(kind="attention_timing", backend="fa3", status="unavailable", reason="it is not installed",
              environment=ENV_ID)
    )  # fmt: skip
    return [*trials, memory_saved(70.3), *(finished(name) for name in NOTEBOOKS)]


def memory_saved(percent: float, **changes) -> Trial:
    data = {"what": "memory", "case": "shared_prefix", "saved_percent": percent}
    return Trial(**{"kind": "paging", "environment": ENV_ID, "data": data, **changes})


def cpu_trials() -> list[Trial]:
    """A whole run on a machine without a GPU: the cpu backend checked and timed, the kernels unavailable."""
    trials = []
    for seqlen in (128, 256, 512):
        problem = square(1, 4, seqlen, 64, dtype="float32")
        trials += [correctness(b, problem) for b in ("reference", "cpu", "sdpa-math")]
        for backend, factor in (("cpu", 8.0), ("sdpa-math", 3.0)):
            trial = timing(backend, problem, factor * seqlen, round_=f"cpu-{seqlen}", samples=7)
            trials.append(trial.model_copy(update={"timing": trial.timing.model_copy(update={"method": "host"})}))
    reason = "no CUDA GPU is visible; to mend it: run on an H100 or H200"
    for backend in ("scalar", "wmma"):
        for kind in ("correctness", "attention_timing"):
            trials.append(Trial(kind=kind, backend=backend, status="unavailable", reason=reason, environment=ENV_ID))
    return trials + [finished(name) for name in NOTEBOOKS]


def finished(name: str, **changes) -> Trial:
    return Trial(**{"kind": "notebook", "environment": ENV_ID, "data": {"name": name}, **changes})


def write_run(folder: Path, trials: list[Trial], env: dict) -> RunFolder:
    run = RunFolder.create(folder)
    run.environment_path.write_text(json.dumps(env), encoding="utf-8")
    run.records_path.write_text("".join(t.model_dump_json() + "\n" for t in trials), encoding="utf-8")
    return run
