"""Measure every card by one short list, all at the same time: speed, latency, clock, heat, counters and bits.

The list is the same on each card, and so are its inputs, which the host makes: cards of one kind have to give the same
bits. `flashcore.decision.fleet` says which card is off the others.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch

from flashcore import backends
from flashcore.backends import Backend
from flashcore.decision.fleet import WHAT
from flashcore.gpu import device
from flashcore.gpu.counters import IDLE_REASONS, counters
from flashcore.measure import ceilings
from flashcore.measure.check import check_attention
from flashcore.measure.cluster import Pool, Task, perform
from flashcore.measure.timing import Candidate, input_sets, time_on_cpu, time_on_gpu
from flashcore.measure.watching import Watch
from flashcore.numerics import ambient
from flashcore.numerics.inputs import make_inputs
from flashcore.problem import PRESETS, Problem, square
from flashcore.records import RunFolder, Timing, Trial, digits

SOAK_S = 2.0
"""Seconds of matrix products under which clock, power and temperature are read."""
ROUNDS = 20
REPEATS = 3
"""Runs on the same inputs whose bits are compared with each other, and then with those of other cards."""
COPIED = 256 << 20
"""Bytes of one copy from the host."""
TIMED = {
    "cuda": (
        ("attention", "hopper", PRESETS["report"]),
        ("causal_attention", "hopper", square(4, 16, 8192, 128, dtype="bfloat16", causal=True)),
        ("small_call", "hopper", PRESETS["latency"]),
    ),
    "cpu": (("attention", "cpu", square(1, 4, 256, 64, dtype="float32")),),
}  # fmt: skip
"""What is timed on each card: the figure's name, the backend, the problem."""
SMALL = "small_call"
"""The figure that is told as a latency."""
BITS = {
    "cuda": square(2, 8, 1024, 128, causal=True), "cpu": square(1, 2, 128, 64, dtype="float32", causal=True),
}  # fmt: skip
"""The problem whose bits are compared."""
OF_BITS = {"cuda": ("hopper", "wmma", "sdpa-cudnn"), "cpu": ("cpu", "sdpa-math")}
"""Whose bits, where they are available."""


def measure(run: RunFolder, pool: Pool) -> list[Trial]:
    """Measure all cards of a pool side by side, one record of kind `fleet` each."""
    tasks = [
        Task(f"the fleet's list on {place.label}", measured, only=place.key, timing=True, cost_s=20.0,
             owed=({"kind": "fleet", "data": {"what": WHAT, "kind": place.gpu or "CPU"}},))
        for place in pool.places
    ]  # fmt: skip
    return perform(tasks, run=run, pool=pool)[0]


@ambient.judging
def measured() -> list[Trial]:
    """The record of the card, or CPU, that this process works on."""
    where, started = ("cuda" if device.has_gpu() else "cpu"), time.perf_counter()
    before = counters()
    figures = _ceilings(where)
    load = _under_load() if where == "cuda" else {}
    if where == "cuda":
        figures["host_copy"] = {"value": digits(_host_copy_gbs(), 4), "unit": "GB/s"}
    wrong: list[str] = []
    for name, backend_id, problem in TIMED[where]:
        try:
            figures[name] = _timed(name, backends.get(backend_id), problem, where)
        except Exception as error:  # the other figures are still worth having
            wrong.append(f"{backend_id} was not timed: {' '.join(str(error).split())[:200]}")
    bits: dict[str, list[str]] = {}
    for backend in map(backends.get, OF_BITS[where]):
        if backend.availability().ok and backend.why_not(BITS[where]) is None:
            checked = check_attention(backend, BITS[where], device=where)
            if checked.status != "ok":
                wrong.append(f"{backend.id}: {checked.reason}")
            bits[backend.id] = _bits(backend, BITS[where], where)
    facts = device.snapshot()
    data: dict[str, Any] = {
        "what": WHAT, "kind": facts["gpu"] or facts["cpu"] or "CPU", "cpu": where == "cpu", "figures": figures,
        "load": load, "bits": bits, "wrong": wrong, "seconds": round(time.perf_counter() - started, 1),
        # Errors that came while the list was measured count as well.
        "counters": before | counters(),
    }  # fmt: skip
    reason = f"it computes wrong results: {wrong[0]}" if wrong else None
    return [Trial(kind="fleet", status="failed" if wrong else "ok", reason=reason, data=data)]


