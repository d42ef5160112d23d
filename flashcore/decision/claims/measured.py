"""Hold a claim against what a run measured for the same quantity and workload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flashcore.decision import compare
from flashcore.decision.claims.file import Claim, Claims, Gpu
from flashcore.decision.claims.findings import Finding, apart, dtype_of, latency_us, spaced, time_words, work
from flashcore.decision.compare import is_figure, number
from flashcore.decision.judging import Source, clause
from flashcore.problem import PRESETS, Problem
from flashcore.records import Trial

RUN_TO_RUN = 0.03
"""By how much two runs of one kernel on one GPU may differ in median without contradicting each other."""
CEILING_SLACK = 0.05
"""By how much a claim may exceed the fastest measured on the same GPU: other shapes and clocks reach a little more."""
CEILING_OF = {"float16": "matmul_fp16", "bfloat16": "matmul_bf16"}
"""The ceiling record that bounds a workload's speed, by dtype."""


@dataclass(frozen=True)
class Run:
    """What the checks may use of a run: its records, its machine, and the data sheet of that."""

    source: Source
    gpus: tuple[Gpu, ...] = ()

    @property
    def trials(self) -> tuple[Trial, ...]:
        return self.source.trials

    @property
    def gpu(self) -> str | None:
        return self.source.environment.get("gpu")

    @property
    def where(self) -> str:
        return f" on {self.gpu}" if self.gpu else ""

    @property
    def sheet(self) -> Gpu | None:
        return next((gpu for gpu in self.gpus if gpu.is_named(self.gpu)), None)

    def is_of(self, claim: Claim) -> bool:
        """Whether the claim is about the GPU of this run; one that names none is taken to be."""
        return bool(self.gpu) and (claim.gpu is None or (self.sheet is not None and self.sheet.id == claim.gpu))

    def doubt(self, trial: Trial) -> str | None:
        """Why a measurement may not be held against a claim, as a clause."""
        if doubt := self.source.doubt(trial):
            return doubt
        wrong = self._is_wrong(trial.backend, trial.problem)
        return f"{trial.backend} computes wrong results on this problem" if wrong else None

    @cached_property
    def _wrong(self) -> dict[tuple, bool]:
        """What `_is_wrong` found: a run has many timings of few problems, and each would read all checks again."""
        return {}

    def _is_wrong(self, backend: str | None, problem: Problem | None) -> bool:
        """Whether some check of a backend on a problem failed."""
        if (backend, problem) not in self._wrong:
            checks = self.source.pick("correctness", lambda t: (
                t.backend == backend and compare.same_problem(t.problem, problem)
            ))  # fmt: skip
            self._wrong[backend, problem] = any(compare.passed(t) is False for t in checks)
        return self._wrong[backend, problem]

    @cached_property
    def _roofs(self) -> dict[str, float | None]:
        return {}

    def fastest(self, dtype: str) -> float | None:
        """TFLOPS of the fastest kernel of a dtype that was measured: a plain matrix product, or attention itself."""
        if dtype not in self._roofs:
            timed = self.source.pick("attention_timing", lambda t: t.problem is not None and t.problem.dtype == dtype)
            rates = [rate for t in timed if (rate := compare.tflops(t)) is not None and self.doubt(t) is None]
            of_products = _ceiling(self, CEILING_OF.get(dtype))
            self._roofs[dtype] = max(filter(None, [*rates, of_products]), default=None)
        return self._roofs[dtype]


def measurement(claim: Claim, claims: Claims, run: Run) -> list[Finding]:
    """What the run says of the claim's quantity, or what would have to be run."""
    if claim.records is not None:
        return _from_records(claim, run)
    if claim.quantity in ("work_gflop", "count"):
        return []  # follows from the workload; there is nothing to measure
    if claim.quantity == "speedup":
        return [_measured_ratio(claim, claims, run)]
    if claim.quantity in ("clock_ghz", "sm_count", "peak_tflops"):
        return [_machine(claim, run)]
    if claim.family != "speed":
        return [_not_measured(claim)]
    problems = [claim.workload] if claim.workload else list(claim.may_mean)
    if not problems or claim.share != 1:
        what = "a part of a call is not timed by itself" if problems else "without a workload there is nothing to time"
        return [Finding("measurement", "missing", f"Not measured in this run: {what}.")]
    return [_timed(claim, problem, run) for problem in problems]


def _not_measured(claim: Claim, why: str = "", command: str | None = None) -> Finding:
    command = claim.measure or command
    how = f"; '{command}' measures it" if command else ", and no command is named that would measure it"
    return Finding("measurement", "missing", f"Not measured in this run{f' ({why})' if why else ''}{how}.")


def _command(backend: str | None, problem: Problem) -> str:
    name = next((name for name, preset in PRESETS.items() if preset == problem), problem.label())
    return f"flashcore report --backend {backend or 'all'} --problem {name}"


