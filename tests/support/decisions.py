"""Decisions on SYNTHETIC records, and the few ways in which tests change those records. Nothing here was measured."""

from __future__ import annotations

from flashcore.decision import verdict
from flashcore.decision.judging import GateResult
from flashcore.problem import PRESETS
from flashcore.records import Trial
from support import synthetic_records as synthetic

GATES = verdict.load_gates()
GOOD = synthetic.gpu_trials(synthetic.FAST)
REPORT, LATENCY = PRESETS["report"], PRESETS["latency"]
HOPPER = synthetic.HASHES["attention_hopper"]


def decide(trials, gates=GATES, *, environment=None, current=None, **more) -> verdict.Decision:
    """The decision on trials, by default on the synthetic machine with the kernels as they are now."""
    given = {
        "environment": synthetic.environment() if environment is None else environment,
        "current_hashes": synthetic.HASHES if current is None else current,
        **more,
    }
    return verdict.decide(trials, gates, **given)


def gate(decision: verdict.Decision, name: str) -> verdict.GateResult:
    return next(g for g in decision.gates if g.id == name)


def option(decision: verdict.Decision, name: str):
    return next(o for o in decision.options if o.id == name)


def hopper(tflops: float, latency_us: float = 4.2) -> list[Trial]:
    """Records of a hopper kernel of this speed, in the rounds of the others."""
    found = []
    for problem, latency in ((REPORT, REPORT.flops() / tflops / 1e6), (LATENCY, latency_us)):
        like = next(t for t in GOOD if t.kind == "attention_timing" and t.backend == "wmma" and t.problem == problem)
        timed = synthetic.timing("hopper", problem, latency, round_=like.timing.round, source_hash=HOPPER)
        found += [timed, synthetic.correctness("hopper", problem, source_hash=HOPPER)]
    return found


def without_paging(trials) -> list[Trial]:
    return [t for t in trials if t.kind != "paging"]


def replaced(trials, wanted, **changes) -> list[Trial]:
    """The trials with some changed; at least one must be."""
    changed = [t.model_copy(update=changes) if wanted(t) else t for t in trials]
    assert changed != trials
    return changed


def timing_at(backend, problem):
    return lambda t: t.kind == "attention_timing" and t.backend == backend and t.problem == problem


def with_timing(trials, wanted, **changes) -> list[Trial]:
    assert any(wanted(t) for t in trials)
    return [t.model_copy(update={"timing": t.timing.model_copy(update=changes)}) if wanted(t) else t for t in trials]


WRONG = {"passed": False, "num_bad": 256}


def recorded(trials=GOOD, **changes) -> verdict.Recorded:
    return verdict.Recorded(tuple(trials), synthetic.environment(**changes), "synthetic")


def result(measured: float, threshold: float, comparison: str, *, metric: str = "latency_us") -> GateResult:
    margin = measured - threshold if comparison == "at least" else threshold - measured
    return GateResult(
        id="x", title="X", state="PASS" if margin >= 0 else "FAIL", threshold=threshold, measured=measured,
        margin=margin, unit="µs", n=30, interval=(measured, measured), evidence="live", reason="Because.", fix=None,
        required=True, comparison=comparison, metric=metric, problem="report", backend="hopper",
    )  # fmt: skip