def _ceilings(where: str) -> dict[str, dict[str, Any]]:
    """What plain kernels reach, by name; the host's time of a launch says nothing of a card."""
    found = [trial.data for trial in ceilings.measured()]
    return {
        str(data["name"]): {"value": digits(data["value"], 5), "unit": data["unit"].replace("us", "µs")}
        for data in found if data["name"] != "launch_overhead"
    }  # fmt: skip


def _under_load() -> dict[str, Any]:
    """Clock, power and temperature while the card multiplies matrices, and what held its clock down meanwhile."""
    side = ceilings.MATRIX
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    reasons: set[str] = set()
    memory_mhz = None
    with Watch() as watch:
        until = time.perf_counter() + SOAK_S
        while time.perf_counter() < until:
            for _ in range(20):
                torch.mm(a, b)
            now = device.clocks()  # while the card works through what was queued
            reasons.update(reason for reason in now["throttle_reasons"] or () if reason not in IDLE_REASONS)
            memory_mhz = now["memory_clock_mhz"] or memory_mhz
            torch.cuda.synchronize()
    seen = watch.summary() or {}
    load = {name: values[1] for name, values in seen.items() if isinstance(values, list | tuple)}
    if memory_mhz is not None:
        load["memory_clock_mhz"] = memory_mhz
    return load | {"throttle_reasons": sorted(reasons)}


def _host_copy_gbs() -> float:
    """GB/s of a copy from pinned memory of the host to the card: what its PCIe link lets through."""
    source = torch.empty(COPIED, dtype=torch.uint8).pin_memory()
    target = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    return COPIED / ceilings.gpu_ms(lambda: target.copy_(source, non_blocking=True)) / 1e6


def _timed(name: str, backend: Backend, problem: Problem, where: str) -> dict[str, Any]:
    """One figure of attention: TFLOPS, or µs for a call that is too small to fill a card."""
    backend.require(problem)
    l2 = "warm" if name == SMALL or where == "cpu" else "rotating"
    sets = input_sets(problem, l2=l2, l2_bytes=device.l2_bytes()) if where == "cuda" else 1
    tensors = [make_inputs(problem, seed=i, device=where) for i in range(sets)]
    candidate = Candidate(backend.id, lambda i: backend.run(*tensors[i], problem))
    if where == "cuda":
        timing = time_on_gpu([candidate], problem, sets=sets, l2=l2, rounds=ROUNDS)[backend.id]
        torch.cuda.empty_cache()
    else:
        timing = time_on_cpu([candidate], problem)[backend.id]
    if not isinstance(timing, Timing):
        raise timing
    if name == SMALL:
        return {"value": digits(timing.latency_us, 5), "unit": "µs"}
    return {"value": digits(problem.flops() / timing.latency_us / 1e6, 5), "unit": "TFLOPS"}


def _bits(backend: Backend, problem: Problem, where: str) -> list[str]:
    """The different bits of its results on the same inputs, as hashes; more than one is chance at work.

    The host makes the inputs, since the random numbers of a card depend on how many multiprocessors it has.
    """
    q, k, v = (tensor.to(where) for tensor in make_inputs(problem, seed=0, device="cpu"))
    found = []
    for _ in range(REPEATS):
        told = hashlib.sha256()
        for tensor in backend.run(q, k, v, problem):
            if tensor is not None:
                told.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found.append(told.hexdigest()[:16])
    return list(dict.fromkeys(found))