def _timed(claim: Claim, problem: Problem, run: Run) -> Finding:
    """A measured time for the workload beside the claimed one."""
    wanted = claim.counterpart or claim.backend
    timings = run.source.pick("attention_timing", lambda t: compare.same_problem(t.problem, problem))
    usable = [t for t in timings if compare.latency_us(t) is not None]
    if wanted is None:
        usable = [t for t in usable if compare.contends(t)]
        trial = min(usable, key=compare.latency_us, default=None)
    else:
        trial = next((t for t in reversed(usable) if t.backend == wanted), None)
    if trial is None:
        ours = wanted if claim.counterpart else None
        return _not_measured(claim, _why_not(wanted, problem, run), _command(ours, problem))
    return _beside(claim, problem, trial, run)


def _why_not(backend: str | None, problem: Problem, run: Run) -> str:
    """What the run's records say of a timing that is not there, as a clause; empty when they say nothing."""
    for trial in run.trials if backend else ():
        if trial.backend != backend or trial.status == "ok" or not trial.reason:
            continue
        if trial.problem is None or compare.same_problem(trial.problem, problem):
            return f"{backend}: {clause(trial.reason.split('; to mend it')[0])}"
    return ""


def _beside(claim: Claim, problem: Problem, trial: Trial, run: Run) -> Finding:
    measured, samples = compare.latency_us(trial), compare.samples_us(trial)
    within, flop = compare.interval_us(trial), work(problem)
    figures = {"backend": trial.backend, "n": len(samples), "unit": claim.own_unit, "claimed": claim.number}
    if claim.quantity == "tflops":
        figures |= {"against": flop / measured / 1e6}
        figures |= {"interval": within and (flop / within[1] / 1e6, flop / within[0] / 1e6)}
    else:
        figures |= {"against": measured, "interval": within}
    who = f"{trial.backend}, the fastest of ours," if not (claim.counterpart or claim.backend) else trial.backend
    bounds = f", the median within {time_words(within[0])} to {time_words(within[1])}" if within else ""
    says = (
        f"Measured: {who} takes {time_words(measured)} ({number(flop / measured / 1e6)} TFLOPS; "
        f"n {len(samples)}{bounds}){run.where} at {spaced(problem)}"
    )
    interval = latency_us(claim, problem) or (0.0, math.inf)
    middle = claim.number if claim.quantity == "latency_us" else flop / claim.number / 1e6
    agrees = not apart(interval, _widened(within or (measured, measured)))
    says += ", as claimed" if agrees else f", {_faster(middle, measured)} the claim"
    doubt = run.doubt(trial)
    if doubt:
        says += f"; but {doubt}"
    decides = claim.workload and trial.backend == claim.backend and run.is_of(claim) and not doubt
    outcome = "beside" if not decides else "confirmed" if agrees else "contradicted"
    return Finding("measurement", outcome, f"{says}.", **figures)


def _widened(bounds: tuple[float, float]) -> tuple[float, float]:
    return bounds[0] * (1 - RUN_TO_RUN), bounds[1] * (1 + RUN_TO_RUN)


def _faster(claimed: float, measured: float) -> str:
    if not 0 < claimed < math.inf:
        return "not"
    ratio = claimed / measured
    return f"{number(ratio)} times as fast as" if ratio >= 1 else f"{number(1 / ratio)} times as slow as"


def _measured_ratio(claim: Claim, claims: Claims, run: Run) -> Finding:
    """The measured ratio of what stands for the two claims that a speed-up is the ratio of."""
    slow, fast = claims.get(claim.of), claims.get(claim.over)
    if slow is None or fast is None or {slow.family, fast.family} != {"speed"} or slow.workload is None:
        return _not_measured(claim, "it is no ratio of two timed calls")
    if slow.quantity == "tflops":
        slow, fast = fast, slow
    names = [c.counterpart or c.backend for c in (fast, slow)]
    timings = run.source.pick("attention_timing", lambda t: compare.same_problem(t.problem, slow.workload))
    usable = {t.backend: t for t in timings if compare.latency_us(t) is not None}  # of several the last counts
    found = [usable.get(name) for name in names]
    ratio = compare.ratio(*found) if None not in found else None
    if ratio is None:
        named = all(c.counterpart for c in (fast, slow))
        return _not_measured(claim, "", _command(",".join(names), slow.workload) if named else None)
    bounds = f", the median within {compare.between(ratio.interval)}" if ratio.interval else ""
    says = (
        f"Measured: {names[0]} is {number(ratio.value)} times as fast as {names[1]} (n {ratio.n}{bounds})"
        f"{run.where} at {spaced(slow.workload)}"
    )
    doubt = next((d for t in found if (d := run.doubt(t))), None)
    says += f"; but {doubt}" if doubt else ""
    own = names == [fast.backend, slow.backend] and run.is_of(claim) and not doubt
    agrees = not apart(claim.interval, _widened(ratio.interval or (ratio.value, ratio.value)))
    outcome = "beside" if not own else "confirmed" if agrees else "contradicted"
    return Finding(
        "measurement", outcome, f"{says}.", claim.number, ratio.value, "×", names[0], ratio.n, ratio.interval
    )


def _machine(claim: Claim, run: Run) -> Finding:
    """What the run saw of the GPU itself: its clock, its SMs, its fastest matrix product."""
    if claim.quantity == "peak_tflops":
        found = _ceiling(run, CEILING_OF.get(claim.dtype or "float16"))
        if found is None:
            return _not_measured(claim, "", "flashcore report")
        outcome = "contradicted" if found > claim.interval[1] and run.is_of(claim) else "beside"
        side = "above the claimed peak" if found > claim.interval[1] else "which does not exceed the claimed peak"
        sentence = f"Measured: matrix products reach {number(found)} TFLOPS{run.where}, {side}."
        return Finding("measurement", outcome, sentence, claim.number, found, "TFLOPS")
    key, scale = {"clock_ghz": ("sm_clock_mhz", 1e-3), "sm_count": ("sm_count", 1.0)}[claim.quantity]
    # Between notebooks a GPU idles at a fraction of its clock; timings note it under load.
    timings = [t.timing for t in run.trials if t.timing is not None]
    states = [run.source.environment.get(name) for name in ("before", "after")]
    states += [t.more(name) for t in timings for name in ("clocks_before", "clocks_after")]
    seen = [s[key] * scale for s in states if isinstance(s, Mapping) and _is_number(s.get(key))]
    if not seen:
        return _not_measured(claim, "", "flashcore report")
    what = "SMs were counted" if key == "sm_count" else "GHz was the highest clock seen"
    sentence = f"Measured: {max(seen):g} {what}{run.where}."
    return Finding("measurement", "beside", sentence, claim.number, max(seen), claim.own_unit)


def _from_records(claim: Claim, run: Run) -> list[Finding]:
    """Figures that other records of the run hold for the claim's quantity: of each definition they state, the last."""
    wanted, found = claim.records, {}
    for trial in run.trials:
        value = trial.data.get(wanted.key)
        here = all(trial.data.get(key) == expected for key, expected in wanted.where.items())
        if trial.kind == wanted.kind and trial.status == "ok" and is_figure(value) and here:
            found[str(trial.data.get("definition"))] = trial
    return [_as_recorded(claim, trial, run) for trial in found.values()] or [_not_measured(claim)]


def _as_recorded(claim: Claim, trial: Trial, run: Run) -> Finding:
    value = float(trial.data[claim.records.key])
    at = f" at {spaced(trial.problem)}" if trial.problem else ""
    meaning = trial.data.get("definition")
    figure = f"{number(value)} {claim.own_unit}"
    says = f"Measured: {figure}{run.where}{at}" + (f", {clause(meaning)}" if meaning else "")
    doubt = run.source.doubt(trial)
    if doubt:
        says += f"; but {doubt}"
    return Finding("measurement", "beside", f"{says}.", claim.number, value, claim.own_unit, trial.backend)


def measured_roof(claim: Claim, run: Run) -> list[Finding]:
    """A claim of speed against the fastest that the run measured; it refutes one about the same GPU only."""
    rate_roof, floor = run.fastest(dtype_of(claim)), _ceiling(run, "graph_node")
    outcome = "contradicted" if run.is_of(claim) else "beside"
    found = []
    interval = latency_us(claim, claim.workload) if claim.family == "speed" else None
    if interval and claim.workload and rate_roof and interval[1] > 0:
        rate = work(claim.workload, claim.share) / interval[1] / 1e6
        if rate > rate_roof * (1 + CEILING_SLACK):
            sentence = f"The fastest kernel measured{run.where} reached {number(rate_roof)} TFLOPS, which is less."
            found.append(Finding("physics", outcome, sentence, rate, rate_roof, "TFLOPS"))
    if interval and floor and interval[1] < floor * (1 - CEILING_SLACK):
        sentence = f"An empty kernel in a CUDA graph was measured to take {number(floor)} µs{run.where}, which is more."
        found.append(Finding("physics", outcome, sentence, interval[1], floor, "µs"))
    return found


def _ceiling(run: Run, name: str | None) -> float | None:
    """The largest figure of a ceiling that succeeded; for a time the smallest."""
    figures = [
        float(t.data["value"]) for t in run.trials
        if t.kind == "ceiling" and t.status == "ok" and name and t.data.get("name") == name
        and _is_number(t.data.get("value")) and run.source.doubt(t) is None
    ]  # fmt: skip
    return (min if name == "graph_node" else max)(figures, default=None)


def _is_number(value: Any) -> bool:
    return is_figure(value) and value > 0
